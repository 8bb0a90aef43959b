"""Who sees whom, without a tolerance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import NUM_PAGES, drawn, edges
from oracle import rows

from packscore_kernels import (
    PREFIX_SEGMENT,
    BlockSizes,
    Group,
    SegmentLayout,
    SegmentSchedule,
    build_schedule,
    segment_paged_attention,
)
from packscore_kernels.attention.reference import visible
from packscore_kernels.attention.xla import dense_mask
from tolerances import KERNEL_REORDERED_FLOAT32

BLOCKS = BlockSizes(128, 128, 256)
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


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("implementation", ["xla", "dense", "pallas_interpret"])
def test_a_row_changes_exactly_when_a_key_it_sees_does(
    layout: SegmentLayout, implementation: str
) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 384, 64)), jnp.float32) for _ in range(3))
    paged = any(group.cached_len for group in layout.groups)
    pages = jnp.asarray(rng.standard_normal((8, 1, 2, 16, 64)), jnp.float32) if paged else None
    schedule = build_schedule(layout, block_sizes=BLOCKS, page_size=16 if paged else 0)
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


@pytest.mark.parametrize("implementation", ["xla", "dense", "reference", "pallas_interpret"])
def test_nan_in_one_item_reaches_nobody_else(implementation: str) -> None:
    layout = LAYOUTS["P100-items"]
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 384, 64)), jnp.float32) for _ in range(3))

    def run(k: jax.Array, v: jax.Array) -> np.ndarray:
        out = segment_paged_attention(
            q, k, v, None, layout, sm_scale=0.125, block_sizes=BLOCKS, implementation=implementation
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
