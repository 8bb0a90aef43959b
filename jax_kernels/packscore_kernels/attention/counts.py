"""How often the kernel runs each straight piece of its code for a work list; numbers of the host.

What the kernel decides on the device by a schedule's numbers is decided here by the same ones. No
tile is done again (`redo`): only values decide that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from packscore_kernels.attention.chunks import TURN
from packscore_kernels.attention.types import BlockSizes, SegmentSchedule
from packscore_kernels.attention.uses import (
    HERE,
    ITEMS,
    LOAD_FIELDS,
    PREFIX,
    USE_FIELDS,
    Load,
    Use,
    edge_parts,
    have_triangles,
    window_start,
)
from packscore_kernels.hardware import LANES, cdiv

# Pieces that multiply matrices, in the order of the kernel's code: what opens a tile, with its
# window, the last of them with the first whole blocks too; blocks under a mask; whole blocks by
# turns, and what is left of them, with the one that closes the tile or without.
PIECES = (
    "triangle", "narrow_window", "window", "first_turn", "prefix_edge", "own_edge",
    "turn", "last", "rest_and_last", "rest",
)  # fmt: skip


def pieces_of(blocks: BlockSizes) -> tuple[str, ...]:
    """Those of `PIECES` that the kernel has with these tiles."""
    return PIECES if have_triangles(blocks) else PIECES[1:]


@dataclass(frozen=True)
class KernelRuns:
    """What one kv head of a launch runs how often."""

    pieces: dict[str, int]  # by the names in `PIECES`, zero where the kernel has none
    tiles: int  # q tiles that hold tokens
    padding_tiles: int  # and that hold none
    writes: int  # tiles whose outputs no piece writes
    uses: int  # of chunks
    masked_parts: int  # parts of a tile's rows that go through blocks under a mask
    loads: int  # of chunks
    copies: int  # that these consist of
    loaded_blocks: int  # blocks of keys in them


def count_runs(schedule: SegmentSchedule, *, live_tiles_only: bool = False) -> KernelRuns:
    """Every piece as often as the kernel runs it for a schedule of numpy arrays."""
    blocks = schedule.block_sizes
    num_tokens, num_loads = (int(n) for n in schedule.counts)
    uses = [Use(*row) for row in np.reshape(schedule.uses, (-1, USE_FIELDS)).tolist()]
    loads = [Load(*row) for row in np.reshape(schedule.loads, (-1, LOAD_FIELDS)).tolist()]
    del loads[num_loads:]
    num_tiles = cdiv(num_tokens, blocks.block_q)
    pieces = Counter(dict.fromkeys(PIECES, 0))
    num_uses = num_masked = num_writes = 0
    for tile in range(num_tiles):
        own = uses[schedule.use_starts[tile] : schedule.use_starts[tile + 1]]
        num_uses += sum(use.kind != HERE for use in own)
        num_writes += not own or not (own[-1].closes or own[-1].kind == HERE)
        num_masked += sum(_is_masked(use) for use in own)
        _count_tile(pieces, own, bool(schedule.narrow[tile]), tile * blocks.block_q, blocks)
    return KernelRuns(
        pieces=dict(pieces),
        tiles=num_tiles,
        padding_tiles=0 if live_tiles_only else schedule.num_q_tiles - num_tiles,
        writes=num_writes,
        uses=num_uses,
        masked_parts=edge_parts(blocks) * num_masked,
        loads=num_loads,
        copies=sum(load.num_pages if load.paged else 2 * load.num_blocks for load in loads),
        loaded_blocks=sum(load.num_blocks for load in loads),
    )


def _whole_blocks(use: Use) -> int:
    return int(use.last_full - use.first_full)


def _is_masked(use: Use) -> bool:
    """Whether it has blocks that need a mask of rows."""
    masked = use.last_block - use.first_block - _whole_blocks(use) > use.closes
    return bool(masked and use.kind != HERE)


def _count_tile(
    pieces: Counter[str], uses: Sequence[Use], narrow: bool, first_row: int, blocks: BlockSizes
) -> None:
    """One tile: its window, and what its uses read."""
    kind = uses[0].kind if uses else None
    fused = narrow and kind == PREFIX and _whole_blocks(uses[0]) >= TURN
    window = "first_turn" if fused else "narrow_window" if narrow else "window"
    pieces["triangle" if kind == HERE else window] += 1
    for i, use in enumerate(uses):
        turns, rest = divmod(_whole_blocks(use) - (TURN if fused and not i else 0), TURN)
        pieces["turn"] += turns
        if use.closes:
            pieces["rest_and_last" if rest else "last"] += 1
        elif rest:
            pieces["rest"] += 1
        if _is_masked(use):
            name = "own_edge" if use.kind == ITEMS else "prefix_edge"
            pieces[name] += _edge_blocks(use, first_row, blocks)


def _edge_blocks(use: Use, tile_start: int, blocks: BlockSizes) -> int:
    """Blocks under a mask, each as often as there are parts of rows that see something of it."""
    parts, total = edge_parts(blocks), 0
    for first_row in range(tile_start, tile_start + blocks.block_q, blocks.block_q // parts):
        last_row = min(first_row + blocks.block_q // parts, use.last_row) - 1
        end = use.last_key
        if use.kind == ITEMS or last_row < use.first_item_row:
            window = max(window_start(last_row), 0 if use.kind == ITEMS else tile_start)
            end = min(window - use.base, end)
        last_block = min(cdiv(end, blocks.block_kv), use.last_block - use.closes)
        if last_row >= max(first_row, use.first_row) and end > use.first_key:
            total += max(last_block - use.first_block - _whole_blocks(use), 0)
    return total


def moved_bytes(
    schedule: SegmentSchedule, runs: KernelRuns, *, group_size: int, head_dim: int, itemsize: int
) -> int:
    """Bytes that one kv head moves between HBM and the chip.

    Queries and what attention found, the keys and values of each tile's window, and the chunks.
    """
    num_tiles, blocks = runs.tiles + runs.padding_tiles, schedule.block_sizes
    num_tokens = num_tiles * blocks.block_q
    in_windows = num_tokens + num_tiles * LANES
    in_chunks = runs.loaded_blocks * blocks.block_kv
    return 2 * (group_size * num_tokens + in_windows + in_chunks) * head_dim * itemsize
