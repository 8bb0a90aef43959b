"""From a layout to the kernel's work list: numpy, once per batch, shared by all layers."""

from __future__ import annotations

import numpy as np

from packscore_kernels.attention.layout import PREFIX_SEGMENT, Array, Int32Array, SegmentLayout
from packscore_kernels.attention.types import BlockSizes, SegmentSchedule
from packscore_kernels.attention.uses import (
    HERE,
    LOAD_FIELDS,
    NARROW,
    NEVER,
    PREFIX,
    USE_FIELDS,
    Load,
    Source,
    Use,
    closed,
    steps,
    tiles,
)
from packscore_kernels.attention.validation import check_layout
from packscore_kernels.hardware import LANES, align_to, cdiv


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

    def loaded(source: Source, block: int, use: Use) -> Use:
        """The use of a load that is in the ring, or of one that is added."""
        num_pages, live = 0, blocks.chunk_kv
        start = source.start + block * blocks.block_kv
        group = layout.groups[source.group]
        if use.kind == HERE:
            return use._replace(load=0)
        if source.paged:
            start = source.start + block * pages_per_block
            num_pages = cdiv(use.last_key, page_size)
            live = group.cached_len - block * blocks.block_kv
        elif use.kind == PREFIX:
            live = int(layout.group_starts[source.group]) + group.prefix_len - start
        load = Load(start, int(source.paged), use.last_block, num_pages, live)
        ordinal, fresh = ring.find((source, block), load)
        return use._replace(load=ordinal, fresh=fresh)

    for tile in tiles(layout, blocks.block_q):
        far = far_start[tile.start : tile.end]
        own = steps(tile, layout, int(page_starts[tile.group]), far, blocks)
        found = [loaded(*step) for step in own]
        if found:
            uses += closed(found, tile)
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
    """Blocks of `block_q` x `block_kv` that each q tile reads beyond its window.

    Returns:
      (all, those of which some rows see other keys than others).
    """
    starts: Array = np.asarray(schedule.use_starts)
    uses = np.asarray(schedule.uses).reshape(-1, USE_FIELDS)
    col = {name: uses[:, i] for i, name in enumerate(Use._fields)}
    total = np.cumsum([0, *(col["last_block"] - col["first_block"])])
    full = np.cumsum([0, *(col["last_full"] - col["first_full"] + col["closes"])])
    seen, whole = np.diff(total[starts]), np.diff(full[starts])
    return seen.astype(np.int32), (seen - whole).astype(np.int32)
