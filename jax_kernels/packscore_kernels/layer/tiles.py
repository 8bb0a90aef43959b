"""What the kernels around attention share: their tiles of tokens, products and norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from packscore_kernels.hardware import CHIPS, align_to, cdiv, precision_of, vmem_capacity

Ref = Any
# Tokens of a tile, the most first: long tiles leave the matrix unit idle at fewer ends.
TILE_TOKENS = (1024, 512, 256)
# Tokens x bytes of weights of one tile, whose products are unrolled: a kernel of this length
# compiles in 12 to 20 s.
LONGEST_PRODUCTS = 18_000_000_000


@partial(jax.tree_util.register_dataclass, data_fields=["count"], meta_fields=["tile"])
@dataclass(frozen=True)
class LiveTokens:
    """How many rows of a launch are tokens, as data: kernels walk over the tiles that hold them.

    Rows of later tiles are not written: they hold anything, and nobody may read them.
    """

    count: Any  # i32[]
    tile: int  # most rows of a tile


def vmem_room() -> int:
    """Bytes of VMEM that a kernel may plan with; where it is interpreted, of a v5e's."""
    return (vmem_capacity() or CHIPS["v5e"].vmem_bytes) * 3 // 4


def even_tile(num_tokens: int, most: int) -> int:
    """Tokens of a tile of at most so many, such that all tiles have about as many."""
    return min(align_to(cdiv(num_tokens, cdiv(num_tokens, most)), 16), num_tokens)


def suits(tokens: int, weight_bytes: int, held: int, share: float = 1.0) -> bool:
    """Whether a tile fits VMEM and compiles in seconds.

    Args:
      tokens: of the tile.
      weight_bytes: of all weights that each of them is multiplied with.
      held: bytes of VMEM.
      share: of the longest code.
    """
    return held <= vmem_room() and tokens * weight_bytes <= share * LONGEST_PRODUCTS


def tile_tokens(
    num_tokens: int, weight_bytes: int, held: Callable[[int], int], live: LiveTokens | None = None
) -> int | None:
    """Tokens of a tile; None where no tile suits.

    Args:
      num_tokens: of all tiles.
      weight_bytes: of all weights that each of them is multiplied with.
      held: tokens of a tile to the bytes of VMEM it takes.
      live: where the number of tiles is data, which none is evened for.
    """
    suiting = (most for most in TILE_TOKENS if suits(most, weight_bytes, held(most)))
    most = next(suiting, None)
    return most and one_tile(num_tokens, most, live)


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


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * weight along the last axis, in float32."""
    x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    out: jax.Array = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return out
