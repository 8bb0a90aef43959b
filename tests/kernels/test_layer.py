"""The fused projections and MLP give what their parts give one after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from packscore_kernels import (
    ArgumentError,
    can_gate,
    can_project,
    gated_mlp,
    project_kv,
    project_out,
    project_qkv,
)
from packscore_kernels.layer import mlp, tiles
from packscore_kernels.layer.projections import HEADS
from tolerances import PROJECT_OUT_BFLOAT16, PROJECT_OUT_FLOAT32, assert_rows_close

EPS = 1e-6
LAYER = 1  # of two: nobody may look at the other's weights
# (num_tokens, hidden_size, num_q_heads, num_kv_heads): a partial tile, a pass of few heads, one kv
# head, more heads than a pass takes
SHAPES = [(128, 128, 2, 1), (130, 256, 3, 3), (700, 128, HEADS + 2, 2), (16, 384, 2 * HEADS, HEADS)]


def stack(weight: jax.Array) -> jax.Array:
    return jnp.stack([jnp.full_like(weight, jnp.nan), weight])


def arrays(shape: tuple[int, int, int, int], dtype: str) -> tuple[jax.Array, ...]:
    num_tokens, hidden, num_q_heads, num_kv_heads = shape
    rng = np.random.default_rng(0)

    def draw(*size: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.standard_normal(size) * scale, dtype)

    positions = rng.integers(0, 5000, num_tokens)
    angles = positions[:, None] / 1e6 ** (np.arange(64) / 64)
    angles = np.concatenate([angles, angles], 1)
    weights = tuple(
        stack(draw(n * 128, hidden, scale=hidden**-0.5))
        for n in (num_q_heads, num_kv_heads, num_kv_heads)
    )
    norms = draw(128), draw(128)
    rotary = jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)
    return draw(num_tokens, hidden, scale=3.0), draw(hidden), weights, norms, rotary


def by_hand(
    x: jax.Array, x_norm: jax.Array, weights: tuple, norms: tuple, rotary: tuple
) -> list[np.ndarray]:
    """In float64, head by head, as Qwen3's modules say it."""

    def f64(value: jax.Array) -> np.ndarray:
        return np.asarray(value.astype(jnp.float32), np.float64)

    def norm(value: np.ndarray, weight: jax.Array) -> np.ndarray:
        return value / np.sqrt((value**2).mean(-1, keepdims=True) + EPS) * f64(weight)

    rows, (cos, sin), out = norm(f64(x), x_norm), map(f64, rotary), []
    for weight, own in zip(weights, (*norms, None), strict=True):
        heads = []
        for head in np.split(f64(weight[LAYER]), weight.shape[1] // 128):
            value = rows @ head.T
            if own is not None:
                value = norm(value, own)
                turned = np.concatenate([-value[:, 64:], value[:, :64]], 1)
                value = value * cos + turned * sin
            heads.append(value)
        out.append(np.stack(heads))
    return out


@pytest.mark.parametrize("implementation", ["pallas_interpret", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qkv(shape: tuple[int, int, int, int], dtype: str, implementation: str) -> None:
    given = arrays(shape, dtype)
    found = project_qkv(*given, LAYER, eps=EPS, implementation=implementation)
    for got, want in zip(found, by_hand(*given), strict=True):
        assert got.shape == want.shape
        assert got.dtype == dtype
        assert_rows_close(got, want, dtype)
    x, x_norm, weights, norms, rotary = given
    alone = project_kv(
        x, x_norm, weights[1:], norms[1], rotary, LAYER, eps=EPS, implementation=implementation
    )
    for got, same in zip(alone, found[1:], strict=True):
        assert np.array_equal(got, same)


@pytest.mark.parametrize("implementation", ["pallas_interpret", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_tokens", [16, 520])
def test_out(num_tokens: int, dtype: str, implementation: str) -> None:
    rng = np.random.default_rng(1)
    attended, weight, x = (
        jnp.asarray(rng.standard_normal(size), dtype)
        for size in ((3, num_tokens, 128), (256, 384), (num_tokens, 256))
    )
    found = project_out(attended, stack(weight), x, LAYER, implementation=implementation)
    a, w, r = (np.asarray(value.astype(jnp.float32), np.float64) for value in (attended, weight, x))
    want = r + np.concatenate(list(a), 1) @ w.T
    bound = PROJECT_OUT_FLOAT32 if dtype == "float32" else PROJECT_OUT_BFLOAT16 * np.abs(want).max()
    assert np.abs(np.asarray(found, np.float64) - want).max() <= bound


def test_heads_that_do_not_fit() -> None:
    x, x_norm, weights, _, _ = arrays(SHAPES[0], "float32")
    half = jnp.ones(64), jnp.ones(64)
    rotary = jnp.ones((128, 64)), jnp.ones((128, 64))
    with pytest.raises(ArgumentError, match=r"head_dim=64 must be 128 and hidden_size=128 a multi"):
        project_qkv(x, x_norm, weights, half, rotary, 0, eps=EPS, implementation="pallas_interpret")
    wide = jax.ShapeDtypeStruct((1, 16_384, 128 * 128), jnp.float32)
    with pytest.raises(ArgumentError, match="hidden_size=16384 times num_heads=128 is more"):
        jax.eval_shape(lambda weight: project_out(jnp.zeros((128, 16, 128)), weight, x, 0), wide)
    assert can_project(16, 8, 128, 1024, 2)
    assert not can_project(16, 8, 64, 1024, 2)
    assert not can_project(128, 128, 128, 16_384, 2)


def mlp_arrays(num_tokens: int, hidden: int, width: int, dtype: str) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(2)

    def draw(*size: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.standard_normal(size) * scale, dtype)

    gate, up = (draw(width, hidden, scale=2 * hidden**-0.5) for _ in range(2))
    return draw(num_tokens, hidden), draw(hidden), (gate, up, draw(hidden, width, scale=0.05))


# one tile, a partial one; one chunk, three of one step, two of two: (tokens, width, its chunk)
@pytest.mark.parametrize("implementation", ["pallas_interpret", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("num_tokens", "width", "chunk"),
    [(16, 256, 256), (530, 1024, 1024), (300, 768, 256), (130, 1024, 512)],
)
def test_mlp(
    num_tokens: int,
    width: int,
    chunk: int,
    dtype: str,
    implementation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, itemsize = 256, np.dtype(dtype).itemsize
    monkeypatch.setattr(mlp, "TILE_TOKENS", (256,))
    monkeypatch.setattr(
        tiles, "vmem_room", lambda: mlp.mlp_vmem_bytes(hidden, chunk, itemsize, 256)
    )
    assert mlp.mlp_tiles(num_tokens, hidden, width, itemsize)[1] == chunk
    x, norm, weights = mlp_arrays(num_tokens, hidden, width, dtype)
    stacks = tuple(map(stack, weights))
    found = gated_mlp(x, norm, stacks, LAYER, eps=EPS, implementation=implementation)

    rows, weight, gate, up, down = (
        np.asarray(value.astype(jnp.float32), np.float64) for value in (x, norm, *weights)
    )
    normed = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + EPS) * weight
    gated = normed @ gate.T
    want = rows + (gated / (1 + np.exp(-gated)) * (normed @ up.T)) @ down.T
    assert found.dtype == dtype
    assert_rows_close(found, want, dtype)


def test_mlps_that_do_not_fit() -> None:
    x, norm, weights = mlp_arrays(16, 128, 320, "float32")
    with pytest.raises(ArgumentError, match="intermediate_size=320 of 256"):
        gated_mlp(
            x, norm, tuple(map(stack, weights)), 0, eps=EPS, implementation="pallas_interpret"
        )
    assert can_gate(1024, 3072, 2)
    assert can_gate(4096, 12_288, 2)
    assert not can_gate(1000, 3072, 2)
    assert not can_gate(128, 320, 4)


def test_tiles_are_even_and_their_code_is_short() -> None:
    assert mlp.mlp_tiles(12_288, 1024, 3072, 2) == (1024, 512)
    assert mlp.mlp_tiles(2304, 2560, 9728, 2) == (768, 256)
    assert mlp.mlp_tiles(100, 1024, 3072, 2) == (100, 512)
    assert tiles.even_tile(1152, 512) == 384
    assert tiles.tile_tokens(10_000, 2 * 10**7, lambda tokens: 0) == 512
    assert tiles.tile_tokens(10_000, 2 * 10**8, lambda tokens: 0) is None
    assert tiles.tile_tokens(10_000, 2 * 10**6, lambda tokens: 2**40) is None
