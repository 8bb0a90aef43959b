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
from packscore_kernels.hardware import CHIPS, Core
from packscore_kernels.layer import api, mlp, projections, tiles, walks
from packscore_kernels.layer.walks import Walk, mlp_walk, out_walk, qkv_walk
from tolerances import PROJECT_OUT_BFLOAT16, PROJECT_OUT_FLOAT32, assert_rows_close

EPS = 1e-6
LAYER = 1  # of two: nobody may look at the other's weights
# (num_tokens, hidden_size, num_q_heads, num_kv_heads): a partial tile, a step of few heads, one kv
# head, more heads than a step takes
SHAPES = [(128, 128, 2, 1), (130, 256, 3, 3), (700, 128, 10, 2), (16, 384, 16, 8)]


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


# more steps of q than of k and v, as many, one of k and v; tiles that end in the middle
@pytest.mark.parametrize("passes", [False, True], ids=["held", "passing"])
@pytest.mark.parametrize(
    ("shape", "chunk", "tokens"),
    [((45, 128, 6, 2), 1, 32), ((45, 128, 4, 4), 2, 16), ((21, 256, 6, 1), 3, 16)],
    ids=str,
)
def test_qkv_in_chunks(
    shape: tuple[int, int, int, int],
    chunk: int,
    tokens: int,
    passes: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(projections, "qkv_walk", lambda *_: Walk(tokens, chunk, passes))
    given = arrays(shape, "float32")
    found = project_qkv(*given, LAYER, eps=EPS, implementation="pallas_interpret")
    for got, want in zip(found, by_hand(*given), strict=True):
        assert_rows_close(got, want, "float32")


@pytest.mark.parametrize("passes", [False, True], ids=["held", "passing"])
@pytest.mark.parametrize("chunk", [128, 384])
def test_out_in_chunks(chunk: int, passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    monkeypatch.setattr(projections, "out_walk", lambda *_: Walk(32, chunk, passes))
    attended, weight, x = (
        jnp.asarray(rng.standard_normal(size), "float32")
        for size in ((2, 45, 128), (768, 256), (45, 768))
    )
    found = project_out(attended, stack(weight), x, LAYER, implementation="pallas_interpret")
    want = np.asarray(x, np.float64) + np.concatenate(list(attended), 1) @ np.asarray(weight).T
    assert np.abs(np.asarray(found, np.float64) - want).max() <= PROJECT_OUT_FLOAT32


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
    wide = (jax.ShapeDtypeStruct((1, 128 * 128, 16_384), jnp.float32),) * 3
    x, norm = jnp.zeros((16, 16_384)), jnp.ones(128)
    rotary = (jnp.ones((16, 128)),) * 2
    with pytest.raises(ArgumentError, match="hidden_size=16384 times num_heads=128 is more"):
        jax.eval_shape(
            lambda weights: project_qkv(x, x[0], weights, (norm, norm), rotary, 0, eps=EPS), wide
        )
    # columns of one head: VMEM holds no tile of what 1 024 heads attended to
    wide = jax.ShapeDtypeStruct((1, 128, 1024 * 128), jnp.float32)
    with pytest.raises(ArgumentError, match="hidden_size=128 times num_heads=1024 is more"):
        jax.eval_shape(
            lambda w: project_out(jnp.zeros((1024, 256, 128)), w, jnp.zeros((256, 128)), 0), wide
        )
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
    hidden = 256
    tokens = tiles.even_tile(num_tokens, 256)
    monkeypatch.setattr(api, "mlp_walk", lambda *_: Walk(tokens, chunk, True))
    # of the down projection two products, and a part
    monkeypatch.setattr(mlp, "DOWN_COLUMNS", 96)
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


def on(monkeypatch: pytest.MonkeyPatch, chip: str, cores: int = 1) -> None:
    """What kernels are planned for from here on."""
    facts = CHIPS[chip]
    own = Core(facts.vmem_bytes, facts.peak_flops / cores, facts.hbm_bytes_per_s / cores)
    monkeypatch.setattr(walks, "core", lambda: own)


# Qwen3's: (hidden, intermediate, q heads, kv heads)
SIZES = {
    "0.6B": (1024, 3072, 16, 8),
    "1.7B": (2048, 6144, 16, 8),
    "4B": (2560, 9728, 32, 8),
    "8B": (4096, 12_288, 32, 8),
    "14B": (5120, 17_408, 40, 8),
    "32B": (5120, 25_600, 64, 8),
}


@pytest.mark.parametrize(("chip", "cores"), [("v6e", 1), ("v5e", 1), ("v5p", 2), ("tpu7x", 2)])
@pytest.mark.parametrize("model", SIZES)
def test_every_size_has_a_walk_on_every_chip(
    model: str, chip: str, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, chip, cores)
    hidden, inner, *heads = SIZES[model]
    room, q = CHIPS[chip].vmem_bytes * 3 / 4, heads[0]
    for tile in (1024, 512, 256):
        live = tiles.LiveTokens(0, tile)
        found = (
            qkv_walk(tuple(heads), hidden, 2, 16_384, live),
            out_walk(q, hidden, 2, 16_384, live),
            mlp_walk(hidden, inner, 2, 16_384, live),
        )
        for walk, columns in zip(found, (q, hidden, inner), strict=True):
            assert walk is not None
            assert walk.tokens <= tile
            assert columns % walk.chunk == 0
            assert walk.vmem_bytes <= room
    assert can_project(*heads, 128, hidden, 2)
    assert can_gate(hidden, inner, 2)


def test_what_fits_is_held_and_what_does_not_passes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    live = tiles.LiveTokens(0, 1024)
    on(monkeypatch, "v6e")
    assert qkv_walk((16, 8), 1024, 2, 16_384, live)[:3] == (1024, 8, False)
    assert out_walk(16, 1024, 2, 16_384, live)[:3] == (1024, 1024, False)
    assert mlp_walk(1024, 3072, 2, 16_384, live)[:2] == (1024, 512)
    # 105 MB of q, k and v: more than VMEM may hold
    assert qkv_walk((64, 8), 5120, 2, 16_384, live).passes
    assert out_walk(64, 5120, 2, 16_384, live).passes
    # no chunk of these fits beside a tile
    assert qkv_walk((128, 128), 16_384, 2, 16_384, live) is None
    # a walk reads weights that pass by as seldom as it can where the HBM would be waited for
    slow = Core(CHIPS["v6e"].vmem_bytes, CHIPS["v6e"].peak_flops, 1e11)
    monkeypatch.setattr(walks, "core", lambda: slow)
    assert qkv_walk((64, 8), 5120, 2, 16_384, live).tokens == 1024


def test_keys_and_values_alone_walk_in_short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer has them: its code is short where the others' is long."""
    live = tiles.LiveTokens(0, 1024)
    for chip in ("v5e", "v6e"):
        on(monkeypatch, chip)
        assert qkv_walk((0, 8), 1024, 2, 16_384, live)[:3] == (256, 8, False)
        assert qkv_walk((0, 8), 5120, 2, 16_384, live).tokens == 256


def test_tiles_are_even() -> None:
    assert mlp_walk(2560, 9728, 2, 2304).tokens == 768
    assert mlp_walk(1024, 3072, 2, 100).tokens == 100
    assert tiles.even_tile(1152, 512) == 384


def test_code_is_short() -> None:
    own, need = Core(2**30, 1.0, 1.0), walks.Need(0, walks.LONGEST_PRODUCTS, 1, 0, 0)
    assert walks.suits(need, own)
    assert not walks.suits(need, own, share=0.99)
    assert not walks.suits(need._replace(vmem_bytes=2**30), own)
