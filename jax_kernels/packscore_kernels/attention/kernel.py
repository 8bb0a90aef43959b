"""The Pallas TPU kernel: one (kv head, q tile) a grid step, scores transposed, no mask stored.

Scores are s' = k q' [keys, rows] and outputs o' = v' p' [head_dim, rows], so that the maximum and
the sum of a row are vectors along lanes. A q tile first does its local window (window.py), whose
maximum is then the fixed reference of all exponentials to come: they wait for nothing. Then it
reads its prefix, and items longer than the window, chunk by chunk as the schedule says (chunks.py,
loads.py). A tile of its prefix's own rows begins with a triangle in the window's place
(triangle.py). Outputs are written with a tile's last products where one piece of code has them
(outputs.py). Where the reference turns out too low (a row's sum passes 2^64, or anything is not
finite), `_redo` does the tile again with an online maximum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from packscore_kernels.attention.chunks import TURN, read_use, use_chunk, use_chunk_online
from packscore_kernels.attention.loads import finish_load, start_load
from packscore_kernels.attention.outputs import clear_padding, failed, write
from packscore_kernels.attention.refs import Ref, Refs, Shape, W
from packscore_kernels.attention.triangle import triangle
from packscore_kernels.attention.uses import HERE, NARROW, PREFIX, USE_FIELDS, have_triangles
from packscore_kernels.attention.window import window


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
    last_index = refs.uses.shape[0] // USE_FIELDS - 1
    first = read_use(refs, jnp.minimum(first_use, last_index))
    last = read_use(refs, jnp.maximum(last_use - 1, 0))
    narrow, some = refs.narrow[refs.tile] == 1, first_use < last_use
    here = some & (first.kind == HERE)
    fused = some & narrow & (first.kind == PREFIX) & (first.last_full - first.first_full >= TURN)

    if have_triangles(refs.blocks):

        @pl.when(here)
        def own_triangle() -> None:
            triangle(refs, first)

    @pl.when(narrow & ~fused & ~here)
    def narrow_window() -> None:
        window(refs, NARROW)

    @pl.when(~narrow & ~here)
    def wide_window() -> None:
        window(refs, W)

    def chunk(i: jax.Array, _: None) -> None:
        use_chunk(refs, i, fused & (i == first_use))

    others = first_use + jnp.where(here, 1, 0)
    lax.fori_loop(others, last_use, chunk, None)

    @pl.when((others == last_use) & ~here | (others < last_use) & (last.closes == 0))
    def write_what_is_not() -> None:
        write(refs)

    @pl.when(failed(refs))
    def again() -> None:
        _redo(refs, first_use, last_use)
        write(refs)

    @pl.when(refs.first_row + refs.blocks.block_q > refs.counts[0])
    def clear() -> None:
        clear_padding(refs)


def _redo(refs: Refs, first_use: jax.Array, last_use: jax.Array) -> None:
    """The whole tile again, slowly; its chunks go to a slot of their own, the ring stays."""
    slot = jnp.int32(refs.blocks.num_slots)
    window(refs, W, safe=True)

    def one(i: jax.Array, _: None) -> None:
        use = read_use(refs, i)

        # what is at hand is in that slot already
        @pl.when(use.kind != HERE)
        def load() -> None:
            start_load(refs, use.load, slot)
            finish_load(refs, use.load, slot)

        use_chunk_online(refs, use, slot)

    lax.fori_loop(first_use, last_use, one, None)
