"""Dtypes, head sizes, GQA ratios, tiles, pages, and scores that break the fixed reference."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call, race_detection_state
from jax.experimental.pallas import tpu as pltpu
from layouts import drawn, group
from oracle import attention

from packscore_kernels import BlockSizes, SegmentLayout, build_schedule, segment_paged_attention
from packscore_kernels.attention import launch
from packscore_kernels.attention.launch import segment_attention_pallas
from tolerances import KERNEL_FLOAT32, KERNEL_SCORE_FLOAT32, assert_close

IMPLEMENTATIONS = ["dense", "xla", "pallas_interpret"]


def draw(seed: int, *shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


SHAPES = [
    ("float32", (1, 1), 128, 16, BlockSizes(128, 128, 128, 2)),
    ("bfloat16", (2, 2), 128, 32, BlockSizes(128, 128, 256, 3)),
    ("bfloat16", (6, 2), 64, 64, BlockSizes(256, 128, 128, 2)),
    ("float32", (4, 1), 256, 128, BlockSizes(128, 256, 256, 2)),
    ("bfloat16", (8, 1), 128, 256, BlockSizes(256, 256, 512, 2)),
    ("float32", (2, 1), 64, 16, BlockSizes(512, 128, 512, 6)),
]
# by default the kernel takes every shape, and each of the others two of both dtypes
CHOSEN = {
    "pallas_interpret": range(len(SHAPES)),
    "dense": (0, 4),
    "xla": (1, 3),
    "reference": (2, 5),
}


@pytest.mark.parametrize(
    ("implementation", "dtype", "heads", "head_dim", "page", "blocks"),
    [
        pytest.param(
            *(implementation, *shape),
            id=f"{'-'.join(map(str, shape[:4]))}-q{shape[4].block_q}-kv{shape[4].block_kv}-"
            f"{implementation}",
            marks=() if k in chosen else pytest.mark.long,
        )
        for implementation, chosen in CHOSEN.items()
        for k, shape in enumerate(SHAPES)
    ],
)
def test_shapes(
    implementation: str,
    dtype: str,
    heads: tuple[int, int],
    head_dim: int,
    page: int,
    blocks: BlockSizes,
) -> None:
    free = np.random.default_rng(0).permutation(24).tolist()
    cached = 3 * page // 2
    layout = SegmentLayout(
        (
            group(70, [20, 33, 0, 150], cached, page, free),
            group(5, [30, 31], 0, page, free),
        ),
        512,
    )
    q, k, v = (
        draw(i, h, 512, head_dim, dtype=dtype) for i, h in enumerate((heads[0],) + heads[1:] * 2)
    )
    pages = draw(3, 24, heads[1], 2, page, head_dim, dtype=dtype)
    scale = head_dim**-0.5
    got = segment_paged_attention(
        q, k, v, pages, layout, sm_scale=scale, block_sizes=blocks, implementation=implementation
    )
    assert got.dtype == q.dtype
    want = attention(
        *(x.astype(jnp.float32) for x in (q, k, v)), layout, scale, pages.astype(jnp.float32)
    )
    assert_close(got.astype(jnp.float32), want, dtype)


@pytest.mark.parametrize("implementation", ["dense", "reference"])
@pytest.mark.parametrize(("soft_cap", "window"), [(1.5, None), (None, 9), (2.0, 31), (None, 400)])
def test_caps_and_windows_where_there_is_a_mask(
    implementation: str, soft_cap: float | None, window: int | None
) -> None:
    free = np.random.default_rng(0).permutation(24).tolist()
    groups = group(70, [20, 33, 0, 150], 40, 16, free), group(5, [30, 31], 9, 16, free)
    layout = SegmentLayout((*groups, group(0, [3, 40])), 512)
    q, k, v = (draw(i, h, 512, 64) for i, h in enumerate((4, 2, 2)))
    pages = draw(3, 24, 2, 2, 16, 64)
    options: dict[str, Any] = {"soft_cap": soft_cap, "sliding_window": window}
    got = segment_paged_attention(
        q, k, v, pages, layout, sm_scale=0.25, implementation=implementation, **options
    )
    assert_close(got, attention(q, k, v, layout, 0.25, pages, **options), "float32")


@pytest.mark.parametrize("num_tokens", [1, 129, 300])
def test_a_bucket_that_is_no_multiple_of_a_block(num_tokens: int) -> None:
    layout = SegmentLayout.single(num_tokens // 2, [num_tokens // 4], num_tokens)
    q, k, v = (draw(i, 1, num_tokens, 64) for i in range(3))
    want = attention(q, k, v, layout, 0.125)
    for implementation in IMPLEMENTATIONS:
        got = segment_paged_attention(
            q, k, v, None, layout, sm_scale=0.125, block_sizes=BlockSizes(256, 256, 256),
            implementation=implementation,
        )  # fmt: skip
        assert_close(got, want, "float32")


# the last pieces sum by products, or mask
@pytest.mark.parametrize(("block_q", "deep"), [(384, True), (384, False), (1152, True)])
def test_tiles_whose_rows_are_cut_into_pieces_of_two_sizes(
    block_q: int, deep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "deep_passes", lambda: deep)
    # 3 or 5 q heads a kv head, or a bucket of 640 tokens, get such tiles. The first is the
    # prefix's, the second begins with window and whole blocks in one, the third has a long item.
    num_tokens = 3 * block_q
    items = [20] * ((2 * block_q - 300) // 20) + [300]
    layout = SegmentLayout.single(300, items, num_tokens)
    q, k, v = (draw(i, 1, num_tokens, 64) for i in range(3))
    got = segment_paged_attention(
        q, k, v, None, layout, sm_scale=0.125, block_sizes=BlockSizes(block_q, 128, 512),
        implementation="pallas_interpret",
    )  # fmt: skip
    assert_close(got, attention(q, k, v, layout, 0.125), "float32")


GROWING = SegmentLayout.single(256, [20] * 6 + [130], 512)
SMALL = BlockSizes(128, 128, 256)


@functools.cache
def growing(sm_scale: float, blocks: BlockSizes = SMALL) -> Callable[..., jax.Array]:
    schedule = build_schedule(GROWING, block_sizes=blocks)
    return jax.jit(
        lambda q, k, v: segment_paged_attention(
            q, k, v, None, schedule, sm_scale=sm_scale, implementation="pallas_interpret"
        )
    )


HEIGHTS = [
    *itertools.product([10.0, 60.0, 200.0, 3000.0], [SMALL]),
    (3000.0, BlockSizes(384, 128, 384)),  # a tile that began with a triangle is done again
]


@pytest.mark.parametrize(
    ("height", "blocks"), HEIGHTS, ids=[f"{height}-q{b.block_q}" for height, b in HEIGHTS]
)
@pytest.mark.parametrize("where", ["first", "last", "growing", "falling"])
def test_scores_far_above_the_window_s_own(height: float, blocks: BlockSizes, where: str) -> None:
    # Keys of the prefix score `height` above the rows' own: the fixed reference must not overflow.
    q, k, v = (draw(i, 1, 512, 64) for i in range(3))
    q = q.at[:, :, 0].set(1.0)
    lift = np.zeros(512, np.float32)
    lift[:256] = {
        "first": np.where(np.arange(256) < 3, height, 0),
        "last": np.where(np.arange(256) > 252, height, 0),
        "growing": np.linspace(0, height, 256),
        "falling": np.linspace(height, 0, 256),
    }[where]
    k = k.at[:, :, 0].set(lift)
    error = np.abs(
        np.asarray(growing(1.0, blocks)(q, k, v)) - attention(q, k, v, GROWING, 1.0)
    ).max()
    assert error <= KERNEL_FLOAT32 + KERNEL_SCORE_FLOAT32 * height, error


# The sums over keys are divided at the end: values may go to the type's end / number of keys.
@pytest.mark.parametrize("size", [1e10, 1e25, 1e35])
def test_values_near_the_end_of_the_range(size: float) -> None:
    q, k, v = (draw(i, 1, 512, 64) for i in range(3))
    k = k.at[:, 5].set(k[:, 5] + 30.0 * q[:, 300])
    want = attention(q, k, v, GROWING, 0.125)
    got = growing(0.125)(q, k, v * size)
    assert_close(np.asarray(got, np.float64) / size, want, "float32")


def test_the_simulator_finds_no_race() -> None:
    layout = drawn(3, 16)
    blocks = BlockSizes(128, 128, 128, 2)
    q, k, v = (draw(i, 2, 512, 64) for i in range(3))
    pages = draw(3, 64, 2, 2, 16, 64)
    schedule = build_schedule(layout, block_sizes=blocks, page_size=16)
    segment_attention_pallas(
        q, k, v, pages, schedule, sm_scale=0.125, interpret=pltpu.InterpretParams(detect_races=True)
    ).block_until_ready()
    assert race_detection_state is not None
    assert not interpret_pallas_call.races.races_found
