"""What one grid step of the kernel has at hand: its shape, its place in the grid, its refs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from packscore_kernels.attention.types import BlockSizes
from packscore_kernels.hardware import LANES

W = LANES  # rows that the local window treats at a time, and how far it looks back
ONES = 16  # rows under the values, as many as one register of bfloat16 holds: one of ones
NUM_PREFETCH = 6  # refs in scalar memory, filled before the first step

Ref = Any


@dataclass(frozen=True)
class Shape:
    """What the kernel is compiled for."""

    group_size: int  # q heads a kv head
    head_dim: int
    scale: float  # sm_scale * log2(e)
    page_size: int  # 0 without pages
    blocks: BlockSizes
    count_visits: bool
    # Sums of a tile's last weights come from the matrix unit, by a row of ones under the values
    # where a key is live, so that nothing is masked. It pays where a pass is 256 deep.
    ones: bool

    @property
    def value_rows(self) -> int:
        """Rows of transposed values in a slot."""
        return self.head_dim + (ONES if self.ones else 0)


@dataclass(frozen=True)
class Refs:
    """One grid step, i.e. one q tile of one kv head; the refs as Pallas hands them over."""

    shape: Shape
    # place in the grid
    head: jax.Array  # which kv head
    tile: jax.Array  # which q tile
    first_row: jax.Array  # storage index of the tile's first row
    # prefetch: the work list, see `SegmentSchedule`
    use_starts: Ref  # i32[num_q_tiles + 1]
    narrow: Ref  # i32[num_q_tiles]
    uses: Ref  # i32[capacity * USE_FIELDS]
    loads: Ref  # i32[capacity * LOAD_FIELDS]
    pages: Ref  # i32[max_pages]
    counts: Ref  # i32[2]: real tokens, loads
    # inputs
    rows: Ref  # i32[2, block_q]
    q: Ref  # [group_size, block_q, head_dim]
    k_before: Ref  # [1, W, head_dim]: the lane group before the tile
    k_here: Ref  # [1, block_q, head_dim]
    v_before: Ref  # [1, W, head_dim]
    v_here: Ref  # [1, block_q, head_dim]
    k_hbm: Ref  # [num_kv_heads, num_tokens, head_dim]
    v_hbm: Ref  # [num_kv_heads, num_tokens, head_dim]
    kv_pages: Ref  # [num_pages, num_kv_heads, 2, page_size, head_dim]
    # outputs
    o: Ref  # [group_size, block_q, head_dim]
    visits: Ref  # i32[num_kv_heads, num_q_tiles], None unless `count_visits`
    # scratch: a ring of chunks and, in the last slot, the one of `redo`; the softmax's state
    kv_slots: Ref  # [num_slots + 1, 2, chunk_kv, head_dim]
    vt_slots: Ref  # [num_slots + 1, value_rows, chunk_kv]
    m: Ref  # f32[group_size, 1, block_q]: reference of the exponentials
    total: Ref  # f32[group_size, 8, block_q]: sums, still apart by sublane
    acc: Ref  # f32[group_size, head_dim, block_q]
    bad: Ref  # f32[group_size, 1, block_q]: 1 where the reference was too low for a row
    sems: Ref  # one DMA semaphore a slot

    @property
    def blocks(self) -> BlockSizes:
        """The kernel's tiles."""
        return self.shape.blocks

    @property
    def heads(self) -> range:
        """The q heads of this kv head."""
        return range(self.shape.group_size)
