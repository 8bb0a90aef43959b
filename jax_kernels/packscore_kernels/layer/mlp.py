"""The gated MLP in Pallas: norm, both products, their gate, the third product and the residual.

The weights pass by in chunks, once for each tile of tokens, and arrive while others are multiplied.
The matrix unit multiplies some columns of gate and up while the vector unit gates those before
them: the order in which they are written here is the order the compiler keeps.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from packscore_kernels.hardware import shape_of, vmem_limit
from packscore_kernels.layer.tiles import (
    LiveTokens,
    Ref,
    num_tiles,
    of_tiles,
    product,
    rms_norm,
    shared,
    whole,
)
from packscore_kernels.layer.walks import COLUMNS, DOWN_COLUMNS, Walk


def _mlp_kernel(
    # prefetch
    layer: Ref,  # i32[1]
    # inputs
    x: Ref,  # [block_tokens, hidden_size]
    x_norm: Ref,  # [1, hidden_size]
    gate: Ref,  # [width, hidden_size]
    up: Ref,  # [width, hidden_size]
    down: Ref,  # [hidden_size, width]
    # outputs
    out: Ref,  # [block_tokens, hidden_size]
    # scratch
    rows: Ref,  # [block_tokens, hidden_size]
    raw: Ref,  # float32[2, 2, block_tokens, COLUMNS]: gate and up, a pair of them being gated
    gated: Ref,  # [block_tokens, width]
    sums: Ref,  # float32[block_tokens, hidden_size]
    *,
    chunks: int,
    eps: float,
    share: float,
) -> None:
    del layer
    chunk = pl.program_id(1)

    def multiply(is_first: bool) -> None:
        if is_first:
            rows[...] = rms_norm(x[...], x_norm[...], eps).astype(rows.dtype)
        steps = gate.shape[0] // COLUMNS
        for i in range(steps + 1):
            if i < steps:
                columns = slice(i * COLUMNS, (i + 1) * COLUMNS)
                raw[i % 2, 0] = product(rows[...], gate[columns])
                raw[i % 2, 1] = product(rows[...], up[columns])
            if i:
                own, other = raw[(i - 1) % 2, 0], raw[(i - 1) % 2, 1]
                columns = slice((i - 1) * COLUMNS, i * COLUMNS)
                gated[:, columns] = (jax.nn.silu(own) * other).astype(gated.dtype)
        # in parts, so that few sums wait beside `sums` itself
        for first in range(0, down.shape[0], DOWN_COLUMNS):
            part = slice(first, first + DOWN_COLUMNS)
            before = shared(x[:, part], share) if is_first else sums[:, part]
            sums[:, part] = before + product(gated[...], down[part])

    # two straight pieces, so that the norm runs beside the first products
    pl.when(chunk == 0)(lambda: multiply(True))
    if chunks > 1:
        pl.when(chunk > 0)(lambda: multiply(False))

    @pl.when(chunk == chunks - 1)
    def finish() -> None:
        out[...] = sums[...].astype(out.dtype)


def gated_mlp_pallas(
    x: jax.Array,  # [num_tokens, hidden_size]
    x_norm: jax.Array,  # [hidden_size]
    weights: tuple[jax.Array, jax.Array, jax.Array],  # of all layers
    layer: jax.Array,  # i32[1]
    walk: Walk,
    *,
    eps: float,
    share: float = 1.0,
    live: LiveTokens | None = None,
    interpret: Any = False,
) -> jax.Array:
    """The kernel behind `gated_mlp`."""
    (num_tokens, hidden_size), tokens, width = x.shape, walk.tokens, walk.chunk
    chunks = weights[0].shape[1] // width
    x_norm = x_norm[None]
    tile = pl.BlockSpec((tokens, hidden_size), lambda t, c, layer: (t, 0))
    across = pl.BlockSpec((None, width, hidden_size), lambda t, c, layer: (layer[0], c, 0))
    back = pl.BlockSpec((None, hidden_size, width), lambda t, c, layer: (layer[0], 0, c))
    out: jax.Array = pl.pallas_call(
        functools.partial(_mlp_kernel, chunks=chunks, eps=eps, share=share),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_tiles(num_tokens, tokens, live), chunks),
            in_specs=[tile, whole(x_norm), across, across, back],
            out_specs=tile,
            scratch_shapes=[
                pltpu.VMEM((tokens, hidden_size), x.dtype),
                pltpu.VMEM((2, 2, tokens, COLUMNS), jnp.float32),
                pltpu.VMEM((tokens, width), x.dtype),
                pltpu.VMEM((tokens, hidden_size), jnp.float32),
            ],
        ),
        out_shape=shape_of(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(of_tiles(live, interpret), "arbitrary"),
            vmem_limit_bytes=vmem_limit(walk.vmem_bytes),
        ),
        interpret=interpret,
        name="gated_mlp",
    )(layer, x, x_norm, *weights)
    return out
