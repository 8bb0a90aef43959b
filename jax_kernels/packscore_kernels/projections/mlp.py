"""The gated MLP in Pallas: norm, both products, their gate, the third product and the residual.

The matrix unit multiplies some columns of gate and up while the vector unit gates those before
them: the order in which they are written here is the order the compiler keeps.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from packscore_kernels.hardware import LANES, cdiv, shape_of, vmem_limit
from packscore_kernels.projections.tiles import (
    TILE_TOKENS,
    Ref,
    by_rows,
    even_tile,
    product,
    rms_norm,
    suits,
)

# Columns of gate and up that are multiplied between two gatings.
COLUMNS = 256


class MlpTiles(NamedTuple):
    """How the kernel walks: over tiles of tokens, and for each over chunks of the width."""

    tokens: int
    width: int  # columns of gate and up in a chunk; all of them stay in VMEM


def mlp_vmem_bytes(hidden_size: int, width: int, chunks: int, itemsize: int, tokens: int) -> int:
    """What the kernel holds with tiles of so many tokens and chunks of so many columns."""
    # of several chunks the next one arrives while one is multiplied, and sums wait for it
    copies, sums = (1, 0) if chunks == 1 else (2, 1)
    weights = copies * 3 * hidden_size * width * itemsize
    tiles = tokens * (5 * hidden_size + width) * itemsize
    return weights + tiles + tokens * ((1 + sums) * hidden_size + 4 * COLUMNS) * 4


def mlp_tiles(
    num_tokens: int, hidden_size: int, intermediate_size: int, itemsize: int
) -> MlpTiles | None:
    """Tiles for an MLP: its weights stay in VMEM if they fit, else they pass by in chunks.

    None where its sizes do not suit the kernel.
    """
    if hidden_size % LANES or intermediate_size % COLUMNS:
        return None
    steps = intermediate_size // COLUMNS
    passing = [n for n in range(2, steps + 1) if steps % n == 0]
    choices = itertools.product(TILE_TOKENS, [1]), itertools.product(TILE_TOKENS, passing)
    for most, chunks in itertools.chain(*choices):
        width = intermediate_size // chunks
        held = mlp_vmem_bytes(hidden_size, width, chunks, itemsize, most)
        if suits(most, 3 * hidden_size * width, held):
            return MlpTiles(even_tile(num_tokens, most), width)
    return None


def _mlp_kernel(
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
    sums: Ref | None = None,  # float32[block_tokens, hidden_size], where there are several chunks
    *,
    eps: float,
) -> None:

    def prepare(at: Any) -> None:
        rows[at] = rms_norm(x[at], x_norm[...], eps).astype(rows.dtype)
        if sums is not None:
            sums[at] = x[at].astype(jnp.float32)

    if sums is None:  # without a branch, which would part what the compiler schedules together
        prepare(slice(None))
    else:
        pl.when(pl.program_id(1) == 0)(lambda: by_rows(x.shape[0], prepare))
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
    found = product(gated[...], down[...])
    if sums is None:
        out[...] = (x[...].astype(jnp.float32) + found).astype(out.dtype)
        return
    sums[...] += found

    def finish(at: Any) -> None:
        out[at] = sums[at].astype(out.dtype)

    pl.when(pl.program_id(1) == pl.num_programs(1) - 1)(lambda: by_rows(x.shape[0], finish))


def gated_mlp_pallas(
    x: jax.Array,  # [num_tokens, hidden_size]
    x_norm: jax.Array,  # [hidden_size]
    weights: tuple[jax.Array, jax.Array, jax.Array],  # gate and up alike, down transposed
    tiles: MlpTiles,
    *,
    eps: float,
    interpret: Any = False,
) -> jax.Array:
    """The kernel behind `gated_mlp`."""
    (num_tokens, hidden_size), itemsize = x.shape, x.dtype.itemsize
    (tokens, width), (gate, up, down) = tiles, weights
    chunks = gate.shape[0] // width
    x_norm = x_norm[None]
    once = pl.Buffered(1) if chunks == 1 else None
    across = pl.BlockSpec((width, hidden_size), lambda _, c: (c, 0), pipeline_mode=once)
    tile = pl.BlockSpec((tokens, hidden_size), lambda t, _: (t, 0))
    scratch = [
        pltpu.VMEM((tokens, hidden_size), x.dtype),
        pltpu.VMEM((2, 2, tokens, COLUMNS), jnp.float32),
        pltpu.VMEM((tokens, width), x.dtype),
    ]
    if chunks > 1:
        scratch.append(pltpu.VMEM((tokens, hidden_size), jnp.float32))
    held = mlp_vmem_bytes(hidden_size, width, chunks, itemsize, tokens)
    out: jax.Array = pl.pallas_call(
        functools.partial(_mlp_kernel, eps=eps),
        grid=(cdiv(num_tokens, tokens), chunks),
        in_specs=[
            tile,
            pl.BlockSpec(x_norm.shape, lambda *_: (0, 0), pipeline_mode=pl.Buffered(1)),
            across,
            across,
            pl.BlockSpec((hidden_size, width), lambda _, c: (0, c), pipeline_mode=once),
        ],
        out_specs=tile,
        out_shape=shape_of(x.shape, x.dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit(held)
        ),
        interpret=interpret,
        name="gated_mlp",
    )(x, x_norm, gate, up, down)
    return out
