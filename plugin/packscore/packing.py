"""Token ids to packed batches: `[prefix, item 1, ..., item N]`, no delimiter, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from packscore_kernels.segment_paged_attention.layout import Group, SegmentLayout

TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """What one forward computes: a prefix and items, or items behind a prefix computed before."""

    token_ids: TokenIds  # i64[num_tokens]
    layout: SegmentLayout


@dataclass(frozen=True, eq=False)
class PackedRequest:
    """One query and its items as one or more batches, items sorted by length."""

    batches: tuple[PackedBatch, ...]
    order: npt.NDArray[np.int64]  # i64[num_items]: whose score each scored row is, batch by batch

    @property
    def is_causal(self) -> bool:
        """Whether plain causal attention already shows every token what it may see."""
        item_lens = [batch.layout.groups[0].item_lens for batch in self.batches]
        return int((np.concatenate(item_lens) > 0).sum()) <= 1


def pack(
    prefix: TokenIds, items: Sequence[TokenIds], *, chunk_tokens: int | None = None
) -> PackedRequest:
    """Pack a prefix and the items behind it.

    Items go in by length, so that those of one length are neighbours and few calls serve all.

    Args:
      prefix: i64[prefix_len], may be empty.
      items: one i64[item_len] for each item, each may be empty.
      chunk_tokens: split the items over several batches of about so many item tokens, the first of
        which holds the prefix; None packs one batch.

    Returns:
      The batches and the order of their scored rows.
    """
    item_lens = np.array([len(item) for item in items], np.int64)
    order = np.argsort(item_lens, kind="stable")
    starts = np.cumsum(item_lens[order]) - item_lens[order]
    total = int(item_lens.sum())
    num_chunks = -(-total // chunk_tokens) if chunk_tokens else 1
    # chunks of equal share; empty items come first, with the prefix whose end they are scored at
    chunk_of_item = starts * num_chunks // max(total, 1)
    batches = []
    for chunk in np.unique(chunk_of_item):
        members = order[chunk_of_item == chunk]
        lens = item_lens[members].astype(np.int32)
        own, cached_len = (prefix, 0) if chunk == 0 else (prefix[:0], len(prefix))
        group = Group(len(own), lens, cached_len)
        token_ids = np.concatenate([own, *(items[i] for i in members)]).astype(np.int64)
        batches.append(PackedBatch(token_ids, SegmentLayout((group,), len(token_ids))))
    return PackedRequest(tuple(batches), order)


def split_items(prefix_len: int, item_lens: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of the items of every batch of at most `max_tokens`, each with its own prefix.

    An item that does not fit beside the prefix is a batch of its own.
    """
    parts: list[list[int]] = []
    room = 0
    for i, length in enumerate(item_lens):
        if not parts or length > room:
            parts.append([])
            room = max_tokens - prefix_len
        parts[-1].append(i)
        room -= length
    return parts
