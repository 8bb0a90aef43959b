"""Token ids to one packed batch: `[prefix, item 1, ..., item N]`, no delimiter, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from packscore_kernels.segment_paged_attention.types import SegmentLayout

TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One query and its items as one sequence."""

    token_ids: TokenIds  # i64[num_tokens]
    layout: SegmentLayout

    @property
    def is_causal(self) -> bool:
        """Whether plain causal attention already shows every token what it may see."""
        group = self.layout.groups[0]
        num_sequences = int((group.item_lens > 0).sum())
        return num_sequences <= 1


def pack(prefix: TokenIds, items: Sequence[TokenIds]) -> PackedBatch:
    """Pack a prefix and the items behind it.

    Args:
      prefix: i64[prefix_len], may be empty.
      items: one i64[item_len] for each item, each may be empty.

    Returns:
      The token ids in storage order and their layout.
    """
    item_lens = [len(item) for item in items]
    layout = SegmentLayout.single(len(prefix), item_lens)
    return PackedBatch(np.concatenate([prefix, *items]).astype(np.int64), layout)
