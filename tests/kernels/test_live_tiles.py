"""The number of token tiles as data: one program, and rows behind the last live tile untouched."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import NUM_PAGES
from oracle import attention

from packscore_kernels import (
    BlockSizes,
    Group,
    LiveTokens,
    SegmentLayout,
    build_schedule,
    gated_mlp,
    project_out,
    project_qkv,
    segment_paged_attention,
)
from packscore_kernels.layer import projections
from packscore_kernels.layer.walks import Walk
from tolerances import assert_close

TILE, CAPACITY, HIDDEN, HEADS = 128, 512, 128, 2
RNG = np.random.default_rng(0)
COUNTS = (1, 127, 128, 129, 384, 512)


def draw(*size: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(size) * 0.1, jnp.float32)


QKV = tuple(draw(1, n * 128, HIDDEN) for n in (HEADS, 1, 1))
NORMS, ROTARY = (draw(128), draw(128)), (draw(CAPACITY, 128), draw(CAPACITY, 128))
OUT, MLP = draw(1, HIDDEN, HEADS * 128), (draw(1, 256, HIDDEN), draw(1, 256, HIDDEN))
DOWN, NORM = draw(1, HIDDEN, 256), draw(HIDDEN)


def qkv(x: jax.Array, live: LiveTokens | None) -> Any:
    options: Any = {"eps": 1e-6, "implementation": "pallas_interpret", "live": live}
    return project_qkv(x, NORM, QKV, NORMS, ROTARY, 0, **options)


def out(x: jax.Array, live: LiveTokens | None) -> Any:
    attended = jnp.stack([x, 2 * x])
    return project_out(attended, OUT, x, 0, implementation="pallas_interpret", live=live)


def mlp(x: jax.Array, live: LiveTokens | None) -> Any:
    options: Any = {"eps": 1e-6, "implementation": "pallas_interpret", "live": live}
    return gated_mlp(x, NORM, (*MLP, DOWN), 0, **options)


# weights that are held, and such as pass by
@pytest.mark.parametrize(
    ("kernel", "walk"),
    [
        *((kernel, None) for kernel in (qkv, out, mlp)),
        pytest.param(qkv, ("qkv_walk", Walk(TILE, 1, True)), id="qkv-passing"),
        pytest.param(out, ("out_walk", Walk(TILE, 64, True)), id="out-passing"),
    ],
)
def test_tiles_of_tokens_are_data(
    kernel: Any, walk: tuple[str, Walk] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What memory nobody wrote holds is NaN where a kernel is interpreted."""
    if walk:
        monkeypatch.setattr(projections, walk[0], lambda *_: walk[1])
    x = draw(CAPACITY, HIDDEN)
    run = jax.jit(lambda x, count: kernel(x, LiveTokens(count, TILE)))
    whole = [np.asarray(part) for part in jax.tree.leaves(kernel(x, None))]
    for count in COUNTS:
        end = -(-count // TILE) * TILE
        poisoned = x.at[end:].set(jnp.nan)
        for part, want in zip(jax.tree.leaves(run(poisoned, count)), whole, strict=True):
            found = np.asarray(part)
            rows = (..., slice(end), slice(None))
            np.testing.assert_allclose(found[rows], want[rows], rtol=1e-5, atol=1e-6)
            assert np.isnan(found[..., end:, :]).all()
    assert run._cache_size() == 1


def test_tiles_of_attention_are_data() -> None:
    """What stands behind the last live tile of queries, keys and values is NaN."""
    pages = np.array([3, 1, 6], np.int32)
    layouts = [
        SegmentLayout.single(1, [], CAPACITY),
        SegmentLayout.single(100, [20, 30], CAPACITY),
        SegmentLayout((Group(0, np.full(20, 18, np.int32), 41, pages),), CAPACITY),
        SegmentLayout.single(400, [50, 62], CAPACITY),
    ]
    q, k, v = draw(HEADS, CAPACITY, 128), draw(1, CAPACITY, 128), draw(1, CAPACITY, 128)
    pool, block_q = draw(NUM_PAGES, 1, 2, 16, 128), 256

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, schedule: Any) -> jax.Array:
        options: Any = {"implementation": "pallas_interpret", "live_tiles_only": True}
        return segment_paged_attention(q, k, v, pool, schedule, sm_scale=0.1, **options)

    for layout in layouts:
        schedule = build_schedule(
            layout,
            block_sizes=BlockSizes(block_q, 128, 256, 3),
            page_size=16,
            max_groups=1,
            max_pages=4,
        )
        count = layout.num_real_tokens
        written, end = -(-count // TILE) * TILE, -(-count // block_q) * block_q
        poisoned = (x.at[:, written:].set(jnp.nan) for x in (q, k, v))
        found = np.asarray(run(*poisoned, schedule))
        want = attention(q, k, v, layout, 0.1, pool)
        assert_close(found[:, :end], want[:, :end], "float32")
        assert np.isnan(found[:, end:]).all()
    assert run._cache_size() == 1
