"""The Pallas TPU kernel: one (kv head, q tile) a grid step, scores transposed, no mask stored.

Scores are s' = k q' [keys, rows] and outputs o' = v' p' [head_dim, rows], so that the maximum and
the sum of a row are vectors along lanes. A q tile first does its local window (every lane group
of 128 rows against itself and the one before), whose maximum is then the fixed reference of all
exponentials to come: they wait for nothing. Then it reads its prefix, and items longer than the
window, chunk by chunk as the schedule says. Where the reference turns out too low (a row's sum
passes 2^64, or anything is not finite), `redo` does the tile again with an online maximum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from packscore_kernels.attention.pieces import (
    Stage,
    dot,
    lanes,
    pipeline,
    scores,
    sublanes,
    sum8,
    tame,
    within,
)
from packscore_kernels.attention.schedule import (
    LOAD_FIELDS,
    NARROW,
    USE_FIELDS,
    Load,
    Use,
    edge_parts,
)
from packscore_kernels.attention.types import BlockSizes
from packscore_kernels.hardware import LANES

LOG2E = 1.4426950408889634
MASKED = -1e30
SUM_LIMIT = 2.0**64  # leaves as much room again for the values
W = LANES  # rows of a window's tile, and how far it looks back
NUM_PREFETCH = 6
TURN = 2  # whole blocks a turn of the loop over them
# How the stages of a straight piece of code are cut and how far their scores run ahead of their
# softmax: found by reading the compiler's schedule on v6e, and good on v5e.
BIG_PIECE, AHEAD = 1024, 2  # rows of a stage over whole blocks
PIECE = 256  # rows of a stage that is mixed with the window's, or masked
WINDOW_AHEAD = MIXED_AHEAD = EDGE_AHEAD = 4
LEAD = 3  # lane groups of the window before the first whole block

Ref = Any
Mask = Callable[..., jax.Array]  # scores, block, rows -> scores


@dataclass(frozen=True)
class Shape:
    """What the kernel is compiled for."""

    group_size: int  # q heads a kv head
    head_dim: int
    num_kv_heads: int
    dtype: Any
    scale: float  # sm_scale * log2(e)
    page_size: int  # 0 without pages
    blocks: BlockSizes
    count_visits: bool


class _Body:
    """One grid step's refs and the block functions over them."""

    def __init__(
        self,
        shape: Shape,
        # prefetch
        use_starts: Ref,  # i32[num_q_tiles + 1]
        narrow: Ref,  # i32[num_q_tiles]
        uses: Ref,  # i32[capacity * USE_FIELDS]
        loads: Ref,  # i32[capacity * LOAD_FIELDS]
        pages: Ref,  # i32[max_pages]
        counts: Ref,  # i32[2]
        # inputs
        rows: Ref,  # i32[2, block_q]
        q: Ref,  # [group_size, block_q, head_dim]
        k_before: Ref,  # [1, W, head_dim]
        k_here: Ref,  # [1, block_q, head_dim]
        v_before: Ref,  # [1, W, head_dim]
        v_here: Ref,  # [1, block_q, head_dim]
        k_hbm: Ref,  # [num_kv_heads, num_tokens, head_dim]
        v_hbm: Ref,  # [num_kv_heads, num_tokens, head_dim]
        kv_pages: Ref,  # [num_pages, num_kv_heads, 2, page_size, head_dim]
        # outputs
        o: Ref,  # [group_size, block_q, head_dim]
        visits: Ref,  # i32[num_kv_heads, num_q_tiles]
        # scratch
        kv_slots: Ref,  # [num_slots + 1, 2, chunk_kv, head_dim]
        vt_slots: Ref,  # [num_slots + 1, head_dim, chunk_kv]
        m: Ref,  # f32[group_size, 1, block_q]: reference of the exponentials
        total: Ref,  # f32[group_size, 8, block_q]: sums, still apart by sublane
        acc: Ref,  # f32[group_size, head_dim, block_q]
        sems: Ref,  # one DMA semaphore a slot
    ) -> None:
        self.shape, self.blocks = shape, shape.blocks
        self.use_starts, self.narrow, self.uses = use_starts, narrow, uses
        self.loads, self.pages, self.counts = loads, pages, counts
        self.rows, self.q, self.o, self.visits = rows, q, o, visits
        self.k_before, self.k_here, self.v_before, self.v_here = k_before, k_here, v_before, v_here
        self.k_hbm, self.v_hbm, self.kv_pages = k_hbm, v_hbm, kv_pages
        self.kv_slots, self.vt_slots, self.sems = kv_slots, vt_slots, sems
        self.m, self.total, self.acc = m, total, acc
        self.head, self.tile = pl.program_id(0), pl.program_id(1)
        self.first_row = self.tile * self.blocks.block_q
        self.heads = range(shape.group_size)

    # Loading chunks

    def _copies(self, ordinal: jax.Array, slot: jax.Array, act: Callable[[Any], None]) -> None:
        """Start, or wait for, the copies of one load."""
        at = ordinal * LOAD_FIELDS
        load = Load(*(self.loads[at + i] for i in range(LOAD_FIELDS)))
        block, page = self.blocks.block_kv, self.shape.page_size

        @pl.when(load.paged == 0)
        def _() -> None:
            def body(b: jax.Array, _: None) -> None:
                rows = pl.ds(pl.multiple_of(load.start + b * block, block), block)
                keys = pl.ds(pl.multiple_of(b * block, block), block)
                for i, source in enumerate((self.k_hbm, self.v_hbm)):
                    act(
                        pltpu.make_async_copy(
                            source.at[self.head, rows],
                            self.kv_slots.at[slot, i, keys],
                            self.sems.at[slot],
                        )
                    )

            lax.fori_loop(0, load.num_blocks, body, None)

        if page:

            @pl.when(load.paged == 1)
            def _() -> None:
                def body(p: jax.Array, _: None) -> None:
                    keys = pl.ds(pl.multiple_of(p * page, page), page)
                    act(
                        pltpu.make_async_copy(
                            self.kv_pages.at[self.pages[load.start + p], self.head],
                            self.kv_slots.at[slot, :, keys],
                            self.sems.at[slot],
                        )
                    )

                lax.fori_loop(0, load.num_pages, body, None)

    def start_load(self, ordinal: jax.Array, slot: jax.Array) -> None:
        self._copies(ordinal, slot, lambda copy: copy.start())

    def finish_load(self, ordinal: jax.Array, slot: jax.Array) -> None:
        """Wait for a chunk and put it into the form the matrix unit takes."""
        self._copies(ordinal, slot, lambda copy: copy.wait())

        def body(b: jax.Array, _: None) -> None:
            keys = pl.ds(pl.multiple_of(b * self.blocks.block_kv, LANES), self.blocks.block_kv)
            k, v = tame(
                self.kv_slots[slot, 0, keys], self.kv_slots[slot, 1, keys], self.shape.scale
            )
            self.kv_slots[slot, 0, keys] = k
            self.vt_slots[slot, :, keys] = v.T

        lax.fori_loop(0, self.loads[ordinal * LOAD_FIELDS + 2], body, None)

    def slot_of(self, ordinal: jax.Array) -> jax.Array:
        return lax.rem(ordinal, self.blocks.num_slots)

    # The local window

    def _window_keys(self, c: int, back: int, safe: bool) -> tuple[jax.Array, jax.Array]:
        if c:
            at = slice(c * W - back, (c + 1) * W)
            k, v = self.k_here[0, at], self.v_here[0, at]
        else:
            k = jnp.concatenate([self.k_before[0, W - back :], self.k_here[0, :W]], axis=0)
            v = jnp.concatenate([self.v_before[0, W - back :], self.v_here[0, :W]], axis=0)
        return tame(k, v, 1.0) if safe else (k, v)

    def _window_stages(self, back: int, safe: bool) -> list[Stage]:
        """Each lane group of rows against its own keys and the `back` before them."""
        size = self.shape.group_size * W

        def issue(c: int) -> tuple[jax.Array, jax.Array]:
            k, v = self._window_keys(c, back, safe)
            q = jnp.concatenate([self.q[g, c * W : (c + 1) * W] for g in self.heads], axis=0)
            return scores(k, q), v

        def finish(c: int, issued: tuple[jax.Array, jax.Array]) -> None:
            s, v = issued
            own = self.rows[:1, c * W : (c + 1) * W] - (self.first_row + c * W - back)
            first = jnp.concatenate([jnp.maximum(own, 0)] * self.shape.group_size, axis=1)
            last = (lanes(size) & (W - 1)) + back
            seen = within(sublanes(*s.shape), first, last - first + 1)
            s = jnp.where(seen, s * self.shape.scale, MASKED)
            m = jnp.max(s, axis=0, keepdims=True)
            p = jnp.exp2(s - m)
            out = dot(v.T, p.astype(v.dtype), 1, 0)
            total = sum8(p)
            for g in self.heads:
                rows, columns = slice(c * W, (c + 1) * W), slice(g * W, (g + 1) * W)
                self.m[g, :, rows] = m[:, columns]
                self.total[g, :, rows] = total[:, columns]
                self.acc[g, :, rows] = out[:, columns]

        return [
            Stage(functools.partial(issue, c), functools.partial(finish, c))
            for c in range(self.blocks.block_q // W)
        ]

    def window(self, back: int, safe: bool = False) -> None:
        pipeline(self._window_stages(back, safe), WINDOW_AHEAD)

    # Chunks

    def _keys(self, slot: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = pl.ds(
            pl.multiple_of(block * self.blocks.block_kv, self.blocks.block_kv), self.blocks.block_kv
        )
        return self.kv_slots[slot, 0, keys], self.vt_slots[slot, :, keys]

    def _prefix_keys(self, use: Use, first_row: jax.Array, rows: int) -> tuple[Any, Any]:
        """First key and number of keys of a prefix's chunk that each row sees; i32[1, rows]."""
        row = first_row + lanes(rows)
        window = jnp.maximum((row & -W) - W, self.first_row) - use.base
        causal = jnp.where(
            row < use.first_item_row, jnp.minimum(window, use.last_key), use.last_key
        )
        in_group = (row >= use.first_row) & (row < use.last_row)
        return use.first_key, jnp.where(in_group, jnp.maximum(causal - use.first_key, 0), 0)

    def _own_keys(self, use: Use, first_row: jax.Array, rows: int) -> tuple[Any, Any]:
        """First key and number of keys of its own item, before its window; i32[1, rows]."""
        row = first_row + lanes(rows)
        at = pl.ds(pl.multiple_of(first_row - self.first_row, W), rows)
        first = self.rows[1:2, at] - use.base
        return first, jnp.maximum((row & -W) - W - use.base - first, 0)

    def _block_stages(
        self, slot: jax.Array, first_block: jax.Array, masks: Sequence[Mask | None], by_rows: bool
    ) -> list[Stage]:
        """Some blocks against the fixed reference, a piece of their rows at a time."""
        piece = min(PIECE if by_rows else BIG_PIECE, self.blocks.block_q)
        pieces = [(g, r) for g in self.heads for r in range(0, self.blocks.block_q, piece)]
        if by_rows:
            pieces.sort(key=lambda p: p[1])
        blocks = range(len(masks))
        work = (
            [(b, p) for p in pieces for b in blocks]
            if by_rows
            else [(b, p) for b in blocks for p in pieces]
        )
        done: dict[tuple[int, int], tuple[jax.Array, jax.Array]] = {}

        def issue(b: int, g: int, r: int) -> jax.Array:
            k, _ = self._keys(slot, first_block + b)
            s, mask = scores(k, self.q[g, r : r + piece]), masks[b]
            return s if mask is None else mask(s, first_block + b, slice(r, r + piece))

        def finish(b: int, g: int, r: int, s: jax.Array) -> None:
            rows = slice(r, r + piece)
            p = jnp.exp2(s - self.m[g, :, rows])
            _, vt = self._keys(slot, first_block + b)
            out, total = dot(vt, p.astype(vt.dtype), 1, 0), sum8(p)
            if b:
                out, total = done[g, r][0] + out, done[g, r][1] + total
            done[g, r] = out, total
            if b == blocks[-1]:
                self.acc[g, :, rows] += out
                self.total[g, :, rows] += total

        return [
            Stage(functools.partial(issue, b, g, r), functools.partial(finish, b, g, r))
            for b, (g, r) in work
        ]

    def _fixed(self, slot: jax.Array, first_block: jax.Array, masks: Sequence[Mask | None]) -> None:
        pipeline(self._block_stages(slot, first_block, masks, by_rows=False), AHEAD)

    def _mask(self, first: jax.Array, count: jax.Array) -> Mask:
        """Keep `count` keys of the chunk from `first` on; scalars, or one number a row."""

        def mask(s: jax.Array, block: jax.Array, rows: slice = slice(None)) -> jax.Array:
            at, number = (x[:, rows] if jnp.ndim(x) else x for x in (first, count))
            seen = within(sublanes(*s.shape), at - block * self.blocks.block_kv, number)
            return jnp.where(seen, s, MASKED)

        return mask

    def _tail_mask(self, use: Use) -> Mask:
        return self._mask(use.first_key, use.last_key - use.first_key)

    def _read_use(self, i: jax.Array) -> Use:
        return Use(*(self.uses[i * USE_FIELDS + f] for f in range(USE_FIELDS)))

    def chunk(self, i: jax.Array, done: jax.Array) -> None:
        """One use of a chunk: whole blocks after the first `done`, without a mask, and the rest."""
        use = self._read_use(i)
        slot = self.slot_of(use.load)

        @pl.when(use.fresh == 1)
        def _() -> None:
            self.finish_load(use.load, slot)

            @pl.when(use.load + 1 < self.counts[1])
            def _() -> None:
                self.start_load(use.load + 1, self.slot_of(use.load + 1))

        self._whole(slot, use, done)

        partial = use.last_block - use.first_block - (use.last_full - use.first_full) > use.tail

        @pl.when(partial & (use.own == 0))
        def _() -> None:
            self._edge(slot, use, self._prefix_keys)

        @pl.when(partial & (use.own == 1))
        def _() -> None:
            self._edge(slot, use, self._own_keys)

        if self.shape.count_visits:
            self.visits[self.head, self.tile] += use.last_block - use.first_block

    def _whole(self, slot: jax.Array, use: Use, done: jax.Array) -> None:
        """The blocks every row sees whole, TURN at a time; what is left goes with the tail."""
        first = use.first_full + done
        whole = use.last_full - first

        def turn(j: jax.Array, _: None) -> None:
            self._fixed(slot, first + TURN * j, [None] * TURN)

        lax.fori_loop(0, whole // TURN, turn, None)
        rest = lax.rem(whole, TURN)
        for n in range(TURN):

            @pl.when((rest == n) & (use.tail == 1))
            def _(n: int = n) -> None:
                self._fixed(slot, use.last_full - n, [None] * n + [self._tail_mask(use)])

            if n:

                @pl.when((rest == n) & (use.tail == 0))
                def _(n: int = n) -> None:
                    self._fixed(slot, use.last_full - n, [None] * n)

    def _edge(self, slot: jax.Array, use: Use, keys: Callable[..., tuple[Any, Any]]) -> None:
        """The blocks that only some rows or keys take part in, part of the rows at a time."""
        whole = use.last_full - use.first_full
        rows = self.blocks.block_q // edge_parts(self.blocks)

        def part(i: jax.Array, _: None) -> None:
            first_row = pl.multiple_of(self.first_row + i * rows, W)
            mask = self._mask(*keys(use, first_row, rows))
            last_row = jnp.minimum(first_row + rows, use.last_row) - 1
            window = jnp.maximum((last_row & -W) - W, jnp.where(use.own == 1, 0, self.first_row))
            causal = (use.own == 1) | (last_row < use.first_item_row)
            end = jnp.where(causal, jnp.minimum(window - use.base, use.last_key), use.last_key)
            last_block = jnp.minimum(pl.cdiv(end, self.blocks.block_kv), use.last_block - use.tail)
            some = (last_row >= jnp.maximum(first_row, use.first_row)) & (end > use.first_key)

            def body(j: jax.Array, _: None) -> None:
                block = jnp.where(use.first_block + j < use.first_full, j, j + whole)
                self._edge_block(slot, use.first_block + block, mask, i * rows, rows)

            # Whole blocks lie before the end of every part that has rows.
            count = last_block - use.first_block - whole
            lax.fori_loop(0, jnp.where(some, count, 0), body, None)

        lax.fori_loop(0, edge_parts(self.blocks), part, None)

    def _edge_block(
        self, slot: jax.Array, block: jax.Array, mask: Mask, first: jax.Array, rows: int
    ) -> None:
        k, vt = self._keys(slot, block)
        piece = min(PIECE, rows)
        work = [(g, r) for r in range(0, rows, piece) for g in self.heads]

        def issue(g: int, r: int) -> jax.Array:
            at = pl.ds(pl.multiple_of(first + r, W), piece)
            return mask(scores(k, self.q[g, at]), block, slice(r, r + piece))

        def finish(g: int, r: int, s: jax.Array) -> None:
            at = pl.ds(pl.multiple_of(first + r, W), piece)
            p = jnp.exp2(s - self.m[g, :, at])
            self.acc[g, :, at] += dot(vt, p.astype(vt.dtype), 1, 0)
            self.total[g, :, at] += sum8(p)

        stages = [Stage(functools.partial(issue, *w), functools.partial(finish, *w)) for w in work]
        pipeline(stages, EDGE_AHEAD)

    def first_turn(self, use: Use) -> None:
        """The window together with a prefix's first whole blocks: each fills the other's gaps."""
        slot = self.slot_of(use.load)
        window = self._window_stages(NARROW, safe=False)
        blocks = self._block_stages(slot, use.first_full, [None] * TURN, by_rows=True)
        each = len(blocks) // len(window)
        stages = window[:LEAD]
        for i in range(0, len(blocks), each):
            stages += blocks[i : i + each]
            stages += window[LEAD + i // each : LEAD + i // each + 1]
        pipeline(stages, MIXED_AHEAD)

    # The end of a tile

    def failed(self) -> jax.Array:
        """Whether a real row's sum or output left the range the fixed reference is good for."""
        rows = self.blocks.block_q
        worst = jnp.zeros((1, rows), jnp.float32)
        for g in self.heads:
            total = jnp.sum(self.total[g], axis=0, keepdims=True)
            # Not finite where any of the row's outputs is not.
            whole = jnp.abs(jnp.sum(sum8(self.acc[g]), axis=0, keepdims=True))
            worst = jnp.where((total < SUM_LIMIT) & (whole < jnp.inf), worst, 1.0)
        real = self.first_row + lanes(rows) < self.counts[0]
        return jnp.max(jnp.where(real, worst, 0.0)) > 0.0

    def write(self) -> None:
        for g in self.heads:
            total = jnp.sum(self.total[g], axis=0, keepdims=True)
            self.o[g] = (self.acc[g] * (1.0 / total)).astype(self.o.dtype).T

    def clear_padding(self) -> None:
        """Zeros in the rows behind the last token."""
        row = self.first_row + sublanes(self.blocks.block_q, self.shape.head_dim)
        for g in self.heads:
            o = self.o[g].astype(jnp.float32)
            self.o[g] = jnp.where(row < self.counts[0], o, 0.0).astype(self.o.dtype)

    def redo(self, first_use: jax.Array, last_use: jax.Array) -> None:
        """The whole tile again, slowly: online maximum, every block masked, own slot."""
        slot = jnp.int32(self.blocks.num_slots)
        self.window(W, safe=True)

        def one(i: jax.Array, _: None) -> None:
            use = self._read_use(i)
            self.start_load(use.load, slot)
            self.finish_load(use.load, slot)
            rows = self.blocks.block_q
            own = self._own_keys(use, self.first_row, rows)
            prefix = self._prefix_keys(use, self.first_row, rows)
            mask = self._mask(
                *(jnp.where(use.own == 1, *pair) for pair in zip(own, prefix, strict=True))
            )

            def block(b: jax.Array, _: None) -> None:
                def head(g: jax.Array, _: None) -> None:
                    k, vt = self._keys(slot, b)
                    s = mask(scores(k, self.q[g]), b)
                    m = jnp.maximum(self.m[g], jnp.max(s, axis=0, keepdims=True))
                    p, keep = jnp.exp2(s - m), jnp.exp2(self.m[g] - m)
                    self.acc[g] = self.acc[g] * keep + dot(vt, p.astype(vt.dtype), 1, 0)
                    self.total[g] = self.total[g] * keep + sum8(p)
                    self.m[g] = m

                lax.fori_loop(0, self.shape.group_size, head, None)

            lax.fori_loop(use.first_block, use.last_block, block, None)

        lax.fori_loop(first_use, last_use, one, None)


def attend(*refs: Ref, shape: Shape) -> None:
    """One grid step: one q tile of one kv head."""
    body = _Body(shape, *refs)
    tile = body.tile

    @pl.when((tile == 0) & (body.counts[1] > 0))
    def _() -> None:
        body.start_load(jnp.int32(0), jnp.int32(0))

    if shape.count_visits:
        body.visits[body.head, tile] = 0

    @pl.when(body.first_row < body.counts[0])
    def _() -> None:
        first_use, last_use = body.use_starts[tile], body.use_starts[tile + 1]
        use = body._read_use(jnp.minimum(first_use, body.uses.shape[0] // USE_FIELDS - 1))
        fused = (
            (body.narrow[tile] == 1)
            & (first_use < last_use)
            & (use.fresh == 0)
            & (use.last_full - use.first_full >= TURN)
        )

        @pl.when(fused)
        def _() -> None:
            body.first_turn(use)

        narrow = body.narrow[tile] == 1

        @pl.when(~fused & narrow)
        def _() -> None:
            body.window(NARROW)

        @pl.when(~narrow)
        def _() -> None:
            body.window(W)

        def chunk(i: jax.Array, _: None) -> None:
            body.chunk(i, jnp.where(fused & (i == first_use), TURN, 0))

        lax.fori_loop(first_use, last_use, chunk, None)

        failed = body.failed()
        body.write()

        @pl.when(failed)
        def _() -> None:
            body.redo(first_use, last_use)
            body.write()

        @pl.when(body.first_row + body.blocks.block_q > body.counts[0])
        def _() -> None:
            body.clear_padding()

    @pl.when(body.first_row >= body.counts[0])
    def _() -> None:
        body.o[...] = jnp.zeros_like(body.o)
