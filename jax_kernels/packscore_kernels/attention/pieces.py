"""What the kernel's body is made of: stages of work for two units, and vector arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from packscore_kernels.hardware import precision_of

SUBLANES = 8
MASKED = -1e30  # the score of a key that a row does not see


class Stage(NamedTuple):
    """Work in two halves: scores on the matrix unit, then their softmax and product."""

    issue: Callable[[], Any]
    finish: Callable[[Any], None]


def pipeline(stages: Sequence[Stage], ahead: int) -> None:
    """Run the stages in order, with `ahead` of them issued before each is finished."""
    issued = [stage.issue() for stage in stages[:ahead]]
    for i, stage in enumerate(stages):
        if i + ahead < len(stages):
            issued.append(stages[i + ahead].issue())
        stage.finish(issued.pop(0))


def cut(size: int, piece: int) -> list[slice]:
    """`size` rows, a `piece` at a time; the last takes what is left."""
    return [slice(start, min(start + piece, size)) for start in range(0, size, piece)]


def dot(x: jax.Array, y: jax.Array, x_dim: int, y_dim: int) -> jax.Array:
    """Contraction of one dimension of each, summed in float32."""
    return lax.dot_general(
        x,
        y,
        (((x_dim,), (y_dim,)), ((), ())),
        precision=precision_of(x.dtype),
        preferred_element_type=jnp.float32,
    )


def scores(k: jax.Array, q: jax.Array) -> jax.Array:
    """Scores of keys against queries, transposed: [keys, rows]."""
    return dot(k, q, 1, 1)


def sum8(p: jax.Array) -> jax.Array:
    """Sums over keys that stop at one register's eight sublanes."""
    return jnp.sum(p.reshape(-1, SUBLANES, p.shape[-1]), axis=0)


def lanes(size: int) -> jax.Array:
    """0, 1, ... along lanes, i32[1, size]."""
    return lax.broadcasted_iota(jnp.int32, (1, size), 1)


def sublanes(keys: int, rows: int) -> jax.Array:
    """0, 1, ... along sublanes, i32[keys, rows]."""
    return lax.broadcasted_iota(jnp.int32, (keys, rows), 0)


def within(key: jax.Array, first: jax.Array, count: jax.Array) -> jax.Array:
    """first <= key < first + count, as one unsigned compare."""
    return (key - first).astype(jnp.uint32) < count.astype(jnp.uint32)


def scaled(x: jax.Array, scale: float) -> jax.Array:
    """Not a multiplication where there is nothing to do."""
    return x if scale == 1.0 else x * scale


def tame(k: jax.Array, v: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """Scaled keys and values where a non-finite value is 0 and poisons its own key instead.

    A masked key then reaches nobody, while a row that sees it still turns NaN.
    """
    finite = jnp.abs(v.astype(jnp.float32)) < jnp.inf
    tamed_k = jnp.where(finite, scaled(k.astype(jnp.float32), scale), jnp.nan).astype(k.dtype)
    return tamed_k, jnp.where(finite, v.astype(jnp.float32), 0.0).astype(v.dtype)
