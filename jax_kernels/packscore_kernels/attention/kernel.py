"""The Pallas TPU kernel: one (kv head, q tile) a grid step, scores transposed, no mask stored.

Scores are s' = k q' [keys, rows] and outputs o' = v' p' [head_dim, rows], so that the maximum and
the sum of a row are vectors along lanes. A q tile first does its local window (window.py), whose
maximum is then the fixed reference of all exponentials to come: they wait for nothing. Then it
reads its prefix, and items longer than the window, chunk by chunk as the schedule says (chunks.py,
loads.py). Where the reference turns out too low (a row's sum passes 2^64, or anything is not
finite), `_redo` does the tile again with an online maximum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from packscore_kernels.attention.chunks import (
    TURN,
    block_stages,
    read_use,
    use_chunk,
    use_chunk_online,
)
from packscore_kernels.attention.loads import finish_load, slot_of, start_load
from packscore_kernels.attention.pieces import lanes, pipeline, sublanes, sum8
from packscore_kernels.attention.refs import Ref, Refs, Shape, W
from packscore_kernels.attention.schedule import NARROW, USE_FIELDS, Use
from packscore_kernels.attention.window import window, window_stages

SUM_LIMIT = 2.0**64  # leaves as much room again for the values
# Of the first turn, found like the numbers in chunks.py:
LEAD = 3  # lane groups of the window before the first whole block
MIXED_AHEAD = 4  # stages whose scores run ahead of their softmax


def attend(shape: Shape, *arrays: Ref) -> None:
    """One grid step: one q tile of one kv head; `arrays` are the refs that `Refs` names."""
    head, tile = pl.program_id(0), pl.program_id(1)
    refs = Refs(shape, head, tile, tile * shape.blocks.block_q, *arrays)

    @pl.when((tile == 0) & (refs.counts[1] > 0))
    def send_for_the_first_chunk() -> None:
        start_load(refs, jnp.int32(0), jnp.int32(0))

    if shape.count_visits:
        refs.visits[head, tile] = 0

    @pl.when(refs.first_row < refs.counts[0])
    def live() -> None:
        _live_tile(refs)

    @pl.when(refs.first_row >= refs.counts[0])
    def dead() -> None:
        refs.o[...] = jnp.zeros_like(refs.o)


def _live_tile(refs: Refs) -> None:
    """A tile that has a token."""
    first_use, last_use = refs.use_starts[refs.tile], refs.use_starts[refs.tile + 1]
    use = read_use(refs, jnp.minimum(first_use, refs.uses.shape[0] // USE_FIELDS - 1))
    fused = (
        (refs.narrow[refs.tile] == 1)
        & (first_use < last_use)
        & (use.fresh == 0)
        & (use.last_full - use.first_full >= TURN)
    )

    @pl.when(fused)
    def window_and_first_turn() -> None:
        _first_turn(refs, use)

    narrow = refs.narrow[refs.tile] == 1

    @pl.when(~fused & narrow)
    def narrow_window() -> None:
        window(refs, NARROW)

    @pl.when(~narrow)
    def wide_window() -> None:
        window(refs, W)

    def chunk(i: jax.Array, _: None) -> None:
        use_chunk(refs, i, jnp.where(fused & (i == first_use), TURN, 0))

    lax.fori_loop(first_use, last_use, chunk, None)

    failed = _failed(refs)
    _write(refs)

    @pl.when(failed)
    def again() -> None:
        _redo(refs, first_use, last_use)
        _write(refs)

    @pl.when(refs.first_row + refs.blocks.block_q > refs.counts[0])
    def clear() -> None:
        _clear_padding(refs)


def _first_turn(refs: Refs, use: Use) -> None:
    """The window together with a prefix's first whole blocks: each fills the other's gaps."""
    slot = slot_of(refs, use.load)
    lane_groups = window_stages(refs, NARROW)
    blocks = block_stages(refs, slot, use.first_full, [None] * TURN, by_rows=True)
    each = len(blocks) // len(lane_groups)
    stages = lane_groups[:LEAD]
    for i in range(0, len(blocks), each):
        stages += blocks[i : i + each]
        stages += lane_groups[LEAD + i // each : LEAD + i // each + 1]
    pipeline(stages, MIXED_AHEAD)


# The end of a tile


def _failed(refs: Refs) -> jax.Array:
    """Whether a real row's sum or output left the range the fixed reference is good for."""
    rows = refs.blocks.block_q
    worst = jnp.zeros((1, rows), jnp.float32)
    for g in refs.heads:
        total = jnp.sum(refs.total[g], axis=0, keepdims=True)
        # Not finite where any of the row's outputs is not.
        whole = jnp.abs(jnp.sum(sum8(refs.acc[g]), axis=0, keepdims=True))
        worst = jnp.where((total < SUM_LIMIT) & (whole < jnp.inf), worst, 1.0)
    real = refs.first_row + lanes(rows) < refs.counts[0]
    return jnp.max(jnp.where(real, worst, 0.0)) > 0.0


def _write(refs: Refs) -> None:
    """The outputs: sums of values over sums of weights, rows along sublanes again."""
    for g in refs.heads:
        total = jnp.sum(refs.total[g], axis=0, keepdims=True)
        refs.o[g] = (refs.acc[g] * (1.0 / total)).astype(refs.o.dtype).T


def _clear_padding(refs: Refs) -> None:
    """Zeros in the rows behind the last token."""
    row = refs.first_row + sublanes(refs.blocks.block_q, refs.shape.head_dim)
    for g in refs.heads:
        o = refs.o[g].astype(jnp.float32)
        refs.o[g] = jnp.where(row < refs.counts[0], o, 0.0).astype(refs.o.dtype)


def _redo(refs: Refs, first_use: jax.Array, last_use: jax.Array) -> None:
    """The whole tile again, slowly; its chunks go to a slot of their own, the ring stays."""
    slot = jnp.int32(refs.blocks.num_slots)
    window(refs, W, safe=True)

    def one(i: jax.Array, _: None) -> None:
        use = read_use(refs, i)
        start_load(refs, use.load, slot)
        finish_load(refs, use.load, slot)
        use_chunk_online(refs, use, slot)

    lax.fori_loop(first_use, last_use, one, None)
