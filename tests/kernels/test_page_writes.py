"""The page writer: exactly the asked slots change, and what it wrote reads back as the prefix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from packscore_kernels import (
    ArgumentError,
    BlockSizes,
    Group,
    LayoutError,
    SegmentLayout,
    build_page_writes,
    segment_paged_attention,
    write_kv_pages,
)
from tolerances import KERNEL_REORDERED_FLOAT32

IMPLEMENTATIONS = ["xla", "pallas_interpret"]
NO_ITEMS = np.zeros(0, np.int32)


def pages(*numbers: int) -> np.ndarray:
    return np.asarray(numbers, np.int32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_slots_of_packed_prefix_tokens_change(implementation: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    layout = SegmentLayout(
        (
            Group(40, pages(8)),  # begins where a copy may: two whole pages, and a half of one
            Group(37, pages(5), 20, pages(9, 3)),  # 20 cached: the rest of page 3, pages 7, 1
            Group(16, pages(2)),
            Group(30, pages(3)),  # left out
        ),
        160,
    )
    tables = [pages(2, 0, 11), pages(9, 3, 7, 1), pages(4), NO_ITEMS]
    pool = jnp.asarray(rng.standard_normal((12, 2, 2, 16, 64)), dtype)
    k, v = (jnp.asarray(rng.standard_normal((2, 160, 64)), dtype) for _ in range(2))
    plan = build_page_writes(layout, tables, page_size=16, num_pages=12, max_writes=12)
    got = np.asarray(
        jax.jit(write_kv_pages, static_argnames="implementation")(
            pool, k, v, plan, implementation=implementation
        ).astype(jnp.float32)
    )

    want = np.asarray(pool.astype(jnp.float32)).copy()
    k, v = (np.asarray(x.astype(jnp.float32)) for x in (k, v))
    written = ((0, 0, 40), (20, 48, 37), (0, 90, 16))  # cached, first row, tokens
    for table, (cached, first, count) in zip(tables, written, strict=False):
        for i in range(count):
            page, slot = table[(cached + i) // 16], (cached + i) % 16
            want[page, :, 0, slot], want[page, :, 1, slot] = k[:, first + i], v[:, first + i]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_from_the_written_pages_equals_attention_over_the_packed_prefix(
    implementation: str,
) -> None:
    rng = np.random.default_rng(1)
    items = pages(20, 7, 33)
    whole = SegmentLayout.single(100, items, 256)
    q, k, v = (jnp.asarray(rng.standard_normal((h, 256, 64)), jnp.float32) for h in (2, 1, 1))
    table = pages(5, 0, 3, 6, 2, 7, 1)
    plan = build_page_writes(whole, [table], page_size=16, num_pages=8)
    pool = jnp.full((8, 1, 2, 16, 64), jnp.nan)
    pool = write_kv_pages(pool, k, v, plan, implementation=implementation)
    blocks = BlockSizes(128, 128, 128)
    one = segment_paged_attention(q, k, v, None, whole, sm_scale=0.125, block_sizes=blocks)
    rest = [jnp.roll(x, -100, axis=1) for x in (q, k, v)]
    extend = SegmentLayout((Group(0, items, 100, table),), 256)
    two = segment_paged_attention(*rest, pool, extend, sm_scale=0.125, block_sizes=blocks)
    assert np.abs(two[:, :60] - one[:, 100:160]).max() <= KERNEL_REORDERED_FLOAT32


def test_the_pool_is_changed_in_place_when_donated() -> None:
    layout = SegmentLayout.single(32, [4], 48)
    plan = build_page_writes(layout, [pages(0, 1)], page_size=16, num_pages=4)
    pool, kv = jnp.zeros((4, 1, 2, 16, 64)), jnp.ones((1, 48, 64))
    run = jax.jit(write_kv_pages, donate_argnums=0)
    text = run.lower(pool, kv, kv, plan).compile().as_text()
    assert "input_output_alias" in text


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([pages(0)], r"page table 0 has 1 pages; 20 prefix tokens must have 2"),
        ([pages(0, 9)], r"page table 0 names page 9; it must lie below 4"),
        ([], r"must be the number of groups, 1"),
    ],
)
def test_wrong_tables_are_refused(tables: list[np.ndarray], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        build_page_writes(SegmentLayout.single(20, [3]), tables, page_size=16, num_pages=4)


def test_a_page_of_two_groups_is_refused() -> None:
    layout = SegmentLayout((Group(16, NO_ITEMS), Group(16, NO_ITEMS)), 32)
    with pytest.raises(LayoutError, match="page 2 is written by groups 0 and 1"):
        build_page_writes(layout, [pages(2), pages(2)], page_size=16, num_pages=4)


@pytest.mark.parametrize(
    ("tables", "copied", "message"),
    [
        ([pages(2, 2), pages(3)], [None, None], "page 2 is written by groups 0 and 0"),
        ([pages(0, 2), pages(1, 3)], [None, 0], "page 0 is copied, and written by group 0"),
    ],
)
def test_a_page_that_is_written_twice_or_copied_too_is_refused(
    tables: list[np.ndarray], copied: list[int | None], message: str
) -> None:
    second = Group(20 - 4, NO_ITEMS, 4, pages(1)) if copied[1] is not None else Group(16, NO_ITEMS)
    layout = SegmentLayout((Group(32, NO_ITEMS), second), 48)
    with pytest.raises(LayoutError, match=message):
        build_page_writes(layout, tables, page_size=16, num_pages=4, copied_pages=copied)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_copied_page_keeps_its_first_slots_beside_whole_pages(implementation: str) -> None:
    rng = np.random.default_rng(3)
    pool = jnp.asarray(rng.standard_normal((8, 2, 2, 16, 64)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((2, 64, 64)), jnp.float32) for _ in range(2))
    # two whole pages; then a prefix of which 5 tokens are those of page 6, and 14 are new
    layout = SegmentLayout((Group(32, NO_ITEMS), Group(14, NO_ITEMS, 5, pages(1))), 64)
    tables = [pages(0, 4), pages(1, 2)]
    plan = build_page_writes(
        layout, tables, page_size=16, num_pages=8, max_writes=6, copied_pages=[None, 6]
    )
    got = np.asarray(write_kv_pages(pool, k, v, plan, implementation=implementation))

    want, kv = np.asarray(pool).copy(), np.stack([k, v], 1)  # [heads, 2, tokens, dim]
    want[0], want[4] = kv[:, :, :16], kv[:, :, 16:32]
    want[1, :, :, :5], want[1, :, :, 5:] = want[6, :, :, :5], kv[:, :, 32:43]
    want[2, :, :, :3] = kv[:, :, 43:46]
    np.testing.assert_array_equal(got, want)


def test_shapes_that_do_not_fit_are_refused() -> None:
    plan = build_page_writes(SegmentLayout.single(5, []), [pages(0)], page_size=16, num_pages=4)
    k = jnp.zeros((2, 16, 64))
    with pytest.raises(ArgumentError, match="must end in"):
        write_kv_pages(jnp.zeros((4, 1, 2, 16, 64)), k, k, plan)
    with pytest.raises(ArgumentError, match="must be equal"):
        write_kv_pages(jnp.zeros((4, 2, 2, 16, 64), jnp.bfloat16), k, k, plan)
