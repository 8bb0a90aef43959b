"""The local window: each lane group of rows against its own keys and some before them.

It is where a tile's softmax begins. A row sees itself, so its window's maximum is that of a key it
sees; it becomes the fixed reference of all the row's exponentials.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from packscore_kernels.attention.pieces import (
    MASKED,
    Stage,
    dot,
    lanes,
    pipeline,
    scaled,
    scores,
    sublanes,
    sum8,
    tame,
    within,
)
from packscore_kernels.attention.refs import Refs, W

AHEAD = 4  # lane groups whose scores run ahead of their softmax


def window(refs: Refs, back: int, *, safe: bool = False) -> None:
    """Set the softmax's state of every row to its own item's last keys.

    Args:
      refs: the grid step.
      back: how many keys before a lane group its rows look at: NARROW or W.
      safe: keep what is not finite in a value from rows that do not see it.
    """
    pipeline(window_stages(refs, back, safe=safe), AHEAD)


def window_stages(refs: Refs, back: int, *, safe: bool = False) -> list[Stage]:
    """The window as stages, one a lane group, so that other work can go between them."""

    def issue(c: int) -> tuple[jax.Array, jax.Array]:
        k, v = keys_of(refs, c, back)
        if safe:
            k, v = tame(k, v, 1.0)
        return scores(k, queries_of(refs, c)), v

    def finish(c: int, issued: tuple[jax.Array, jax.Array]) -> None:
        s, v = issued
        s = jnp.where(_seen(refs, c, back, s), scaled(s, refs.shape.scale), MASKED)
        m = jnp.max(s, axis=0, keepdims=True)
        p = jnp.exp2(s - m)
        out = dot(v.T, p.astype(v.dtype), 1, 0)
        total = sum8(p)
        for g in refs.heads:
            rows, columns = slice(c * W, (c + 1) * W), slice(g * W, (g + 1) * W)
            refs.m[g, :, rows] = m[:, columns]
            refs.total[g, :, rows] = total[:, columns]
            refs.acc[g, :, rows] = out[:, columns]

    return [
        Stage(functools.partial(issue, c), functools.partial(finish, c))
        for c in range(refs.blocks.block_q // W)
    ]


def queries_of(refs: Refs, c: int) -> jax.Array:
    """Lane group c of all q heads, [group_size * W, head_dim]."""
    return jnp.concatenate([refs.q[g, c * W : (c + 1) * W] for g in refs.heads], axis=0)


def keys_of(refs: Refs, c: int, back: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values of lane group c and of the `back` tokens before it, [back + W, head_dim]."""
    if c:
        at = slice(c * W - back, (c + 1) * W)
        return refs.k_here[0, at], refs.v_here[0, at]
    k = jnp.concatenate([refs.k_before[0, W - back :], refs.k_here[0, :W]], axis=0)
    v = jnp.concatenate([refs.v_before[0, W - back :], refs.v_here[0, :W]], axis=0)
    return k, v


def _seen(refs: Refs, c: int, back: int, s: jax.Array) -> jax.Array:
    """Which keys of the window a row sees: from its item's first to itself; bool like s."""
    group = refs.shape.group_size
    own = refs.rows[:1, c * W : (c + 1) * W] - (refs.first_row + c * W - back)
    first = jnp.concatenate([jnp.maximum(own, 0)] * group, axis=1)
    last = (lanes(group * W) & (W - 1)) + back
    return within(sublanes(*s.shape), first, last - first + 1)
