"""The end of a tile: what its rows found, divided, and whether it can be trusted."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from packscore_kernels.attention.pieces import lanes, sublanes, sum8
from packscore_kernels.attention.refs import Refs

SUM_LIMIT = 2.0**64  # leaves as much room again for the values


def write_rows(refs: Refs, g: int, rows: slice, acc: jax.Array, total: jax.Array) -> None:
    """Outputs of some rows of a q head: sums of values over sums of weights, turned back."""
    total = jnp.sum(total, axis=0, keepdims=True)
    # Not finite where any of the row's outputs is not.
    whole = jnp.abs(jnp.sum(sum8(acc), axis=0, keepdims=True))
    refs.bad[g, :, rows] = jnp.where((total < SUM_LIMIT) & (whole < jnp.inf), 0.0, 1.0)
    refs.o[g, rows] = (acc * (1.0 / total)).astype(refs.o.dtype).T


def write(refs: Refs) -> None:
    """Outputs of a tile that no piece of code has written with its last products."""
    for g in refs.heads:
        write_rows(refs, g, slice(0, refs.blocks.block_q), refs.acc[g], refs.total[g])


def failed(refs: Refs) -> jax.Array:
    """Whether a real row's sum or output left the range the fixed reference is good for."""
    rows = refs.blocks.block_q
    worst = functools.reduce(jnp.maximum, [refs.bad[g] for g in refs.heads])
    real = refs.first_row + lanes(rows) < refs.counts[0]
    return jnp.max(jnp.where(real, worst, 0.0)) > 0.0


def clear_padding(refs: Refs) -> None:
    """Zeros in the rows behind the last token."""
    row = refs.first_row + sublanes(refs.blocks.block_q, refs.shape.head_dim)
    for g in refs.heads:
        o = refs.o[g].astype(jnp.float32)
        refs.o[g] = jnp.where(row < refs.counts[0], o, 0.0).astype(refs.o.dtype)
