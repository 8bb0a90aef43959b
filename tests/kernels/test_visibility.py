"""Who sees whom, without a tolerance."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from executions import Executions
from layouts import NUM_PAGES, drawn, edges
from oracle import attention, rows

from packscore_kernels import (
    PREFIX_SEGMENT,
    BlockSizes,
    Group,
    SegmentLayout,
    SegmentSchedule,
    build_schedule,
    segment_paged_attention,
)
from packscore_kernels.attention import kernel, launch
from packscore_kernels.attention.reference import visible
from packscore_kernels.attention.xla import dense_mask
from tolerances import KERNEL_FLOAT32, KERNEL_REORDERED_FLOAT32, KERNEL_SCORE_FLOAT32

BLOCKS = BlockSizes(128, 128, 256)
ONE_TILE = BlockSizes(384, 128, 384)  # with a triangle where a prefix is packed
KERNEL = "pallas_interpret"
LAYOUTS = {
    "P100-items": SegmentLayout.single(100, [20, 7, 140, 33, 1, 60], 384),
    "P0-items": SegmentLayout.single(0, [20, 200, 33], 384),
    "groups": SegmentLayout(
        (
            Group(30, np.array([20, 90], np.int32), 20, np.array([5, 2], np.int32)),
            Group(60, np.array([50, 9], np.int32), 17, np.array([7, 0], np.int32)),
        ),
        384,
    ),
}


CASES = [
    *itertools.product(LAYOUTS, ["xla", "dense", KERNEL], [BLOCKS]),
    *itertools.product(["P100-items"], ["xla", KERNEL], [ONE_TILE]),
]


@pytest.mark.parametrize(
    ("name", "implementation", "blocks"), CASES, ids=[f"{n}-{i}-q{b.block_q}" for n, i, b in CASES]
)
def test_a_row_changes_exactly_when_a_key_it_sees_does(
    name: str, implementation: str, blocks: BlockSizes
) -> None:
    layout, rng = LAYOUTS[name], np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 384, 64)), jnp.float32) for _ in range(3))
    paged = any(group.cached_len for group in layout.groups)
    pages = jnp.asarray(rng.standard_normal((8, 1, 2, 16, 64)), jnp.float32) if paged else None
    schedule = build_schedule(layout, block_sizes=blocks, page_size=16 if paged else 0)
    run = jax.jit(
        lambda q, k, v, pages: segment_paged_attention(
            q, k, v, pages, schedule, sm_scale=0.125, implementation=implementation
        )
    )
    seen = np.zeros((384, 384), bool)
    for row, _, keys in rows(layout):
        seen[row, keys] = True
    before = np.asarray(run(q, k, v, pages))
    real = np.arange(384) < layout.num_real_tokens
    for token in [0, 29, 30, 99, 100, 119, 120, 127, 128, 200, 255, 256, 259, 383]:
        after = np.asarray(run(q, k.at[:, token].add(1.0), v.at[:, token].add(1.0), pages))
        changed = (after != before).any(axis=(0, 2))
        np.testing.assert_array_equal(changed, seen[:, token] & real, err_msg=f"{token=}")
    if paged:
        for page, slot, group in (
            (5, 0, 0),
            (2, 3, 0),
            (2, 4, None),
            (0, 0, 1),
            (0, 1, None),
            (1, 0, None),
        ):
            after = np.asarray(run(q, k, v, pages.at[page, :, :, slot].add(1.0)))
            changed = (after != before).any(axis=(0, 2))
            np.testing.assert_array_equal(changed, (layout.group_ids == group) & real)


def test_plain_causal_attention_would_fail_this() -> None:
    layout = LAYOUTS["P100-items"]
    causal = np.tril(np.ones((384, 384), bool))
    assert not np.array_equal(np.asarray(visible(layout)), causal)
    assert causal[130, 110]
    assert not np.asarray(visible(layout))[130, 110]


@pytest.mark.parametrize(
    ("implementation", "blocks"),
    [
        ("xla", BLOCKS), ("dense", BLOCKS), ("reference", BLOCKS), (KERNEL, BLOCKS),
        pytest.param(KERNEL, ONE_TILE, marks=pytest.mark.long),
    ],
    ids=["xla", "dense", "reference", KERNEL, f"{KERNEL}-one-tile"],
)  # fmt: skip
def test_nan_in_one_item_reaches_nobody_else(implementation: str, blocks: BlockSizes) -> None:
    layout = LAYOUTS["P100-items"]
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 384, 64)), jnp.float32) for _ in range(3))

    def run(k: jax.Array, v: jax.Array) -> np.ndarray:
        out = segment_paged_attention(
            q, k, v, None, layout, sm_scale=0.125, block_sizes=blocks, implementation=implementation
        )
        return np.asarray(out)

    clean = run(k, v)
    item = slice(127, 267)  # the item of 140 tokens, across two block edges
    for bad_k, bad_v in ((jnp.nan, 0.0), (0.0, jnp.nan), (jnp.nan, jnp.nan)):
        out = run(k.at[:, item].add(bad_k), v.at[:, item].add(bad_v))
        others = np.r_[0:127, 267:384]
        # the kernel does the tiles of the item again, with an online maximum
        assert np.abs(out[:, others] - clean[:, others]).max() <= KERNEL_REORDERED_FLOAT32
        assert np.isnan(out[:, item]).any(axis=2).all()


@pytest.fixture(params=[True, False], ids=["sums-by-products", "masked"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chips whose last pieces sum by the matrix unit, and those that mask."""
    monkeypatch.setattr(launch, "deep_passes", lambda: request.param)


def stale(paged: bool) -> SegmentLayout:
    """A prefix that ends within a block, in pages or packed, with items."""
    pages = np.array([5, 2, 7], np.int32) if paged else np.zeros(0, np.int32)
    group = Group(0 if paged else 100, np.array([20] * 10, np.int32), 37 if paged else 0, pages)
    return SegmentLayout((group,), 384)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("paged", [True, False], ids=["pages", "packed"])
def test_nothing_of_what_lies_behind_a_prefix_is_read(paged: bool) -> None:
    # Stale slots of a page and unused pages; the first item, in the block that the prefix ends in,
    # for the tile that reads this block and no other key of the item.
    layout = stale(paged)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 384, 64)), jnp.float32) for _ in range(3))
    pages = jnp.asarray(rng.standard_normal((8, 1, 2, 16, 64)), jnp.float32) if paged else None

    def run(k: jax.Array, v: jax.Array, pages: jax.Array | None) -> np.ndarray:
        out = segment_paged_attention(
            q, k, v, pages, layout, sm_scale=0.125, block_sizes=BLOCKS, implementation=KERNEL
        )
        return np.asarray(out)[:, 0 if paged else 256 :]

    clean = run(k, v, pages)
    if pages is None:
        k, v = (x.at[:, 100:120].set(jnp.nan) for x in (k, v))
    else:
        pages = pages.at[7, :, :, 37 % 16 :].set(jnp.nan)
        pages = pages.at[jnp.array([0, 1, 3, 4, 6])].set(jnp.nan)
    np.testing.assert_array_equal(run(k, v, pages), clean)


@pytest.mark.parametrize(
    ("paged", "blocks"), [(True, BLOCKS), (False, ONE_TILE)], ids=["pages", "triangle"]
)
def test_scores_far_below_zero_are_no_reason_to_do_a_tile_again(
    paged: bool, blocks: BlockSizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A key in the place of dead ones that is zero would weigh 2 ** 300 here.
    layout = stale(paged)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 384, 64)), jnp.float32) for _ in range(3))
    pages = jnp.asarray(rng.standard_normal((8, 1, 2, 16, 64)), jnp.float32) if paged else None
    q, k = q.at[:, :, 0].set(1.0), k.at[:, :, 0].set(-300.0 / 0.125)
    if pages is not None:
        pages = pages.at[:, :, 0, :, 0].set(-300.0 / 0.125)
    redone = Executions(monkeypatch, "_redo", kernel)
    got = segment_paged_attention(
        q, k, v, pages, layout, sm_scale=0.125, block_sizes=blocks, implementation=KERNEL
    )
    error = np.abs(np.asarray(got) - attention(q, k, v, layout, 0.125, pages)).max()
    assert error <= KERNEL_FLOAT32 + KERNEL_SCORE_FLOAT32 * 300.0
    assert not sum(redone.take())


def loop_mask(layout: SegmentLayout, schedule: SegmentSchedule) -> np.ndarray:
    """The mask by a loop over tokens."""
    entries = len(schedule.page_indices) * schedule.page_size
    mask = np.zeros((layout.num_tokens, entries + layout.num_tokens), bool)
    entry = 0
    starts = {}
    for g, group in enumerate(layout.groups):
        starts[g] = entry * schedule.page_size
        entry += len(group.page_indices)
    groups = {id(group): g for g, group in enumerate(layout.groups)}
    for row, group, keys in rows(layout):
        first = starts[groups[id(group)]]
        mask[row, first : first + group.cached_len] = True
        mask[row, [entries + key for key in keys]] = True
    return mask


@pytest.mark.parametrize("block_q", [128, 256])
def test_the_metadata_rebuilds_the_mask(block_q: int) -> None:
    blocks = BlockSizes(block_q, 128, 256)
    layouts = [layout for _, layout in edges(16)] + [drawn(seed, 16) for seed in range(40)]
    for layout in layouts:
        schedule = build_schedule(layout, block_sizes=blocks, page_size=16, num_pages=NUM_PAGES)
        np.testing.assert_array_equal(dense_mask(schedule), loop_mask(layout, schedule))


@pytest.mark.parametrize(
    ("prefix", "token_pos", "num_kv"),
    [(17, [*range(17), *range(19), 0], 54), (17, [*range(79), 0], 97)],
    ids=["items-17-19", "item-79"],
)
@pytest.mark.parametrize("packed", [True, False])
def test_flashinfer_s_multi_item_rule(
    prefix: int, token_pos: list[int], num_kv: int, packed: bool
) -> None:
    # FlashInfer: a token at position p of its item sees the prefix and the last p + 1 keys.
    num_q = len(token_pos)
    assert prefix + num_q == num_kv
    want = np.zeros((num_q, num_kv), bool)
    for row, position in enumerate(token_pos):
        want[row, :prefix] = True
        want[row, prefix + row - position : prefix + row + 1] = True
    starts = [i for i, position in enumerate(token_pos) if position == 0] + [num_q]
    lens = np.diff(starts).astype(np.int32)
    if packed:
        layout = SegmentLayout.single(prefix, lens)
        got = np.asarray(visible(layout))[prefix:]
        assert (layout.segment_ids[:prefix] == PREFIX_SEGMENT).all()
    else:
        layout = SegmentLayout((Group(0, lens, prefix, np.array([3, 1], np.int32)),), num_q)
        schedule = build_schedule(layout, block_sizes=BLOCKS, page_size=16)
        got = np.asarray(dense_mask(schedule))[:, np.r_[:prefix, 32 : 32 + num_q]]
    np.testing.assert_array_equal(got, want)
