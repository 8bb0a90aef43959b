"""Attention of a few rows among all tokens' keys, for whoever reads those rows alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from packscore_kernels.attention.types import SegmentSchedule
from packscore_kernels.attention.xla import MASKED, State, scores_of, start_of
from packscore_kernels.hardware import cdiv

# Rows of a tile, and keys that it meets at a time.
TILE_ROWS = 256
BLOCK_KEYS = 512
# By which a compiled program's text knows the loops whose turns are data.
PACKED_BLOCKS, CACHED_BLOCKS = "packed_blocks", "cached_blocks"
Step = Callable[[jax.Array, State], State]


class _Rows(NamedTuple):
    """What rows see, i32[num_rows, 1] each; of padding all of it is empty."""

    row: jax.Array
    own: jax.Array  # first key of its own segment
    start: jax.Array  # of its group
    prefix_end: jax.Array  # of its group's packed prefix, none of it behind the row
    cached: jax.Array  # keys in pages
    first_page: jax.Array  # entry of page_indices

    @classmethod
    def of(cls, schedule: SegmentSchedule, rows: jax.Array) -> _Rows:
        group_ids = jnp.asarray(schedule.group_ids)[rows]
        groups = jnp.asarray(schedule.groups)
        if not groups.shape[0]:
            groups = jnp.zeros((1, 4), jnp.int32)
        start, prefix_end, cached, first_page = groups[jnp.maximum(group_ids, 0)].T
        is_real = group_ids >= 0
        own = jnp.asarray(schedule.rows)[0, rows]
        found = (
            jnp.where(is_real, rows, -1),
            own,
            start,
            jnp.minimum(prefix_end, rows + 1),
            jnp.where(is_real, cached, 0),
            first_page,
        )
        return cls(*(x[:, None] for x in found))

    def sees(self, key: jax.Array) -> jax.Array:
        """bool[num_rows, num_keys]: packed keys, by their storage index."""
        in_own = (key >= self.own) & (key <= self.row)
        return in_own | ((key >= self.start) & (key < self.prefix_end) & (self.row >= 0))

    def sees_cached(self, slot: jax.Array, page_size: int) -> jax.Array:
        """The same of keys in pages, by entry of page_indices and slot of the page in one."""
        at = slot - self.first_page * page_size
        return (at >= 0) & (at < self.cached)


def _fold(
    state: State,
    queries: jax.Array,  # [num_kv_heads, group_size, rows, head_dim]
    k: jax.Array,  # [num_kv_heads, keys, head_dim]
    v: jax.Array,  # [num_kv_heads, keys, head_dim]
    seen: jax.Array,  # bool[rows, keys]
    sm_scale: float,
) -> State:
    """One step of the online softmax. A row that sees a value that is not finite becomes NaN."""
    m, total, acc = state
    s = jnp.where(seen, scores_of(queries, k, sm_scale), MASKED)
    new_m = jnp.maximum(m, s.max(axis=-1, keepdims=True))
    p = jnp.where(seen, jnp.exp(s - new_m), 0.0)
    keep = jnp.exp(m - new_m)
    # what a row may not see must not reach it as NaN times zero
    bad = ~jnp.isfinite(v)
    out = jnp.einsum(
        "hgqk,hkd->hgqd",
        p.astype(v.dtype),
        jnp.where(bad, 0, v),
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    spoilt = (seen & bad.any(axis=(0, 2))).any(axis=-1, keepdims=True)
    out = jnp.where(spoilt, jnp.nan, out)
    return new_m, total * keep + p.sum(axis=-1, keepdims=True), acc * keep + out


class _Blocks(NamedTuple):
    """Where the blocks of keys begin that a tile may need: packed ones, and entries of pages."""

    packed: jax.Array  # i32[num_blocks]: storage index
    block: int
    entries: jax.Array  # i32[num_blocks]: into page_indices
    at_once: int  # pages
    page_size: int

    @classmethod
    def of(cls, schedule: SegmentSchedule) -> _Blocks:
        num_tokens, size = schedule.num_tokens, schedule.page_size
        block, at_once = min(BLOCK_KEYS, num_tokens), max(BLOCK_KEYS // size, 1) if size else 1
        packed = jnp.arange(cdiv(num_tokens, block)) * block
        num_entries = len(schedule.page_indices) if size else 0
        return cls(packed, block, jnp.arange(cdiv(num_entries, at_once)) * at_once, at_once, size)

    def needed(self, about: _Rows) -> tuple[jax.Array, jax.Array]:
        """bool[num_blocks] each: packed blocks and blocks of pages of which a row sees some."""

        def meets(first: jax.Array, end: jax.Array, begin: jax.Array, size: int) -> jax.Array:
            return ((first < begin + size) & (end > begin) & (end > first)).any(axis=0)

        prefix_end = jnp.where(about.row < 0, 0, about.prefix_end)
        packed = meets(about.own, about.row + 1, self.packed, self.block)
        packed |= meets(about.start, prefix_end, self.packed, self.block)
        first = about.first_page * self.page_size
        slots = self.entries * self.page_size, self.at_once * self.page_size
        return packed, meets(first, first + about.cached, *slots)


def blocks_met(schedule: SegmentSchedule, rows: jax.Array) -> tuple[int, int]:
    """How many packed blocks and blocks of pages all tiles of rows meet."""
    blocks = _Blocks.of(schedule)
    tiles = _tiled(jnp.asarray(rows))
    found = [blocks.needed(_Rows.of(schedule, tile)) for tile in tiles]
    return sum(int(x.sum()) for x, _ in found), sum(int(x.sum()) for _, x in found)


def _tiled(rows: jax.Array) -> jax.Array:
    """i32[num_tiles, rows of a tile]; the last row fills up the last tile."""
    tile = min(TILE_ROWS, len(rows))
    return jnp.pad(rows, (0, -len(rows) % tile), mode="edge").reshape(-1, tile)


@jax.named_scope("row_attention")  # by which a profile knows it
def segment_attention_rows(
    q: jax.Array,  # [num_q_heads, num_rows, head_dim]
    k: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    v: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    kv_pages: jax.Array | None,  # [num_pages, num_kv_heads, 2, page_size, head_dim]
    schedule: SegmentSchedule,
    rows: jax.Array,  # i32[num_rows]
    *,
    sm_scale: float,
) -> jax.Array:
    """`segment_paged_attention` of some of the packed tokens, block by block of what they see.

    Args:
      q: queries of the rows.
      k: keys of all packed tokens.
      v: values of all packed tokens.
      kv_pages: keys (0) and values (1) of the cached prefix tokens.
      schedule: of all packed tokens, of which the tokens' and groups' numbers are read.
      rows: which tokens, in any order; rows near each other share blocks of keys.
      sm_scale: factor on the scores before the softmax.

    Returns:
      [num_q_heads, num_rows, head_dim] in the dtype of q; padding rows are zeros.
    """
    (num_q_heads, num_rows, head_dim), (num_kv_heads, num_tokens, _) = q.shape, k.shape
    tiles = _tiled(rows)
    num_tiles, tile = tiles.shape
    queries = jnp.pad(q, ((0, 0), (0, num_tiles * tile - num_rows), (0, 0)))
    queries = queries.reshape(num_kv_heads, -1, num_tiles, tile, head_dim)
    blocks = _Blocks.of(schedule)
    page_indices = jnp.asarray(schedule.page_indices)

    def one_tile(given: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, own_rows = given
        about = _Rows.of(schedule, own_rows)

        def packed(first: jax.Array, state: State) -> State:
            start = jnp.minimum(first, num_tokens - blocks.block)  # the last one begins earlier
            keys, values = (lax.dynamic_slice_in_dim(x, start, blocks.block, 1) for x in (k, v))
            index = start + jnp.arange(blocks.block)
            seen = about.sees(index) & (index >= first)
            return _fold(state, queries, keys, values, seen, sm_scale)

        def cached(first: jax.Array, state: State) -> State:
            assert kv_pages is not None
            entries = first + jnp.arange(blocks.at_once)
            pages = kv_pages[page_indices[jnp.minimum(entries, len(page_indices) - 1)]]
            keys, values = pages.transpose(2, 1, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)
            slots = first * blocks.page_size + jnp.arange(keys.shape[1])
            seen = about.sees_cached(slots, blocks.page_size)
            return _fold(state, queries, keys, values, seen, sm_scale)

        def over(firsts: jax.Array, needed: jax.Array, step: Step, state: State) -> State:
            order = firsts[jnp.argsort(~needed, stable=True)]
            found: State = lax.fori_loop(0, needed.sum(), lambda i, x: step(order[i], x), state)
            return found

        of_packed, of_pages = blocks.needed(about)
        with jax.named_scope(PACKED_BLOCKS):
            state = over(blocks.packed, of_packed, packed, start_of(queries))
        if kv_pages is not None:
            with jax.named_scope(CACHED_BLOCKS):
                state = over(blocks.entries, of_pages, cached, state)
        _, total, acc = state
        return jnp.where(about.row < 0, 0.0, acc / total).astype(q.dtype)

    found = lax.map(one_tile, (jnp.moveaxis(queries, 2, 0), tiles))
    out: jax.Array = jnp.moveaxis(found, 0, 2).reshape(num_q_heads, -1, head_dim)
    return out[:, :num_rows]
