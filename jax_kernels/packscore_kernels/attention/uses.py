"""What each q tile reads beyond its windows: chunk by chunk, as uses of the kernel's work list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from packscore_kernels.attention.layout import Int32Array, SegmentLayout
from packscore_kernels.attention.types import BlockSizes
from packscore_kernels.hardware import LANES, cdiv

# A row's keys further back than its window are read chunk by chunk. In coordinates of one chunk:
NO_CLIP = -(2**30)  # `base` of a chunk from pages: all packed rows come after it
TRIANGLE_SHARE = 4  # a triangle costs less than masked blocks from this part of a tile's rows on
NARROW = 32  # how far the narrow window looks back; the wide one looks back LANES
NEVER = 2**30  # `far_start` of a row whose keys all lie in its window or in a prefix
# What a use reads: a chunk of a prefix, or of items longer than their window, or, with nothing to
# load, the keys of a prefix among the tile's own rows.
PREFIX, ITEMS, HERE = range(3)


class Source(NamedTuple):
    """A run of keys that lie one behind the other."""

    group: int
    start: int  # packed: storage index of block 0; pages: index of its first page number
    paged: bool


class Use(NamedTuple):
    """One q tile reads one chunk. Rows are storage indices; keys and blocks count in the chunk.

    Numbers on the host; scalars of the kernel's memory on the device.
    """

    load: Any  # which load of the ring holds it
    fresh: Any  # 1 for the first use of that load
    kind: Any  # PREFIX, ITEMS or HERE
    closes: Any  # 1: the tile ends with block last_full, of which all rows see all that is live
    first_block: Any
    first_full: Any  # blocks first_full..last_full - 1 are seen whole by every row
    last_full: Any
    last_block: Any
    first_key: Any
    last_key: Any
    base: Any  # storage index of key 0, NO_CLIP for pages
    first_row: Any
    first_item_row: Any  # rows before it are prefix rows: causal
    last_row: Any


class Load(NamedTuple):
    """One chunk on its way into the ring."""

    start: Any  # as in Source
    paged: Any
    num_blocks: Any
    num_pages: Any
    live: Any  # keys of its source; those behind belong to others, or to nobody


USE_FIELDS = len(Use._fields)
LOAD_FIELDS = len(Load._fields)


def edge_parts(blocks: BlockSizes) -> int:
    """In how many parts the rows of a tile go through the blocks that need a mask."""
    return 2 if blocks.block_q % (2 * LANES) == 0 else 1


def have_triangles(blocks: BlockSizes) -> bool:
    """Whether tiles have keys that no window holds, and all of theirs fit into a chunk's slot."""
    return 2 * LANES < blocks.block_q <= blocks.chunk_kv


def window_start(row: int) -> int:
    """First key of the local window of a row: the lane group before its own."""
    return row // LANES * LANES - LANES


@dataclass(frozen=True)
class Tile:
    """One q tile and what it holds of one group."""

    start: int
    end: int  # of its real rows
    group: int
    first_row: int
    first_item_row: int
    last_row: int

    @property
    def whole(self) -> bool:
        """Whether all its real rows are the group's."""
        return self.first_row == self.start and self.last_row == self.end

    @property
    def has_items(self) -> bool:
        """Whether it holds rows of the group's items."""
        return self.last_row > self.first_item_row

    @property
    def has_prefix(self) -> bool:
        """Whether it holds rows of the group's prefix."""
        return self.first_item_row > self.first_row

    def has_triangle(self, blocks: BlockSizes) -> bool:
        """Whether its prefix rows are worth a static triangle of all its rows and keys."""
        prefix_rows = self.first_item_row - self.first_row
        worth = self.whole and TRIANGLE_SHARE * prefix_rows > blocks.block_q
        return worth and have_triangles(blocks)


def tiles(layout: SegmentLayout, block_q: int) -> Iterator[Tile]:
    """Every q tile that holds tokens, once for each group it holds some of."""
    starts = layout.group_starts
    for start in range(0, layout.num_real_tokens, block_q):
        end = min(start + block_q, layout.num_real_tokens)
        first = int(np.searchsorted(starts, start, side="right")) - 1
        for g in range(first, len(layout.groups)):
            if starts[g] >= end:
                break
            low, high = max(start, int(starts[g])), min(end, int(starts[g + 1]))
            if high > low:
                items = int(starts[g]) + layout.groups[g].prefix_len
                yield Tile(start, end, g, low, min(max(items, low), high), high)


def _prefix_uses(
    tile: Tile, source: Source, keys: tuple[int, int], blocks: BlockSizes
) -> Iterator[tuple[Source, int, Use]]:
    """Chunk by chunk what a tile reads of a prefix; `keys` counts from the source's start."""
    first_key, last_key = keys
    base = NO_CLIP if source.paged else source.start
    clipped = tile.has_prefix and not source.paged
    # Keys every row of the tile sees: prefix rows are causal and leave their window out.
    common = min(last_key, tile.start - base) if clipped else last_key
    if not tile.has_items and clipped:
        last_key = min(last_key, max(window_start(tile.first_item_row - 1), tile.start) - base)
    common = common if tile.whole else first_key
    bkv, per_chunk = blocks.block_kv, blocks.chunk_kv // blocks.block_kv
    first_full, last_full = cdiv(first_key, bkv), common // bkv
    if last_key <= first_key:
        return
    for block in range(first_key // bkv // per_chunk * per_chunk, cdiv(last_key, bkv), per_chunk):
        first_block = max(first_key // bkv - block, 0)
        last_block = min(cdiv(last_key, bkv) - block, per_chunk)
        full = min(max(first_full - block, first_block), last_block)
        full_end = max(min(last_full - block, last_block), full)
        yield (
            source,
            block,
            Use(
                load=-1,
                fresh=0,
                kind=PREFIX,
                closes=int(tile.whole and not clipped and full_end < last_block),
                first_block=first_block,
                first_full=full,
                last_full=full_end,
                last_block=last_block,
                first_key=max(first_key - block * bkv, 0),
                last_key=min(last_key - block * bkv, blocks.chunk_kv),
                base=base + (0 if source.paged else block * bkv),
                first_row=tile.first_row,
                first_item_row=tile.first_item_row if clipped else tile.first_row,
                last_row=tile.last_row,
            ),
        )


def _own_uses(
    rows: tuple[int, int], far: tuple[int, int], blocks: BlockSizes
) -> Iterator[tuple[Source, int, Use]]:
    """Chunk by chunk what a tile reads of items that are longer than the local window."""
    bkv, per_chunk = blocks.block_kv, blocks.chunk_kv // blocks.block_kv
    source = Source(-1, 0, False)
    for block in range(far[0] // bkv // per_chunk * per_chunk, cdiv(far[1], bkv), per_chunk):
        first = max(far[0] // bkv - block, 0)
        last = min(cdiv(far[1], bkv) - block, per_chunk)
        yield (
            source,
            block,
            Use(
                load=-1,
                fresh=0,
                kind=ITEMS,
                closes=0,
                first_block=first,
                first_full=last,
                last_full=last,
                last_block=last,
                first_key=0,
                last_key=blocks.chunk_kv,
                base=block * bkv,
                first_row=rows[0],
                first_item_row=rows[0],
                last_row=rows[1],
            ),
        )


def steps(
    tile: Tile, layout: SegmentLayout, first_page: int, far: Int32Array, blocks: BlockSizes
) -> Iterator[tuple[Source, int, Use]]:
    """Chunk by chunk what a tile reads of one group: first what is masked by rows."""
    group, first = layout.groups[tile.group], int(layout.group_starts[tile.group])
    last = first + group.prefix_len
    here = tile.has_triangle(blocks)
    if here:
        own = Source(tile.group, tile.start, False)
        keys = 0, min(last - tile.start, blocks.block_q)
        for source, block, use in _prefix_uses(tile, own, keys, blocks):
            yield source, block, use._replace(kind=HERE)
        last = tile.start
    if tile.last_row == tile.end:
        rows = np.flatnonzero(far != NEVER)
        if len(rows):
            span = tile.start + int(rows[0]), tile.start + int(rows[-1]) + 1
            keys = int(far[rows].min()), window_start(span[1] - 1)
            yield from _own_uses(span, keys, blocks)
    if group.cached_len:
        pages = Source(tile.group, first_page, True)
        yield from _prefix_uses(tile, pages, (0, group.cached_len), blocks)
    if group.prefix_len:
        base = first // blocks.block_kv * blocks.block_kv
        keys = first - base, max(last - base, first - base)
        yield from _prefix_uses(tile, Source(tile.group, base, False), keys, blocks)


def closed(uses: list[Use], tile: Tile) -> list[Use]:
    """A tile's uses, of which the last alone may close it, and does so if it can."""
    *others, last = [use._replace(closes=0) for use in uses[:-1]] + uses[-1:]
    whole = last.last_full == last.last_block and last.last_full > last.first_full
    if tile.whole and last.kind == PREFIX and whole:
        last = last._replace(last_full=last.last_full - 1, closes=1)
    return [*others, last]
