"""What the kernels around attention share: their tiles of tokens, products and norms."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from packscore_kernels.hardware import LANES, align_to, cdiv, precision_of

Ref = Any


@partial(jax.tree_util.register_dataclass, data_fields=["count"], meta_fields=["tile"])
@dataclass(frozen=True)
class LiveTokens:
    """How many rows of a launch are tokens, as data: kernels walk over the tiles that hold them.

    Rows of later tiles are not written: they hold anything, and nobody may read them.
    """

    count: Any  # i32[]
    tile: int  # most rows of a tile


def even_tile(num_tokens: int, most: int) -> int:
    """Tokens of a tile of at most so many, such that all tiles have about as many."""
    return min(align_to(cdiv(num_tokens, cdiv(num_tokens, most)), 16), num_tokens)


def one_tile(num_tokens: int, most: int, live: LiveTokens | None) -> int:
    """Tokens of a tile of at most so many."""
    return min(most, live.tile, num_tokens) if live else even_tile(num_tokens, most)


def num_tiles(num_tokens: int, tile: int, live: LiveTokens | None) -> Any:
    """Tiles of all tokens, or of those that are there: then i32[], and data of the program."""
    return lax.div(live.count + (tile - 1), tile) if live else cdiv(num_tokens, tile)


def of_tiles(live: LiveTokens | None, interpret: Any) -> Literal["parallel", "arbitrary"]:
    """What a grid's dimension of tiles may do: interpreters shuffle none whose size is data."""
    return "arbitrary" if live and interpret else "parallel"


def whole(array: jax.Array) -> pl.BlockSpec:
    """All of an array, fetched once."""
    zeros = (0,) * array.ndim
    return pl.BlockSpec(array.shape, lambda *_: zeros, pipeline_mode=pl.Buffered(1))


def of_layer(weight: jax.Array) -> pl.BlockSpec:
    """All of one layer's weight, fetched once; the layer's number is prefetched."""
    return pl.BlockSpec(
        (None, *weight.shape[1:]),
        lambda *at: (at[-1][0], 0, 0),
        pipeline_mode=pl.Buffered(1),
    )


def passing(weight: jax.Array, rows: int) -> pl.BlockSpec:
    """One layer's weight in chunks of so many rows, one a step; further steps keep the last."""
    last = weight.shape[1] // rows - 1
    return pl.BlockSpec(
        (None, rows, weight.shape[2]),
        lambda t, step, layer: (layer[0], jnp.minimum(step, last), 0),
    )


def chunk_of(
    weight: Ref,  # [rows, hidden_size]: all, or one chunk
    step: Any,  # i32[]
    rows: int,
    first: int = 0,
    count: int | None = None,
) -> jax.Array:
    """Some rows of a step's chunk of a weight, which holds all chunks or has this one passing by.

    Args:
      weight: the weight.
      step: which chunk.
      rows: of a chunk.
      first: row within the chunk.
      count: of rows; None: all of the chunk.
    """
    count = rows if count is None else count
    is_chunk = weight.shape[0] == rows
    start = first if is_chunk else pl.multiple_of(step * rows, LANES) + first
    found: jax.Array = weight[pl.ds(start, count)]
    return found


def product(
    rows: jax.Array,  # [num_rows, hidden_size]
    weight: jax.Array,  # [num_columns, hidden_size]
) -> jax.Array:
    """rows x weight transposed, float32[num_rows, num_columns]."""
    out: jax.Array = lax.dot_general(
        rows,
        weight,
        (((1,), (1,)), ((), ())),
        precision=precision_of(rows.dtype),
        preferred_element_type=jnp.float32,
    )
    return out


def shared(x: jax.Array, share: float) -> jax.Array:
    """What one chip of several adds of the residual stream, in float32."""
    return x.astype(jnp.float32) * share if share != 1 else x.astype(jnp.float32)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * weight along the last axis, in float32."""
    x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    out: jax.Array = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return out
