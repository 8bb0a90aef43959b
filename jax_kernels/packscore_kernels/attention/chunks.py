"""One q tile against one chunk of keys in VMEM, which lie before the tile's local window.

A chunk is a prefix's, or the beginning of items that are longer than the window. Its blocks of
`block_kv` keys come in three kinds, and in this order:

- edge: which keys are seen differs from row to row, and some rows see none. A mask by rows;
- whole: every row of the tile sees every key. No mask, TURN blocks in one straight piece of code;
- closing: every row sees what the block has of its prefix, and the tile ends with it. Its piece of
  code writes the outputs; keys behind the prefix are masked by one scalar bound or, where sums come
  from the matrix unit, weigh nothing (loads.py).

All add to the softmax's state with the window's maximum as the reference of their exponentials.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from packscore_kernels.attention.loads import slot_of, take
from packscore_kernels.attention.outputs import write_rows
from packscore_kernels.attention.pieces import (
    MASKED,
    SUBLANES,
    Stage,
    cut,
    dot,
    lanes,
    pipeline,
    scores,
    sublanes,
    sum8,
    within,
)
from packscore_kernels.attention.refs import Refs, W
from packscore_kernels.attention.uses import ITEMS, NARROW, PREFIX, USE_FIELDS, Use, edge_parts
from packscore_kernels.attention.window import window_stages

TURN = 2  # whole blocks in one straight piece of code
# How the stages of a straight piece are cut and how far their scores run ahead of their softmax:
# found by reading the compiler's schedule on v6e, and good on v5e.
BIG_PIECE, AHEAD = 1024, 2  # rows of a stage over whole blocks
PIECE, EDGE_AHEAD = 256, 4  # rows of a stage that is masked, or mixed with the window's
LEAD, MIXED_AHEAD = 3, 4  # lane groups of the window before the first whole block

Span = tuple[Any, Any]  # first key of a chunk that is seen, and how many: scalars, or i32[1, rows]
Mask = Callable[..., jax.Array]  # scores, block, rows -> scores


def read_use(refs: Refs, i: jax.Array) -> Use:
    """Use i of the work list, as scalars."""
    return Use(*(refs.uses[i * USE_FIELDS + f] for f in range(USE_FIELDS)))


def use_chunk(refs: Refs, i: jax.Array, opens: jax.Array) -> None:
    """Use i of the work list, with the tile's window if it opens the tile."""
    use = read_use(refs, i)
    slot = slot_of(refs, use.load)

    @pl.when(use.fresh == 1)
    def take_it() -> None:
        take(refs, use)

    @pl.when(opens)
    def window_and_first_turn() -> None:
        first_turn(refs, slot, use)

    blocks, whole = use.last_block - use.first_block, use.last_full - use.first_full
    edge = blocks - whole > use.closes

    @pl.when(edge & (use.kind == PREFIX))
    def edge_of_prefix() -> None:
        _edge(refs, slot, use, _prefix_span)

    @pl.when(edge & (use.kind == ITEMS))
    def edge_of_items() -> None:
        _edge(refs, slot, use, _own_span)

    _whole_and_last(refs, slot, use, jnp.where(opens, TURN, 0))
    if refs.shape.count_visits:
        refs.visits[refs.head, refs.tile] += blocks


# Who sees what of a chunk


def _prefix_span(refs: Refs, use: Use, first_row: jax.Array, rows: int) -> Span:
    """What each row sees of a prefix's chunk: all of it; prefix rows, up to their window."""
    row = first_row + lanes(rows)
    window = jnp.maximum((row & -W) - W, refs.first_row) - use.base
    causal = jnp.where(row < use.first_item_row, jnp.minimum(window, use.last_key), use.last_key)
    in_group = (row >= use.first_row) & (row < use.last_row)
    return use.first_key, jnp.where(in_group, jnp.maximum(causal - use.first_key, 0), 0)


def _own_span(refs: Refs, use: Use, first_row: jax.Array, rows: int) -> Span:
    """What each row sees of a chunk of items: its own item, up to its window."""
    row = first_row + lanes(rows)
    at = pl.ds(pl.multiple_of(first_row - refs.first_row, W), rows)
    first = refs.rows[1:2, at] - use.base
    return first, jnp.maximum((row & -W) - W - use.base - first, 0)


def _mask_of(refs: Refs, span: Span) -> Mask:
    """Keeps the scores of a span's keys."""

    def mask(s: jax.Array, block: jax.Array, rows: slice = slice(None)) -> jax.Array:
        first, count = (x[:, rows] if jnp.ndim(x) else x for x in span)
        seen = within(sublanes(*s.shape), first - block * refs.blocks.block_kv, count)
        return jnp.where(seen, s, MASKED)

    return mask


def _keys(
    refs: Refs, slot: jax.Array, block: jax.Array, *, ones: bool = False
) -> tuple[jax.Array, jax.Array]:
    """One block's keys [block_kv, head_dim] and values [head_dim or value_rows, block_kv]."""
    size = refs.blocks.block_kv
    keys = pl.ds(pl.multiple_of(block * size, size), size)
    rows = refs.shape.value_rows if ones else refs.shape.head_dim
    return refs.kv_slots[slot, 0, keys], refs.vt_slots[slot, :rows, keys]


def weigh(refs: Refs, vt: jax.Array, p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted values [head_dim, rows] and the weights' sums [8, rows], still apart by sublane."""
    d = refs.shape.head_dim
    out = dot(vt, p.astype(vt.dtype), 1, 0)
    return (out, sum8(p)) if len(vt) == d else (out[:d], out[d : d + SUBLANES])


# Whole blocks, and the one that closes a tile


def first_turn(refs: Refs, slot: jax.Array, use: Use) -> None:
    """The window together with a prefix's first whole blocks: each fills the other's gaps."""
    lane_groups = window_stages(refs, NARROW)
    blocks = _stages(refs, slot, use.first_full, TURN, PIECE, by_rows=True)
    each = len(blocks) // len(lane_groups)
    stages = lane_groups[:LEAD]
    for i in range(0, len(blocks), each):
        stages += blocks[i : i + each]
        stages += lane_groups[LEAD + i // each : LEAD + i // each + 1]
    pipeline(stages, MIXED_AHEAD)


def _whole_and_last(refs: Refs, slot: jax.Array, use: Use, done: jax.Array) -> None:
    """The whole blocks, TURN at a time; what is left over goes with the one that closes."""
    first = use.first_full + done
    whole = use.last_full - first

    def turn(j: jax.Array, _: None) -> None:
        pipeline(_stages(refs, slot, first + TURN * j, TURN, BIG_PIECE), AHEAD)

    lax.fori_loop(0, whole // TURN, turn, None)
    rest = lax.rem(whole, TURN)
    for n in range(TURN):

        @pl.when((rest == n) & (use.closes == 1))
        def rest_and_last(n: int = n) -> None:
            last = _stages(
                refs, slot, use.last_full - n, n + 1, BIG_PIECE, by_rows=True, live=use.last_key
            )
            pipeline(last, AHEAD)

        if n:

            @pl.when((rest == n) & (use.closes == 0))
            def rest_alone(n: int = n) -> None:
                pipeline(_stages(refs, slot, use.last_full - n, n, BIG_PIECE), AHEAD)


def _stages(
    refs: Refs,
    slot: jax.Array,
    first_block: jax.Array,
    num_blocks: int,
    piece: int,
    *,
    by_rows: bool = False,
    live: jax.Array | None = None,
) -> list[Stage]:
    """Blocks against all rows, some rows of one q head and one block a stage.

    Args:
      refs: the grid step.
      slot: where the chunk lies.
      first_block: of the chunk's blocks.
      num_blocks: from there on.
      piece: rows of a stage.
      by_rows: all blocks of the first rows first, so that what else goes row by row can go between
        them; else block by block.
      live: how many of the chunk's keys are seen, if the last block closes the tile: then it may
        hold others, and the outputs are written.
    """
    pieces, blocks = cut(refs.blocks.block_q, piece), range(num_blocks)
    if by_rows:
        work = [(b, g, rows) for rows in pieces for g in refs.heads for b in blocks]
    else:
        work = [(b, g, rows) for b in blocks for g in refs.heads for rows in pieces]
    # Sums of a piece's blocks so far: the state is read and written once for all of them.
    sums: dict[tuple[int, int], tuple[jax.Array, jax.Array]] = {}

    def closes(b: int) -> bool:
        return live is not None and b == blocks[-1]

    def issue(b: int, g: int, rows: slice) -> jax.Array:
        k, _ = _keys(refs, slot, first_block + b)
        s = scores(k, refs.q[g, rows])
        if not closes(b) or refs.shape.ones:
            return s
        return _mask_of(refs, (0, live))(s, first_block + b)

    def finish(b: int, g: int, rows: slice, s: jax.Array) -> None:
        p = jnp.exp2(s - refs.m[g, :, rows])
        _, vt = _keys(refs, slot, first_block + b, ones=closes(b))
        out, total = weigh(refs, vt, p)
        if b:
            so_far = sums[g, rows.start]
            out, total = so_far[0] + out, so_far[1] + total
        sums[g, rows.start] = out, total
        if b == blocks[-1]:
            out, total = refs.acc[g, :, rows] + out, refs.total[g, :, rows] + total
            if closes(b):
                write_rows(refs, g, rows, out, total)
            else:
                refs.acc[g, :, rows], refs.total[g, :, rows] = out, total

    return [Stage(functools.partial(issue, *w), functools.partial(finish, *w)) for w in work]


# Edges


def _edge(refs: Refs, slot: jax.Array, use: Use, span_of: Callable[..., Span]) -> None:
    """The blocks that are neither whole nor tail, a part of the tile's rows at a time.

    A part goes through the blocks up to the last that one of its rows sees.
    """
    whole = use.last_full - use.first_full
    rows = refs.blocks.block_q // edge_parts(refs.blocks)

    def part(i: jax.Array, _: None) -> None:
        first_row = pl.multiple_of(refs.first_row + i * rows, W)
        mask = _mask_of(refs, span_of(refs, use, first_row, rows))
        last_row = jnp.minimum(first_row + rows, use.last_row) - 1
        end = _end_for(refs, use, last_row)
        last_block = jnp.minimum(pl.cdiv(end, refs.blocks.block_kv), use.last_block - use.closes)
        some = (last_row >= jnp.maximum(first_row, use.first_row)) & (end > use.first_key)

        def one(j: jax.Array, _: None) -> None:
            # Over the whole blocks, which are done.
            block = jnp.where(use.first_block + j < use.first_full, j, j + whole)
            _edge_block(refs, slot, use.first_block + block, mask, i * rows, rows)

        # Whole blocks lie before the end of every part that has rows.
        count = last_block - use.first_block - whole
        lax.fori_loop(0, jnp.where(some, count, 0), one, None)

    lax.fori_loop(0, edge_parts(refs.blocks), part, None)


def _end_for(refs: Refs, use: Use, last_row: jax.Array) -> jax.Array:
    """How far into the chunk the rows up to `last_row` see; the last sees furthest."""
    window = jnp.maximum((last_row & -W) - W, jnp.where(use.kind == ITEMS, 0, refs.first_row))
    causal = (use.kind == ITEMS) | (last_row < use.first_item_row)
    return jnp.where(causal, jnp.minimum(window - use.base, use.last_key), use.last_key)


def _edge_block(
    refs: Refs, slot: jax.Array, block: jax.Array, mask: Mask, first: jax.Array, rows: int
) -> None:
    """One block against `rows` rows of the tile from `first` on."""
    k, vt = _keys(refs, slot, block)
    work = [(g, part) for part in cut(rows, PIECE) for g in refs.heads]

    def in_tile(part: slice) -> Any:
        return pl.ds(pl.multiple_of(first + part.start, W), part.stop - part.start)

    def issue(g: int, part: slice) -> jax.Array:
        return mask(scores(k, refs.q[g, in_tile(part)]), block, part)

    def finish(g: int, part: slice, s: jax.Array) -> None:
        at = in_tile(part)
        p = jnp.exp2(s - refs.m[g, :, at])
        refs.acc[g, :, at] += dot(vt, p.astype(vt.dtype), 1, 0)
        refs.total[g, :, at] += sum8(p)

    stages = [Stage(functools.partial(issue, *w), functools.partial(finish, *w)) for w in work]
    pipeline(stages, EDGE_AHEAD)


# The slow way


def use_chunk_online(refs: Refs, use: Use, slot: jax.Array) -> None:
    """One use with an online maximum, every block masked: good for any scores."""
    rows = refs.blocks.block_q
    own = _own_span(refs, use, refs.first_row, rows)
    prefix = _prefix_span(refs, use, refs.first_row, rows)
    first, count = (jnp.where(use.kind == ITEMS, *pair) for pair in zip(own, prefix, strict=True))
    mask = _mask_of(refs, (first, count))

    def block(b: jax.Array, _: None) -> None:
        def head(g: jax.Array, _: None) -> None:
            k, vt = _keys(refs, slot, b)
            s = mask(scores(k, refs.q[g]), b)
            m = jnp.maximum(refs.m[g], jnp.max(s, axis=0, keepdims=True))
            p, keep = jnp.exp2(s - m), jnp.exp2(refs.m[g] - m)
            refs.acc[g] = refs.acc[g] * keep + dot(vt, p.astype(vt.dtype), 1, 0)
            refs.total[g] = refs.total[g] * keep + sum8(p)
            refs.m[g] = m

        lax.fori_loop(0, refs.shape.group_size, head, None)

    lax.fori_loop(use.first_block, use.last_block, block, None)
