"""The composed torch attention against the float32 reference of the segment rule."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from packscore import InputError
from packscore.attention import PrefixCache, SegmentPlan, attend, attend_math, segment_attention
from packscore_kernels.segment_paged_attention.layout import Group, SegmentLayout
from packscore_kernels.segment_paged_attention.reference import segment_attention_reference
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


@pytest.mark.parametrize("num_first", [0, 1, 3, 7])
def test_a_cached_prefix_gives_the_same(num_first: int) -> None:
    """The first items with the prefix, the others behind its keys and values alone."""
    item_lens = [0, 3, 5, 5, 1, 70, 2]
    layout = SegmentLayout.single(33, item_lens)
    q, k, v = random_qkv(layout, 4, 2, 16)
    whole = segment_attention(q, k, v, SegmentPlan.build(layout), sm_scale=0.25)
    rest = SegmentLayout((Group(0, np.array(item_lens[num_first:], np.int32), cached_len=33),), 0)
    start = layout.num_tokens - rest.num_real_tokens
    rest = dataclasses.replace(rest, num_tokens=rest.num_real_tokens)
    cache = PrefixCache(33)
    cache.keep(0, k, v)
    out = segment_attention(
        *(x[:, :, start:] for x in (q, k, v)),
        SegmentPlan.build(rest),
        sm_scale=0.25,
        cached=cache.layers[0],
    )
    assert torch.allclose(out, whole[:, start:], rtol=0, atol=ATTENTION_FLOAT32)
    assert np.array_equal(rest.position_ids, layout.position_ids[start:])


def test_a_plan_with_a_cached_prefix_needs_the_cache() -> None:
    layout = SegmentLayout((Group(0, np.array([3], np.int32), cached_len=8),), 3)
    q, k, v = random_qkv(layout, 4, 2, 16)
    with pytest.raises(InputError, match="cached=None, and the plan's prefix is not among"):
        segment_attention(q, k, v, SegmentPlan.build(layout), sm_scale=0.25)


def test_half_cached_prefixes_are_refused() -> None:
    group = Group(4, np.array([2], np.int32), cached_len=8)
    with pytest.raises(InputError, match="cached_len=8: torch attention takes a prefix whole"):
        SegmentPlan.build(SegmentLayout((group,), 6))
