"""Every implementation against the float64 oracle, on layouts that are data to one program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import MAX_GROUPS, MAX_PAGES, NUM_PAGES, TOKENS, drawn, edges
from oracle import attention

from packscore_kernels import (
    BlockSizes,
    SegmentLayout,
    SegmentSchedule,
    build_schedule,
    segment_paged_attention,
)
from packscore_kernels.row_attention.api import segment_attention_rows
from packscore_kernels.row_attention.blocks import Blocks, Seen
from tolerances import assert_close

BLOCKS = BlockSizes(block_q=256, block_kv=128, chunk_kv=256, num_slots=2)
D = 64
SCALE = D**-0.5
# a quarter of the drawn layouts by default
DRAWN = [
    pytest.param(range(first, 160, 4), id=f"seeds-{first}-mod-4", marks=marks)
    for first, marks in ((0, ()), *((k, pytest.mark.long) for k in (1, 2, 3)))
]


def arrays(
    rng: np.random.Generator,
    dtype: jnp.dtype,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_tokens: int,
    page_size: int,
) -> tuple[jax.Array, ...]:
    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q = draw(num_q_heads, num_tokens, head_dim)
    k, v = (draw(num_kv_heads, num_tokens, head_dim) for _ in range(2))
    return q, k, v, draw(NUM_PAGES, num_kv_heads, 2, page_size, head_dim)


def poisoned(
    layout: SegmentLayout, k: jax.Array, v: jax.Array, pages: jax.Array, page_size: int
) -> tuple[jax.Array, ...]:
    """NaN wherever nobody may look: padding, unused pages, the rest of partly filled pages."""
    real = (np.arange(k.shape[1]) < layout.num_real_tokens)[:, None]
    used = np.zeros((NUM_PAGES, page_size), bool)
    for one in layout.groups:
        index = np.arange(one.cached_len)
        if one.cached_len:
            used[one.page_indices[index // page_size], index % page_size] = True
    used = used[:, None, None, :, None]
    return jnp.where(real, k, jnp.nan), jnp.where(real, v, jnp.nan), jnp.where(used, pages, jnp.nan)


@functools.cache
def program(implementation: str, num_q_heads: int) -> Callable[..., jax.Array]:
    def op(
        q: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, schedule: SegmentSchedule
    ) -> jax.Array:
        return segment_paged_attention(
            q, k, v, pages, schedule, sm_scale=SCALE, implementation=implementation
        )

    return jax.jit(op)


def schedule_of(
    layout: SegmentLayout,
    page_size: int,
    blocks: BlockSizes = BLOCKS,
    max_groups: int = MAX_GROUPS,
    max_pages: int = MAX_PAGES,
) -> SegmentSchedule:
    return build_schedule(
        layout,
        block_sizes=blocks,
        page_size=page_size,
        num_pages=NUM_PAGES,
        max_groups=max_groups,
        max_pages=max_pages,
    )


def check(
    layouts: Iterable[tuple[str, SegmentLayout]],
    implementation: str,
    page_size: int,
    num_q_heads: int,
) -> int:
    rng = np.random.default_rng(1)
    q, k, v, pages = arrays(rng, jnp.float32, num_q_heads, 1, D, TOKENS, page_size)
    run = program(implementation, num_q_heads)
    count = 0
    for name, layout in layouts:
        bad_k, bad_v, bad_pages = poisoned(layout, k, v, pages, page_size)
        got = run(q, bad_k, bad_v, bad_pages, schedule_of(layout, page_size))
        if name not in WANT:  # the same for all implementations
            WANT[name] = attention(q, k, v, layout, SCALE, pages)
        try:
            assert_close(got, WANT[name], "float32")
        except AssertionError as error:
            raise AssertionError(f"{implementation} on {name}: {error}") from error
        count += 1
    assert run._cache_size() == 1  # the layout is data
    return count


@pytest.mark.parametrize(
    ("implementation", "page_size"), [("xla", 16), ("pallas_interpret", 16), ("xla", 128)]
)
def test_rows_alone(implementation: Any, page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows in any order, those of padding among them, see what they see among all."""
    own = Blocks.of
    # small ones, so that there are many
    monkeypatch.setattr(Blocks, "of", lambda *sizes: own(*sizes[:2], 128))
    rng = np.random.default_rng(1)
    q, k, v, pages = arrays(rng, jnp.float32, 4, 2, D, TOKENS, page_size)
    run = jax.jit(
        functools.partial(segment_attention_rows, sm_scale=SCALE, implementation=implementation)
    )
    for layout in (drawn(seed, page_size) for seed in range(0, 160, 20)):
        bad_k, bad_v, bad_pages = poisoned(layout, k, v, pages, page_size)
        rows = rng.permutation(TOKENS)[:150]
        schedule = schedule_of(layout, page_size)
        got = run(q[:, rows], bad_k, bad_v, bad_pages, schedule, jnp.asarray(rows))
        assert_close(got, attention(q, k, v, layout, SCALE, pages)[:, rows], "float32")
    assert run._cache_size() == 1  # rows and layout are data


@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
def test_rows_that_see_a_value_that_is_not_finite_are_nan_alone(implementation: Any) -> None:
    rng = np.random.default_rng(2)
    q, k, v, _ = arrays(rng, jnp.float32, 2, 1, D, 256, 16)
    layout = SegmentLayout.single(30, [7, 9, 8], num_tokens=256)
    schedule = build_schedule(layout, block_sizes=BLOCKS)
    rows = jnp.asarray([36, 45, 41, 53])  # ends of the items, and the middle of the second
    values = v.at[0, 43, 5].set(jnp.inf)
    run = jax.jit(
        functools.partial(segment_attention_rows, sm_scale=SCALE, implementation=implementation)
    )
    got = run(q[:, rows], k, values, None, schedule, rows)
    assert np.isnan(got).any(axis=(0, 2)).tolist() == [False, True, False, False]
    assert_close(got[:, ::2], attention(q, k, v, layout, SCALE)[:, rows[::2]], "float32")


def test_rows_meet_the_blocks_that_they_see() -> None:
    """A prefix of 1 000 tokens and 25 items of 40: all of one block, and some of the others."""
    layout = SegmentLayout.single(1000, [40] * 25, num_tokens=2048)
    schedule = build_schedule(layout, block_sizes=BLOCKS, page_size=0)
    blocks = Blocks.of(schedule, has_pages=False)

    @jax.jit
    def of(rows: jax.Array) -> jax.Array:
        return blocks.met(Seen.of(schedule, rows))

    def met(rows: Any) -> list[int]:
        found: list[int] = of(jnp.asarray(np.resize(rows, 25))).tolist()
        return found

    assert met(layout.scored_rows) == [2, 1, 1, 1]
    assert met(layout.scored_rows[:5]) == [2, 1, 1, 0]
    assert met([500]) == [1, 0, 0, 0]
    assert met([2047]) == [0, 0, 0, 0]  # padding


WANT: dict[str, np.ndarray] = {}


@pytest.mark.parametrize("implementation", ["dense", "xla", "pallas_interpret"])
def test_boundaries_on_every_side_of_a_block_edge(implementation: str) -> None:
    assert check(edges(16), implementation, 16, num_q_heads=1) >= 143


@pytest.mark.parametrize("implementation", ["dense", "xla", "pallas_interpret"])
@pytest.mark.parametrize("seeds", DRAWN)
def test_drawn_layouts_of_several_groups(seeds: range, implementation: str) -> None:
    layouts = [(f"seed {seed}", drawn(seed, 16)) for seed in seeds]
    assert check(layouts, implementation, 16, num_q_heads=2) == len(seeds)
