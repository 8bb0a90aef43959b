"""What the op takes besides arrays of tokens: tiles, and a layout as data of a program."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from packscore_kernels.errors import ArgumentError
from packscore_kernels.hardware import LANES, cdiv


@dataclass(frozen=True)
class BlockSizes:
    """The kernel's tiles, in tokens.

    Raises:
      ArgumentError: sizes that do not divide each other.
    """

    block_q: int  # rows of one q head in a q tile
    block_kv: int  # keys scored at a time
    chunk_kv: int  # keys loaded at a time
    num_slots: int = 2  # chunks in VMEM, one of them on its way

    def __post_init__(self) -> None:
        if self.block_q <= 0 or self.block_q % LANES:
            raise ArgumentError(f"{self.block_q=} must be a multiple of {LANES}")
        if self.block_kv <= 0 or self.block_kv % LANES:
            raise ArgumentError(f"{self.block_kv=} must be a multiple of {LANES}")
        if self.chunk_kv <= 0 or self.chunk_kv % self.block_kv:
            raise ArgumentError(f"{self.chunk_kv=} must be a multiple of {self.block_kv=}")
        if self.num_slots < 2:
            raise ArgumentError(f"{self.num_slots=} must be at least 2")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "rows",
        "group_ids",
        "groups",
        "page_indices",
        "use_starts",
        "narrow",
        "uses",
        "loads",
        "counts",
    ],
    meta_fields=["block_sizes", "page_size"],
)
@dataclass(frozen=True, eq=False)
class SegmentSchedule:
    """A layout as the op takes it: small int32 arrays, whose shapes depend on the bucket alone.

    Lengths, boundaries, the number of items and page numbers are data: no recompilation.
    """

    rows: (
        Any  # i32[2, num_tokens up to block_q]: first own key; the same for items beyond the window
    )
    group_ids: Any  # i32[num_tokens], PAD_SEGMENT for padding
    groups: Any  # i32[max_groups, 4]: start, prefix end, cached_len, first entry of page_indices
    page_indices: Any  # i32[max_pages], group by group
    use_starts: Any  # i32[num_q_tiles + 1]: first chunk use of each q tile
    narrow: Any  # i32[num_q_tiles]: 1 where the narrow window holds all of every row's own keys
    uses: Any  # i32[capacity * fields of schedule.Use]
    loads: Any  # i32[capacity * fields of schedule.Load]
    counts: Any  # i32[2]: real tokens, loads
    block_sizes: BlockSizes
    page_size: int

    @property
    def num_tokens(self) -> int:
        """Packed tokens with padding, i.e. the bucket."""
        return int(self.group_ids.shape[0])

    @property
    def num_q_tiles(self) -> int:
        """Tiles of `block_q` rows."""
        return cdiv(self.num_tokens, self.block_sizes.block_q)
