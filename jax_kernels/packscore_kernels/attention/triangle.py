"""A tile that holds its prefix's rows: all of them against all keys before them, in one piece.

Each lane group's window goes back a whole lane group, to the tile's prefix and its own item; what
lies further back in the tile is a static triangle of the prefix's keys, with no loads, no edges,
and no more than one lane group of keys in vain for each row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from packscore_kernels.attention.chunks import weigh
from packscore_kernels.attention.loads import put
from packscore_kernels.attention.outputs import write_rows
from packscore_kernels.attention.pieces import (
    MASKED,
    Stage,
    cut,
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
from packscore_kernels.attention.uses import Use
from packscore_kernels.attention.window import keys_of, queries_of

# Found like the numbers in chunks.py:
KEYS = 512  # of a stage
LAG = 2  # lane groups between a window and the keys before it
AHEAD = 3  # stages whose scores run ahead of their softmax

State = tuple[jax.Array, jax.Array, jax.Array]  # reference, output, sums


def triangle(refs: Refs, use: Use) -> None:
    """The softmax's state of every row, and outputs as if the tile had no other uses.

    All keys of the tile are left in the slot of `redo`, which takes them from there.
    """
    slot, live, groups = refs.blocks.num_slots, use.last_key, refs.blocks.block_q // W
    states: dict[int, State] = {}
    spare, _ = tame(refs.k_here[0, :1], refs.v_here[0, :1], refs.shape.scale)

    def end(c: int) -> None:
        m, out, total = states.pop(c)
        rows = slice(c * W, (c + 1) * W)
        for g in refs.heads:
            at = slice(g * W, (g + 1) * W)
            write_rows(refs, g, rows, out[:, at], total[:, at])
            refs.m[g, :, rows], refs.total[g, :, rows] = m[:, at], total[:, at]
            refs.acc[g, :, rows] = out[:, at]

    def issue_window(c: int) -> tuple[jax.Array, jax.Array]:
        own = slice(c * W, (c + 1) * W)
        k, v = tame(refs.k_here[0, own], refs.v_here[0, own], refs.shape.scale)
        put(refs, slot, own, k, v, live - own.start, spare)
        k, v = keys_of(refs, c, W)
        return scores(k, queries_of(refs, c)), v

    def finish_window(c: int, issued: tuple[jax.Array, jax.Array]) -> None:
        s, v = issued
        s = jnp.where(_seen(refs, c, live, s), scaled(s, refs.shape.scale), MASKED)
        m = jnp.max(s, axis=0, keepdims=True)
        p = jnp.exp2(s - m)
        states[c] = m, dot(v.T, p.astype(v.dtype), 1, 0), sum8(p)
        if c < 2:
            end(c)

    def issue(c: int, keys: slice) -> jax.Array:
        s = scores(refs.kv_slots[slot, 0, keys], queries_of(refs, c))
        if refs.shape.ones:
            return s
        return jnp.where(sublanes(*s.shape) < live - keys.start, s, MASKED)

    def finish(c: int, keys: slice, s: jax.Array) -> None:
        m, out, total = states[c]
        p = jnp.exp2(s - m)
        more = weigh(refs, refs.vt_slots[slot, :, keys], p)
        states[c] = m, out + more[0], total + more[1]
        if keys.stop == (c - 1) * W:
            end(c)

    def window(c: int) -> Stage:
        return Stage(functools.partial(issue_window, c), functools.partial(finish_window, c))

    def before(c: int, keys: slice) -> Stage:
        return Stage(functools.partial(issue, c, keys), functools.partial(finish, c, keys))

    pipeline(_in_order(groups, window, before), AHEAD)
    if refs.shape.count_visits:
        refs.visits[refs.head, refs.tile] += use.last_block - use.first_block


def _in_order(
    groups: int, window: Callable[[int], Stage], before: Callable[[int, slice], Stage]
) -> list[Stage]:
    """Each lane group's window, and some windows later the keys before it."""
    stages = []
    for c in range(groups + LAG):
        stages += [window(c)] if c < groups else []
        far = max(c - LAG - 1, 0) * W
        stages += [before(c - LAG, keys) for keys in cut(far, KEYS)]
    return stages


def _seen(refs: Refs, c: int, live: jax.Array, s: jax.Array) -> jax.Array:
    """Which keys of its window a row sees: the prefix's of this tile, and its item's, to itself."""
    group, first = refs.shape.group_size, (c - 1) * W
    own = refs.rows[:1, c * W : (c + 1) * W] - (refs.first_row + first)
    own = jnp.concatenate([jnp.maximum(own, 0)] * group, axis=1)
    key = sublanes(*s.shape)
    start = jnp.where(key < live - first, 0 if c else W, own)
    return within(key, start, (lanes(group * W) & (W - 1)) + W - start + 1)
