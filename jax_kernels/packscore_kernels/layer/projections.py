"""The projections in Pallas: both kernels hold their weights in VMEM and walk over tiles of tokens.

The matrix unit multiplies the heads of one pass while the vector and lane units normalise and
rotate those of the pass before.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from packscore_kernels.errors import ArgumentError
from packscore_kernels.hardware import LANES, cdiv, shape_of, vmem_limit
from packscore_kernels.layer.tiles import (
    LiveTokens,
    Ref,
    num_tiles,
    of_layer,
    of_tiles,
    product,
    rms_norm,
    tile_tokens,
    whole,
)

HEAD_DIM = LANES  # the width of a vector register, within which a head is turned
# Heads that one pass multiplies. Few leave the matrix unit idle at each pass's ends; all at once
# is one long piece of code, which the compiler schedules worse than several short ones.
HEADS = 8
# Tokens of a tile without queries, as one layer has: a long tile is long code, for 2 % of a layer.
KV_TOKENS = 256


def too_large(hidden_size: int, num_heads: int) -> ArgumentError:
    """Weights that the chip's VMEM does not hold, or that would compile for minutes."""
    return ArgumentError(
        f"{hidden_size=} times {num_heads=} is more than the kernel takes on this chip; "
        "pass implementation='xla', and see can_project"
    )


def num_passes(num_q_heads: int, num_kv_heads: int) -> int:
    """Passes over the heads of q, k and v."""
    return sum(cdiv(n, HEADS) for n in (num_q_heads, num_kv_heads, num_kv_heads))


def _qkv_kernel(
    # prefetch
    layer: Ref,  # i32[1]
    # inputs
    x: Ref,  # [block_tokens, hidden_size]
    x_norm: Ref,  # [1, hidden_size]
    wq: Ref | None,  # [num_q_heads * head_dim, hidden_size]; without it no queries are made
    wk: Ref,  # [num_kv_heads * head_dim, hidden_size]
    wv: Ref,  # [num_kv_heads * head_dim, hidden_size]
    q_norm: Ref | None,  # [1, head_dim]
    k_norm: Ref,  # [1, head_dim]
    cos: Ref,  # [block_tokens, head_dim]
    sin: Ref,  # [block_tokens, head_dim]
    # outputs
    q: Ref | None,  # [num_q_heads, block_tokens, head_dim]
    k: Ref,  # [num_kv_heads, block_tokens, head_dim]
    v: Ref,  # [num_kv_heads, block_tokens, head_dim]
    # scratch
    rows: Ref,  # [block_tokens, hidden_size]
    raw: Ref,  # float32[2, block_tokens, HEADS * head_dim]: products, one of them being finished
    turn: Ref,  # float32[2, block_tokens, head_dim]: cosine and signed sine
    *,
    eps: float,
) -> None:
    del layer
    head_dim = k.shape[2]
    half = head_dim // 2

    @pl.when(pl.program_id(1) == 0)
    def prepare() -> None:
        rows[...] = rms_norm(x[...], x_norm[...], eps).astype(rows.dtype)
        # turning by half a head puts x2 before x1, and rotate_half wants -x2 before x1
        lane = lax.broadcasted_iota(jnp.int32, sin.shape, 1)
        sine = sin[...].astype(jnp.float32)
        turn[0] = cos[...].astype(jnp.float32)
        turn[1] = jnp.where(lane < half, -sine, sine)

    passes = [
        (weight, out, norm, first, min(HEADS, out.shape[0] - first))
        for weight, out, norm in ((wq, q, q_norm), (wk, k, k_norm), (wv, v, None))
        if weight is not None and out is not None
        for first in range(0, out.shape[0], HEADS)
    ]

    def step(i: int) -> None:
        if i < len(passes):
            weight, _, _, first, heads = passes[i]
            columns = slice(first * head_dim, (first + heads) * head_dim)
            raw[i % 2, :, : heads * head_dim] = product(rows[...], weight[columns])
        if i:
            _, out, norm, first, heads = passes[i - 1]
            for head in range(heads):
                at = slice(head * head_dim, (head + 1) * head_dim)
                values = raw[(i - 1) % 2, :, at]
                if norm is not None:
                    values = rms_norm(values, norm[...], eps)
                    values = values * turn[0] + pltpu.roll(values, half, 1) * turn[1]
                out[first + head] = values.astype(out.dtype)

    for i in range(len(passes) + 1):
        pl.when(pl.program_id(1) == i)(functools.partial(step, i))


def _kv_kernel(
    layer: Ref,
    x: Ref,
    x_norm: Ref,
    wk: Ref,
    wv: Ref,
    k_norm: Ref,
    cos: Ref,
    sin: Ref,
    *others: Ref,
    eps: float,
) -> None:
    """`_qkv_kernel` without queries; the others are k, v and what is scratch there."""
    inputs = x, x_norm, None, wk, wv, None, k_norm, cos, sin
    _qkv_kernel(layer, *inputs, None, *others, eps=eps)


def qkv_vmem_bytes(
    num_q_heads: int, num_kv_heads: int, hidden_size: int, itemsize: int, tokens: int
) -> int:
    """What `project_qkv` holds with tiles of so many tokens."""
    columns = HEAD_DIM * (num_q_heads + 2 * num_kv_heads)
    tiles = tokens * (3 * hidden_size + 2 * columns + 4 * HEAD_DIM) * itemsize
    return columns * hidden_size * itemsize + tiles + tokens * HEAD_DIM * (2 * HEADS + 2) * 4


def out_vmem_bytes(num_q_heads: int, hidden_size: int, itemsize: int, tokens: int) -> int:
    """What `project_out` holds with tiles of so many tokens."""
    columns = HEAD_DIM * num_q_heads
    arrays = columns * hidden_size + tokens * (4 * hidden_size + 3 * columns)
    return arrays * itemsize + 4 * tokens * hidden_size


def qkv_tile(
    heads: tuple[int, int],
    hidden_size: int,
    itemsize: int,
    num_tokens: int,
    live: LiveTokens | None = None,
) -> int | None:
    """Tokens of a tile of `project_qkv`; None where no tile suits its (q, kv) heads."""
    held = functools.partial(qkv_vmem_bytes, *heads, hidden_size, itemsize)
    weight_bytes = HEAD_DIM * (heads[0] + 2 * heads[1]) * hidden_size * itemsize
    tile = tile_tokens(num_tokens, weight_bytes, held, live)
    return tile if heads[0] or tile is None else min(tile, KV_TOKENS)


def out_tile(
    num_q_heads: int,
    hidden_size: int,
    itemsize: int,
    num_tokens: int,
    live: LiveTokens | None = None,
) -> int | None:
    """Tokens of a tile of `project_out`; None where no tile suits its heads."""
    held = functools.partial(out_vmem_bytes, num_q_heads, hidden_size, itemsize)
    weight_bytes = HEAD_DIM * num_q_heads * hidden_size * itemsize
    return tile_tokens(num_tokens, weight_bytes, held, live)


def project_qkv_pallas(
    x: jax.Array,  # [num_tokens, hidden_size]
    x_norm: jax.Array,  # [hidden_size]
    weights: Sequence[jax.Array],  # [layers, num_heads * head_dim, hidden_size], two: no queries
    norms: Sequence[jax.Array],  # [head_dim], of q where there are queries, and of k
    rotary: tuple[jax.Array, jax.Array],  # [num_tokens, head_dim]
    layer: jax.Array,  # i32[1]
    *,
    eps: float,
    live: LiveTokens | None = None,
    interpret: Any = False,
) -> list[jax.Array]:
    """The kernel behind `project_qkv` and `project_kv`."""
    (num_tokens, hidden_size), head_dim = x.shape, norms[0].shape[0]
    heads = [w.shape[1] // head_dim for w in weights]
    num_q_heads, num_kv_heads = sum(heads[:-2]), heads[-1]
    itemsize = x.dtype.itemsize
    tokens = qkv_tile((num_q_heads, num_kv_heads), hidden_size, itemsize, num_tokens, live)
    if tokens is None:
        raise too_large(hidden_size, num_q_heads)
    x_norm, *norms = (norm[None] for norm in (x_norm, *norms))

    def tile(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((tokens, width), lambda t, *_: (t, 0))

    found: list[jax.Array] = pl.pallas_call(
        functools.partial(_qkv_kernel if num_q_heads else _kv_kernel, eps=eps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(
                num_tiles(num_tokens, tokens, live),
                num_passes(num_q_heads, num_kv_heads) + 1,
            ),
            in_specs=[
                tile(hidden_size),
                whole(x_norm),
                *map(of_layer, weights),
                *map(whole, norms),
                tile(head_dim),
                tile(head_dim),
            ],
            out_specs=[pl.BlockSpec((n, tokens, head_dim), lambda t, *_: (0, t, 0)) for n in heads],
            scratch_shapes=[
                pltpu.VMEM((tokens, hidden_size), x.dtype),
                pltpu.VMEM((2, tokens, HEADS * head_dim), jnp.float32),
                pltpu.VMEM((2, tokens, head_dim), jnp.float32),
            ],
        ),
        out_shape=[shape_of((n, num_tokens, head_dim), x.dtype) for n in heads],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(of_tiles(live, interpret), "arbitrary"),
            vmem_limit_bytes=vmem_limit(
                qkv_vmem_bytes(num_q_heads, num_kv_heads, hidden_size, itemsize, tokens)
            ),
        ),
        interpret=interpret,
        name="project_qkv" if num_q_heads else "project_kv",
    )(layer, x, x_norm, *weights, *norms, *rotary)
    return found


def _out_kernel(
    # prefetch
    layer: Ref,  # i32[1]
    # inputs
    attended: Ref,  # [num_q_heads, block_tokens, head_dim]
    weight: Ref,  # [hidden_size, num_q_heads * head_dim]
    x: Ref,  # [block_tokens, hidden_size]
    # outputs
    out: Ref,  # [block_tokens, hidden_size]
) -> None:
    del layer
    rows = jnp.concatenate([attended[head] for head in range(attended.shape[0])], axis=1)
    out[...] = (x[...].astype(jnp.float32) + product(rows, weight[...])).astype(out.dtype)


def project_out_pallas(
    attended: jax.Array,  # [num_q_heads, num_tokens, head_dim]
    weight: jax.Array,  # [layers, hidden_size, num_q_heads * head_dim]
    x: jax.Array,  # [num_tokens, hidden_size]
    layer: jax.Array,  # i32[1]
    *,
    live: LiveTokens | None = None,
    interpret: Any = False,
) -> jax.Array:
    """The kernel behind `project_out`."""
    num_heads, num_tokens, head_dim = attended.shape
    hidden_size, itemsize = weight.shape[1], x.dtype.itemsize
    tokens = out_tile(num_heads, hidden_size, itemsize, num_tokens, live)
    if tokens is None:
        raise too_large(hidden_size, num_heads)
    held = out_vmem_bytes(num_heads, hidden_size, itemsize, tokens)
    tile = pl.BlockSpec((tokens, hidden_size), lambda t, _: (t, 0))
    heads = pl.BlockSpec((num_heads, tokens, head_dim), lambda t, _: (0, t, 0))
    out: jax.Array = pl.pallas_call(
        _out_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_tiles(num_tokens, tokens, live),),
            in_specs=[heads, of_layer(weight), tile],
            out_specs=tile,
        ),
        out_shape=shape_of(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(of_tiles(live, interpret),),
            vmem_limit_bytes=vmem_limit(held),
        ),
        interpret=interpret,
        name="project_out",
    )(layer, attended, weight, x)
    return out
