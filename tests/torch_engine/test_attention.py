"""The composed torch attention against the float32 reference of the segment rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from packscore import InputError
from packscore.flows.page_pool import PagePool
from packscore.torch_engine.attention import SegmentPlan, attend, attend_math, segment_attention
from packscore.torch_engine.pages import KvPages, PageWrite, slot_runs
from packscore_kernels.attention.layout import Group, SegmentLayout
from packscore_kernels.attention.reference import segment_attention_reference
from tolerances import ATTENTION_BFLOAT16, ATTENTION_FLOAT32

LAYOUTS = {
    "P0-one": SegmentLayout.single(0, [7]),
    "P0-mixed": SegmentLayout.single(0, [3, 9, 4, 1]),
    "P5-none": SegmentLayout.single(5, []),
    "P5-empty-items": SegmentLayout.single(5, [0, 0]),
    "P1-equal": SegmentLayout.single(1, [4] * 6),
    "P33-mixed": SegmentLayout.single(33, [1, 0, 70, 2, 2, 31, 32, 33, 5]),
    "P9-padded": SegmentLayout.single(9, [3, 4], num_tokens=40),
    "all-padding": SegmentLayout((), 8),
    "two-groups": SegmentLayout(
        (
            Group(6, np.array([3, 5], np.int32)),
            Group(0, np.array([4], np.int32)),
            Group(11, np.array([2, 0, 9], np.int32)),
        ),
        num_tokens=44,
    ),
}


def random_qkv(layout: SegmentLayout, heads: int, kv_heads: int, dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(layout.num_tokens)
    return [
        torch.randn(1, layout.num_tokens, count, dim, generator=generator).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=lambda h: f"H{h[0]}-{h[1]}")
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_the_reference(name: str, heads: tuple[int, int]) -> None:
    layout = LAYOUTS[name]
    q, k, v = random_qkv(layout, *heads, 16)
    expected = segment_attention_reference(
        *(x[0].numpy() for x in (q, k, v)), layout, sm_scale=0.25
    )
    plan = SegmentPlan.build(layout)
    out = segment_attention(q, k, v, plan, sm_scale=0.25)[0].transpose(0, 1)
    assert np.abs(out.numpy() - np.asarray(expected)).max(initial=0) <= ATTENTION_FLOAT32
    half = [x.bfloat16() for x in (q, k, v)]
    out = segment_attention(*half, plan, sm_scale=0.25)[0].transpose(0, 1)
    assert out.dtype == torch.bfloat16
    difference = np.abs(out.float().numpy() - np.asarray(expected))
    assert difference.max(initial=0) <= ATTENTION_BFLOAT16


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("tile_bytes", [1, 4096, 2**26])
def test_math_path_equals_the_fused_kernel(is_causal: bool, tile_bytes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 6, 19, 32, generator=generator)
    k, v = torch.randn(2, 3, 2, 19, 32, generator=generator)
    fused, fused_lse = attend(q, k, v, is_causal=is_causal, sm_scale=0.2)
    out, lse = attend_math(q, k, v, is_causal=is_causal, sm_scale=0.2, tile_bytes=tile_bytes)
    assert (out - fused).abs().max() <= ATTENTION_FLOAT32
    assert (lse - fused_lse).abs().max() <= ATTENTION_FLOAT32


def test_double_precision_takes_the_math_path() -> None:
    layout = LAYOUTS["P33-mixed"]
    q, k, v = (x.double() for x in random_qkv(layout, 4, 2, 16))
    plan = SegmentPlan.build(layout)
    out = segment_attention(q, k, v, plan, sm_scale=0.25)
    single = segment_attention(q.float(), k.float(), v.float(), plan, sm_scale=0.25)
    assert out.dtype == torch.float64
    assert (out - single).abs().max() <= ATTENTION_FLOAT32


def test_no_buffer_of_tokens_by_tokens() -> None:
    layout = SegmentLayout.single(64, [8] * 500)
    q, k, v = random_qkv(layout, 2, 1, 16)
    plan = SegmentPlan.build(layout)
    with torch.profiler.profile(profile_memory=True) as profile:
        segment_attention(q, k, v, plan, sm_scale=0.25)
    largest = max(
        (event.cpu_memory_usage for event in profile.events() if event.name == "[memory]"),
        default=0,
    )
    assert 0 < largest < layout.num_tokens**2 // 8
    # the fused kernel's output is the largest thing there is
    assert largest <= 4 * q.numel() * q.itemsize


def test_lengths_share_calls() -> None:
    """Items of 1 to 63 tokens need a few calls of the kernel; long ones are never padded."""
    plan = SegmentPlan.build(SegmentLayout.single(100, [*range(1, 64), 64, 64, 65, 200]))
    long = [(batch.length, len(batch.rows)) for batch in plan.sequences if batch.length >= 64]
    assert long == [(64, 2), (65, 1), (100, 1), (200, 1)]
    assert len(plan.sequences) - len(long) <= 20
    padded = sum(batch.rows.numel() for batch in plan.sequences)
    assert padded <= 1.25 * plan.num_tokens


def test_equal_lengths_are_a_view() -> None:
    plan = SegmentPlan.build(SegmentLayout.single(100, [20] * 500))
    assert sorted((batch.length, batch.start) for batch in plan.sequences) == [(20, 100), (100, 0)]


PAGE = 8


def paged_case(cached_lens: list[int]) -> tuple[SegmentLayout, list[Group], int]:
    """Groups whose prefixes lie in pages up to some token, the pages shuffled, with gaps."""
    numbers = np.random.default_rng(7).permutation(64)[:40].astype(np.int32)
    groups, first = [], 0
    for cached in cached_lens:
        count = -(-cached // PAGE)
        own = 0 if cached % 3 == 0 and cached else 5
        pages = numbers[first : first + count]
        groups.append(Group(own, np.array([3, 0, 9], np.int32), cached, pages))
        first += count
    layout = SegmentLayout(tuple(groups), sum(group.num_tokens for group in groups) + 4)
    return layout, groups, 64


def paged_keys(
    layout: SegmentLayout, num_pages: int, kv_heads: int, dim: int
) -> tuple[KvPages, np.ndarray]:
    """The same keys and values twice: in torch's pages and in the reference's, NaN elsewhere."""
    pages = KvPages(num_pages, PAGE)
    generator = torch.Generator().manual_seed(3)
    empty = torch.full((1, kv_heads, 1, dim), torch.nan)
    slots = pages._slots(0, empty)
    slots.fill_(torch.nan)
    for group in layout.groups:
        if group.cached_len:
            k, v = torch.randn(2, 1, kv_heads, group.cached_len, dim, generator=generator)
            runs = slot_runs(group.page_indices, 0, group.cached_len, PAGE)
            pages.write(0, k, v, [PageWrite(0, runs, None)])
    pool = slots.view(2, kv_heads, num_pages, PAGE, dim).permute(2, 1, 0, 3, 4).numpy()
    return pages, pool


@pytest.mark.parametrize(
    "cached_lens",
    [[PAGE - 1], [PAGE], [PAGE + 1], [0, 3 * PAGE, 17], [1, 33], [24, 0, 9, 16]],
    ids=lambda lens: "C" + "-".join(map(str, lens)),
)
def test_cached_prefixes_equal_the_reference(cached_lens: list[int]) -> None:
    layout, _, num_pages = paged_case(cached_lens)
    q, k, v = random_qkv(layout, 4, 2, 16)
    pages, pool = paged_keys(layout, num_pages, 2, 16)
    expected = segment_attention_reference(
        *(x[0].numpy() for x in (q, k, v)), layout, sm_scale=0.25, kv_pages=pool
    )
    plan = SegmentPlan.build(layout, page_size=PAGE)
    out = segment_attention(q, k, v, plan, sm_scale=0.25, pages=pages)[0].transpose(0, 1)
    assert np.abs(out.numpy() - np.asarray(expected)).max() <= ATTENTION_FLOAT32


def test_neighbouring_groups_on_the_same_pages_share_a_call() -> None:
    table = np.array([4, 2], np.int32)
    groups = [Group(n, np.array([2, 3], np.int32), 12, table) for n in (3, 0, 6)]
    plan = SegmentPlan.build(SegmentLayout(tuple(groups), 24), page_size=PAGE)
    cached = [part for part in plan.parts if part.packed is None]
    assert [part.rows for part in cached] == [(0, 24)]
    assert cached[0].slots == ((32, 8), (16, 4))


def test_what_a_lease_misses_is_written_and_found() -> None:
    """A prefix that parts from another inside a page: the page is copied, then continued."""
    pool = PagePool(8, 32)
    pages = KvPages(8, 32)
    k, v = torch.randn(2, 1, 2, 50, 16, generator=torch.Generator().manual_seed(0))
    first = pool.acquire(np.arange(50))
    assert first is not None
    pages.write(0, k, v, [PageWrite.of(first, len(first.tokens), 0)])
    first.commit()
    second = pool.acquire(np.concatenate([np.arange(50), [9, 9, 9]]))
    third = pool.acquire(np.concatenate([np.arange(20), np.full(30, 7)]))
    assert second is not None
    assert third is not None
    assert (second.cached_len, third.cached_len) == (50, 20)
    new_k, new_v = torch.randn(2, 1, 2, 40, 16, generator=torch.Generator().manual_seed(1))
    pages.write(
        0,
        new_k,
        new_v,
        [PageWrite.of(x, len(x.tokens), row) for x, row in ((second, 0), (third, 3))],
    )
    for lease, (row, start) in ((second, (0, 50)), (third, (3, 20))):
        length = len(lease.tokens)
        found, _ = pages.read(0, slot_runs(lease.pages, 0, length, 32))
        assert torch.equal(found[:, :, :start], k[:, :, :start])
        assert torch.equal(found[:, :, start:], new_k[:, :, row : row + length - start])
    # and the first one is as it was
    found, values = pages.read(0, slot_runs(first.pages, 0, 50, 32))
    assert torch.equal(found, k)
    assert torch.equal(values, v)


def test_neighbouring_pages_are_read_in_place() -> None:
    pages = KvPages(4, PAGE)
    slots = pages._slots(0, torch.zeros(1, 2, 1, 16))
    k, _ = pages.read(0, slot_runs(np.array([1, 2], np.int32), 0, 13, PAGE))
    assert k.shape == (1, 2, 13, 16)
    assert k.data_ptr() == slots[0, 0, PAGE].data_ptr()
    k, _ = pages.read(0, slot_runs(np.array([2, 1], np.int32), 0, 13, PAGE))
    assert k.shape == (1, 2, 13, 16)


def test_a_plan_with_a_cached_prefix_needs_the_pages() -> None:
    group = Group(0, np.array([3], np.int32), 8, np.array([0], np.int32))
    layout = SegmentLayout((group,), 3)
    q, k, v = random_qkv(layout, 4, 2, 16)
    plan = SegmentPlan.build(layout, page_size=PAGE)
    with pytest.raises(InputError, match="pages=None, and the plan has prefix tokens in pages"):
        segment_attention(q, k, v, plan, sm_scale=0.25)
