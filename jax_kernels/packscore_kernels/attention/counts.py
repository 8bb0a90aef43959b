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
from packscore_kernels.attention.schedule import (
    LOAD_FIELDS,
    USE_FIELDS,
    Load,
    Use,
    edge_parts,
    window_start,
)
from packscore_kernels.attention.types import BlockSizes, SegmentSchedule
from packscore_kernels.hardware import LANES, cdiv

# Pieces that multiply matrices, in the order of the kernel's code: a tile's window with or without
# the first whole blocks, whole blocks by turns, what is left of them, and blocks under a mask.
PIECES = (
    "first_turn", "narrow_window", "window", "turn", "tail", "rest_and_tail", "rest",
    "prefix_edge", "own_edge",
)  # fmt: skip


@dataclass(frozen=True)
class KernelRuns:
    """What one kv head of a launch runs how often."""

    pieces: dict[str, int]  # by the names in `PIECES`
    tiles: int  # q tiles that hold tokens
    padding_tiles: int  # and that hold none
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
    num_uses = num_masked = 0
    for tile in range(num_tiles):
        own = uses[schedule.use_starts[tile] : schedule.use_starts[tile + 1]]
        num_uses += len(own)
        num_masked += sum(_is_masked(use) for use in own)
        _count_tile(pieces, own, bool(schedule.narrow[tile]), tile * blocks.block_q, blocks)
    return KernelRuns(
        pieces=dict(pieces),
        tiles=num_tiles,
        padding_tiles=0 if live_tiles_only else schedule.num_q_tiles - num_tiles,
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
    return bool(use.last_block - use.first_block - _whole_blocks(use) > use.tail)


def _count_tile(
    pieces: Counter[str], uses: Sequence[Use], narrow: bool, first_row: int, blocks: BlockSizes
) -> None:
    """One tile: its window, and what its uses read."""
    fused = narrow and bool(uses) and not uses[0].fresh and _whole_blocks(uses[0]) >= TURN
    pieces["first_turn" if fused else "narrow_window" if narrow else "window"] += 1
    for i, use in enumerate(uses):
        turns, rest = divmod(_whole_blocks(use) - (TURN if fused and not i else 0), TURN)
        pieces["turn"] += turns
        if use.tail:
            pieces["rest_and_tail" if rest else "tail"] += 1
        elif rest:
            pieces["rest"] += 1
        if _is_masked(use):
            pieces["own_edge" if use.own else "prefix_edge"] += _edge_blocks(use, first_row, blocks)


def _edge_blocks(use: Use, tile_start: int, blocks: BlockSizes) -> int:
    """Blocks under a mask, each as often as there are parts of rows that see something of it."""
    parts, total = edge_parts(blocks), 0
    for first_row in range(tile_start, tile_start + blocks.block_q, blocks.block_q // parts):
        last_row = min(first_row + blocks.block_q // parts, use.last_row) - 1
        end = use.last_key
        if use.own or last_row < use.first_item_row:
            window = max(window_start(last_row), 0 if use.own else tile_start)
            end = min(window - use.base, end)
        last_block = min(cdiv(end, blocks.block_kv), use.last_block - use.tail)
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
