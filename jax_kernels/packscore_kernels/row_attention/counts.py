"""How often the kernel runs the pieces of its code, by a schedule and rows of numpy arrays."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from packscore_kernels.attention.layout import Array
from packscore_kernels.attention.types import SegmentSchedule
from packscore_kernels.row_attention.blocks import Blocks, Seen
from packscore_kernels.row_attention.kernel import parts_of


class BlockRuns(NamedTuple):
    """Of blocks of one kind, packed or in pages."""

    blocks: int
    masked: int  # parts of the rows that see some of a block, all kv heads together
    whole: int  # and all of it


class RowRuns(NamedTuple):
    """What one launch runs how often."""

    packed: BlockRuns
    cached: BlockRuns
    parts: int

    @property
    def steps(self) -> int:
        """Of its grid."""
        return max(self.packed.blocks + self.cached.blocks, 1)


def row_runs(
    schedule: SegmentSchedule, rows: Array, group_size: int, *, has_pages: bool
) -> RowRuns:
    """Of rows whose attention one call computes."""
    blocks = Blocks.of(schedule, has_pages)
    parts = parts_of(Seen.of(schedule, jnp.asarray(rows)), group_size)
    met = np.asarray(jax.vmap(blocks.met)(parts))

    def of(own: Array) -> BlockRuns:
        return BlockRuns(int(own.any(axis=0).sum()), int((own == 1).sum()), int((own == 2).sum()))

    cut = blocks.num_cached
    return RowRuns(of(met[:, cut:]), of(met[:, :cut]), len(met))
