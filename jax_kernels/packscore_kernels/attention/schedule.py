"""From a layout to the kernel's work list: numpy, once per batch, shared by all layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from packscore_kernels.attention.layout import PREFIX_SEGMENT, Array, Int32Array, SegmentLayout
from packscore_kernels.attention.types import BlockSizes, SegmentSchedule
from packscore_kernels.attention.validation import check_layout
from packscore_kernels.hardware import LANES, align_to, cdiv

# A row's keys further back than its window are read chunk by chunk. In coordinates of one chunk:
NO_CLIP = -(2**30)  # `base` of a chunk from pages: all packed rows come after it
NARROW = 32  # how far the narrow window looks back; the wide one looks back LANES
NEVER = 2**30  # `far_start` of a row whose keys all lie in its window or in a prefix


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
    own: Any  # 1: rows see their own item from its start; 0: rows see a prefix
    tail: Any  # 1: block last_full is the last, and all rows see the same first keys of it
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


USE_FIELDS = len(Use._fields)
LOAD_FIELDS = len(Load._fields)


def edge_parts(blocks: BlockSizes) -> int:
    """In how many parts the rows of a tile go through the blocks that need a mask."""
    return 2 if blocks.block_q % (2 * LANES) == 0 else 1


def window_start(row: int) -> int:
    """First key of the local window of a row: the lane group before its own."""
    return row // LANES * LANES - LANES


@dataclass(frozen=True)
class _Tile:
    """One q tile and what it holds of one group."""

    start: int
    end: int  # of its real rows
    group: int
    first_row: int
    first_item_row: int
    last_row: int

    @property
    def whole(self) -> bool:
        return self.first_row == self.start and self.last_row == self.end

    @property
    def has_items(self) -> bool:
        return self.last_row > self.first_item_row

    @property
    def has_prefix(self) -> bool:
        return self.first_item_row > self.first_row


def _tiles(layout: SegmentLayout, block_q: int) -> Iterator[_Tile]:
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
                yield _Tile(start, end, g, low, min(max(items, low), high), high)


def _prefix_uses(
    tile: _Tile, source: Source, keys: tuple[int, int], blocks: BlockSizes
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
                own=0,
                tail=int(tile.whole and not clipped and full_end < last_block),
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
                own=1,
                tail=0,
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


class _Ring:
    """Which chunk the kernel loads when: first in, first out, one load ahead of its use."""

    def __init__(self, blocks: BlockSizes) -> None:
        self.resident = blocks.num_slots - 1
        self.keys: list[tuple[Source, int]] = []
        self.loads: list[Load] = []

    def find(self, key: tuple[Source, int], load: Load) -> tuple[int, int]:
        recent = self.keys[-self.resident :]
        if key in recent:
            ordinal = len(self.keys) - len(recent) + recent.index(key)
            # A later tile may read further into the chunk than the one it was loaded for.
            held = self.loads[ordinal]
            self.loads[ordinal] = held._replace(
                num_blocks=max(held.num_blocks, load.num_blocks),
                num_pages=max(held.num_pages, load.num_pages),
            )
            return ordinal, 0
        self.keys.append(key)
        self.loads.append(load)
        return len(self.keys) - 1, 1


def _own_starts(layout: SegmentLayout, block_q: int) -> tuple[Int32Array, Int32Array]:
    """Per token the first key of its own item, and `far_start`.

    The window of a prefix row begins in its own q tile at the earliest, so that all rows of the
    tile see the keys before the tile as whole blocks.
    """
    index = np.arange(layout.num_tokens, dtype=np.int32)
    own = index.copy()
    real = layout.num_real_tokens
    segment, group = layout.segment_ids[:real], layout.group_ids[:real]
    if real:
        change = np.ones(real, bool)
        change[1:] = (segment[1:] != segment[:-1]) | (group[1:] != group[:-1])
        first = np.maximum.accumulate(np.where(change, index[:real], 0))
        in_tile = np.maximum(first, index[:real] // block_q * block_q)
        own[:real] = np.where(segment == PREFIX_SEGMENT, in_tile, first)
    far = np.full(layout.num_tokens, NEVER, np.int32)
    window = index[:real] // LANES * LANES - LANES
    item = (segment != PREFIX_SEGMENT) & (own[:real] < window)
    far[:real][item] = own[:real][item]
    return own, far


def _narrow(own: Int32Array, block_q: int) -> Int32Array:
    """Per q tile 1 where no row's own keys reach further back than the narrow window."""
    index = np.arange(len(own))
    wide = own < index // LANES * LANES - NARROW
    tiles = np.zeros(cdiv(len(own), block_q), bool)
    tiles[index[wide] // block_q] = True
    return (~tiles).astype(np.int32)


def _work(
    layout: SegmentLayout, far_start: Int32Array, blocks: BlockSizes, page_size: int
) -> tuple[list[Use], list[Load], Int32Array]:
    ring = _Ring(blocks)
    uses: list[Use] = []
    num_tiles = cdiv(layout.num_tokens, blocks.block_q)
    ends = np.zeros(num_tiles, np.int32)
    page_starts = np.cumsum([0, *(len(g.page_indices) for g in layout.groups)])
    pages_per_block = blocks.block_kv // page_size if page_size else 0

    def add(source: Source, block: int, use: Use) -> None:
        num_pages = 0
        start = source.start + block * blocks.block_kv
        if source.paged:
            start = source.start + block * pages_per_block
            num_pages = cdiv(use.last_key, page_size)
        load = Load(start, int(source.paged), use.last_block, num_pages)
        ordinal, fresh = ring.find((source, block), load)
        uses.append(use._replace(load=ordinal, fresh=fresh))

    for tile in _tiles(layout, blocks.block_q):
        group = layout.groups[tile.group]
        if group.cached_len:
            pages = Source(tile.group, int(page_starts[tile.group]), True)
            for step in _prefix_uses(tile, pages, (0, group.cached_len), blocks):
                add(*step)
        first = int(layout.group_starts[tile.group])
        if group.prefix_len:
            base = first // blocks.block_kv * blocks.block_kv
            keys = (first - base, first - base + group.prefix_len)
            for step in _prefix_uses(tile, Source(tile.group, base, False), keys, blocks):
                add(*step)
        if tile.last_row == tile.end:
            far = far_start[tile.start : tile.end]
            rows = np.flatnonzero(far != NEVER)
            if len(rows):
                span = tile.start + int(rows[0]), tile.start + int(rows[-1]) + 1
                keys = int(far[rows].min()), window_start(span[1] - 1)
                for step in _own_uses(span, keys, blocks):
                    add(*step)
        ends[tile.start // blocks.block_q] = len(uses)
    return uses, ring.loads, np.maximum.accumulate(ends)


def _padded(rows: list[Use] | list[Load], fields: int, capacity: int) -> Int32Array:
    out = np.zeros((capacity, fields), np.int32)
    if rows:
        out[: len(rows)] = np.asarray(rows, np.int32)
    return out.reshape(-1)


def use_capacity(
    num_tokens: int, max_groups: int, max_pages: int, blocks: BlockSizes, page_size: int
) -> int:
    """How many uses any layout of these static sizes may need."""
    tiles = cdiv(num_tokens, blocks.block_q)
    chunks = cdiv(num_tokens, blocks.chunk_kv) + 1
    paged = cdiv(max_pages * page_size, blocks.chunk_kv) + 1 if max_pages else 0
    return (tiles + max_groups) * (chunks + paged) + tiles * chunks


def build_schedule(
    layout: SegmentLayout,
    *,
    block_sizes: BlockSizes,
    page_size: int = 0,
    num_pages: int | None = None,
    max_groups: int | None = None,
    max_pages: int | None = None,
) -> SegmentSchedule:
    """The work list of a layout, as small int32 arrays whose shapes depend on the bucket alone.

    Args:
      layout: groups of one prefix and its items, with `num_tokens` the bucket.
      block_sizes: the kernel's tiles; `resolve_block_sizes` finds good ones.
      page_size: tokens a page; 0 where no group has cached tokens.
      num_pages: pages in the pool, to check page numbers against.
      max_groups: static bound on the number of groups (default: this layout's).
      max_pages: static bound on the number of page numbers (default: this layout's).

    Returns:
      A `SegmentSchedule` of numpy arrays; a pytree, so it passes through `jax.jit` as data.

    Raises:
      LayoutError: the layout contradicts itself, its bucket or its bounds.
    """
    max_groups = len(layout.groups) if max_groups is None else max_groups
    total_pages = sum(len(group.page_indices) for group in layout.groups)
    max_pages = total_pages if max_pages is None else max_pages
    check_layout(layout, block_sizes, page_size, num_pages, max_groups, max_pages)

    own, far = _own_starts(layout, block_sizes.block_q)
    uses, loads, ends = _work(layout, far, block_sizes, page_size)
    capacity = use_capacity(layout.num_tokens, max_groups, max_pages, block_sizes, page_size)
    padded = align_to(layout.num_tokens, block_sizes.block_q)
    rows = np.full((2, padded), NEVER, np.int32)
    rows[0] = np.arange(padded)
    rows[0, : layout.num_tokens], rows[1, : layout.num_tokens] = own, far

    groups = np.zeros((max_groups, 4), np.int32)
    pages = np.zeros(max(max_pages, 1), np.int32)
    first_page = 0
    for g, group in enumerate(layout.groups):
        start = layout.group_starts[g]
        groups[g] = start, start + group.prefix_len, group.cached_len, first_page
        pages[first_page : first_page + len(group.page_indices)] = group.page_indices
        first_page += len(group.page_indices)
    return SegmentSchedule(
        rows=rows,
        group_ids=np.asarray(layout.group_ids, np.int32),
        groups=groups,
        page_indices=pages,
        use_starts=np.concatenate([[0], ends]).astype(np.int32),
        narrow=_narrow(own, block_sizes.block_q),
        uses=_padded(uses, USE_FIELDS, capacity),
        loads=_padded(loads, LOAD_FIELDS, capacity),
        counts=np.array([layout.num_real_tokens, len(loads)], np.int32),
        block_sizes=block_sizes,
        page_size=page_size,
    )


def visited_blocks(schedule: SegmentSchedule) -> tuple[Int32Array, Int32Array]:
    """Blocks of `block_q` x `block_kv` that each q tile reads beyond its window: (all, masked)."""
    starts: Array = np.asarray(schedule.use_starts)
    uses = np.asarray(schedule.uses).reshape(-1, USE_FIELDS)
    col = {name: uses[:, i] for i, name in enumerate(Use._fields)}
    total = np.cumsum([0, *(col["last_block"] - col["first_block"])])
    full = np.cumsum([0, *(col["last_full"] - col["first_full"])])
    seen, whole = np.diff(total[starts]), np.diff(full[starts])
    return seen.astype(np.int32), (seen - whole).astype(np.int32)
