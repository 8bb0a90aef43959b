"""The projections in Pallas: both kernels walk over tiles of tokens, and over chunks of weights.

The matrix unit multiplies the heads of one step while the vector and lane units normalise and
rotate those of the step before.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from packscore_kernels.errors import ArgumentError
from packscore_kernels.hardware import shape_of, vmem_limit
from packscore_kernels.layer.tiles import (
    LiveTokens,
    Ref,
    chunk_of,
    num_tiles,
    of_layer,
    of_tiles,
    passing,
    product,
    rms_norm,
    shared,
    whole,
)
from packscore_kernels.layer.walks import HEAD_DIM, QkvSteps, out_walk, qkv_walk

PAIR = 2  # heads whose columns fill a pass of the matrix unit


def too_large(hidden_size: int, num_heads: int) -> ArgumentError:
    """Weights of which the chip's VMEM holds no chunk beside a tile of tokens."""
    return ArgumentError(
        f"{hidden_size=} times {num_heads=} is more than the kernel takes on this chip; "
        "pass implementation='xla', and see can_project"
    )


class _Part(NamedTuple):
    """What becomes of one of the three weights."""

    weight: Ref
    out: Ref
    norm: Ref | None
    steps: int


def _qkv_kernel(
    # prefetch
    layer: Ref,  # i32[1]
    # inputs
    x: Ref,  # [block_tokens, hidden_size]
    x_norm: Ref,  # [1, hidden_size]
    wq: Ref | None,  # [num_q_heads * head_dim, hidden_size], or of a step's heads; None: no queries
    wk: Ref,  # [num_kv_heads * head_dim, hidden_size]
    wv: Ref,  # [num_kv_heads * head_dim, hidden_size]
    q_norm: Ref | None,  # [1, head_dim]
    k_norm: Ref,  # [1, head_dim]
    cos: Ref,  # [block_tokens, head_dim]
    sin: Ref,  # [block_tokens, head_dim]
    # outputs: of the heads of the step before
    q: Ref | None,  # [q_heads, block_tokens, head_dim]
    k: Ref,  # [kv_heads, block_tokens, head_dim]
    v: Ref,  # [kv_heads, block_tokens, head_dim]
    # scratch
    rows: Ref,  # [block_tokens, hidden_size]
    raw: Ref,  # float32[block_tokens, heads of a step * head_dim]: products that wait
    turn: Ref,  # float32[2, block_tokens, head_dim]: cosine and signed sine
    *,
    steps: QkvSteps,
    eps: float,
) -> None:
    del layer
    step = pl.program_id(1)

    def prepare() -> None:
        rows[...] = rms_norm(x[...], x_norm[...], eps).astype(rows.dtype)
        # turning by half a head puts x2 before x1, and rotate_half wants -x2 before x1
        lane = lax.broadcasted_iota(jnp.int32, sin.shape, 1)
        sine = sin[...].astype(jnp.float32)
        turn[0] = cos[...].astype(jnp.float32)
        turn[1] = jnp.where(lane < HEAD_DIM // 2, -sine, sine)

    def finish(part: _Part, head: int) -> None:
        values = raw[:, head * HEAD_DIM : (head + 1) * HEAD_DIM]
        if part.norm is not None:
            values = rms_norm(values, part.norm[...], eps)
            values = values * turn[0] + pltpu.roll(values, HEAD_DIM // 2, 1) * turn[1]
        part.out[head] = values.astype(part.out.dtype)

    def run(own: _Part | None, before: _Part | None, first: int) -> None:
        if before is None:
            prepare()
        ready, wanted = (part.out.shape[0] if part else 0 for part in (before, own))
        # a pair's columns take the next product as soon as they are finished: the matrix unit
        # multiplies one pair beside the finishing of another
        for pair in range(0, max(ready, wanted), PAIR):
            if before is not None:
                for head in range(pair, min(pair + PAIR, ready)):
                    finish(before, head)
            if own is not None and pair < wanted:
                start, size = pair * HEAD_DIM, min(PAIR, wanted - pair) * HEAD_DIM
                weight = chunk_of(own.weight, step - first, wanted * HEAD_DIM, start, size)
                raw[:, start : start + size] = product(rows[...], weight)

    first = 0
    before: _Part | None = None
    parts = [_Part(wk, k, k_norm, steps.kv), _Part(wv, v, None, steps.kv)]
    if steps.q:
        parts.insert(0, _Part(wq, q, q_norm, steps.q))
    for part in parts:
        pl.when(step == first)(functools.partial(run, part, before, first))
        if part.steps > 1:
            inside = (step > first) & (step < first + part.steps)
            pl.when(inside)(functools.partial(run, part, part, first))
        first, before = first + part.steps, part
    pl.when(step == first)(functools.partial(run, None, before, first))


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
    steps: QkvSteps,
    eps: float,
) -> None:
    """`_qkv_kernel` without queries; the others are k, v and what is scratch there."""
    inputs = x, x_norm, None, wk, wv, None, k_norm, cos, sin
    _qkv_kernel(layer, *inputs, None, *others, steps=steps, eps=eps)


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
    num_tokens, hidden_size = x.shape
    heads = [weight.shape[1] // HEAD_DIM for weight in weights]
    num_q_heads, num_kv_heads = sum(heads[:-2]), heads[-1]
    own = num_q_heads, num_kv_heads
    walk = qkv_walk(own, hidden_size, x.dtype.itemsize, num_tokens, live)
    if walk is None:
        raise too_large(hidden_size, heads[0])
    tokens, steps = walk.tokens, QkvSteps.of(*own, walk.chunk)
    x_norm, *norms = (norm[None] for norm in (x_norm, *norms))
    of_first = passing(weights[0], walk.chunk * HEAD_DIM) if walk.passes else of_layer(weights[0])

    def tile(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((tokens, width), lambda t, *_: (t, 0))

    def finished(num_heads: int, first: int, count: int) -> pl.BlockSpec:
        """The heads of the step before, of those steps that are a part's own."""

        def at(t: Any, step: Any, layer: Any) -> tuple[Any, Any, int]:
            return jnp.clip(step - first - 1, 0, count - 1), t, 0

        return pl.BlockSpec((num_heads, tokens, HEAD_DIM), at)

    parts = [
        (steps.q_heads, 0, steps.q),
        (steps.kv_heads, steps.q, steps.kv),
        (steps.kv_heads, steps.q + steps.kv, steps.kv),
    ]
    found: list[jax.Array] = pl.pallas_call(
        functools.partial(_qkv_kernel if num_q_heads else _kv_kernel, steps=steps, eps=eps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_tiles(num_tokens, tokens, live), steps.per_tile),
            in_specs=[
                tile(hidden_size),
                whole(x_norm),
                of_first,
                *map(of_layer, weights[1:]),
                *map(whole, norms),
                tile(HEAD_DIM),
                tile(HEAD_DIM),
            ],
            out_specs=[finished(*part) for part in parts[-len(weights) :]],
            scratch_shapes=[
                pltpu.VMEM((tokens, hidden_size), x.dtype),
                pltpu.VMEM((tokens, max(steps.q_heads, steps.kv_heads) * HEAD_DIM), jnp.float32),
                pltpu.VMEM((2, tokens, HEAD_DIM), jnp.float32),
            ],
        ),
        out_shape=[shape_of((n, num_tokens, HEAD_DIM), x.dtype) for n in heads],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(of_tiles(live, interpret), "arbitrary"),
            vmem_limit_bytes=vmem_limit(walk.vmem_bytes),
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
    weight: Ref,  # [hidden_size, num_q_heads * head_dim], or the rows of a chunk
    x: Ref,  # [block_tokens, chunk]
    # outputs
    out: Ref,  # [block_tokens, chunk]
    *,
    share: float,
) -> None:
    del layer
    rows = jnp.concatenate([attended[head] for head in range(attended.shape[0])], axis=1)
    own = chunk_of(weight, pl.program_id(1), out.shape[1])
    out[...] = (shared(x[...], share) + product(rows, own)).astype(out.dtype)


def project_out_pallas(
    attended: jax.Array,  # [num_q_heads, num_tokens, head_dim]
    weight: jax.Array,  # [layers, hidden_size, num_q_heads * head_dim]
    x: jax.Array,  # [num_tokens, hidden_size]
    layer: jax.Array,  # i32[1]
    *,
    share: float = 1.0,
    live: LiveTokens | None = None,
    interpret: Any = False,
) -> jax.Array:
    """The kernel behind `project_out`."""
    num_heads, num_tokens, head_dim = attended.shape
    hidden_size = weight.shape[1]
    walk = out_walk(num_heads, hidden_size, x.dtype.itemsize, num_tokens, live)
    if walk is None:
        raise too_large(hidden_size, num_heads)
    tokens, columns = walk.tokens, walk.chunk
    tile = pl.BlockSpec((tokens, columns), lambda t, step, _: (t, step))
    heads = pl.BlockSpec((num_heads, tokens, head_dim), lambda t, *_: (0, t, 0))
    out: jax.Array = pl.pallas_call(
        functools.partial(_out_kernel, share=share),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_tiles(num_tokens, tokens, live), hidden_size // columns),
            in_specs=[
                heads,
                passing(weight, columns) if walk.passes else of_layer(weight),
                tile,
            ],
            out_specs=tile,
        ),
        out_shape=shape_of(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(of_tiles(live, interpret), "arbitrary"),
            vmem_limit_bytes=vmem_limit(walk.vmem_bytes),
        ),
        interpret=interpret,
        name="project_out",
    )(layer, attended, weight, x)
    return out
