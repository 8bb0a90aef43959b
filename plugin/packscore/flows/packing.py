"""Token ids to packed batches: `[prefix, item 1, ..., item N]` a group, nothing between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from packscore.encoded import TokenIds
from packscore.flows.page_pool import PrefixLease
from packscore_kernels.attention.layout import Group, SegmentLayout
from packscore_kernels.hardware import cdiv


@dataclass(frozen=True, eq=False)
class Share:
    """The items of one request that one launch computes, and what it computes of their prefix.

    Args:
      request: which request of the run.
      prefix: i64[prefix_len], whole, may be empty and may continue what the lease holds.
      items: token ids of each item, may be empty.
      index: i64[num_items], which items of the request they are.
      lease: pages that hold the first `lease.cached_len` prefix tokens and take the others up to
        `len(lease.tokens)`, which are all unless that many are held; None packs the whole prefix
        and keeps nothing.
    """

    request: int
    prefix: TokenIds
    items: Sequence[TokenIds]
    index: npt.NDArray[np.int64]
    lease: PrefixLease | None = None

    @property
    def cached_len(self) -> int:
        """Prefix tokens to read from pages now: more once the lease is committed.

        An empty item is scored at the prefix's last token, which then is computed again.
        """
        if self.lease is None:
            return 0
        has_empty = any(not len(item) for item in self.items)
        is_in_pages = self.lease.cached_len == len(self.prefix)
        return self.lease.cached_len - int(is_in_pages and has_empty)

    @property
    def num_tokens(self) -> int:
        """Tokens that the launch computes for it."""
        return len(self.prefix) - self.cached_len + sum(map(len, self.items))

    @property
    def group(self) -> Group:
        """Its group in the packed sequence."""
        cached = self.cached_len
        lens = np.array([len(item) for item in self.items], np.int32)
        if self.lease is None:
            return Group(len(self.prefix), lens)
        pages = self.lease.pages[: cdiv(cached, self.lease.pool.page_size)]
        return Group(len(self.prefix) - cached, lens, cached, pages)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """What one launch computes: a group for each share, where there are shares."""

    token_ids: TokenIds  # i64[num_tokens]
    layout: SegmentLayout
    shares: tuple[Share, ...] = ()

    @property
    def is_causal(self) -> bool:
        """Whether plain causal attention already shows every token what it may see."""
        (group, *others) = self.layout.groups
        return not others and not group.cached_len and int((group.item_lens > 0).sum()) <= 1


def pack(shares: Sequence[Share]) -> PackedBatch:
    """Pack shares one behind the other."""
    parts: list[TokenIds] = []
    for share in shares:
        parts += [share.prefix[share.cached_len :], *share.items]
    token_ids = np.concatenate(parts).astype(np.int64)
    layout = SegmentLayout(tuple(share.group for share in shares), len(token_ids))
    return PackedBatch(token_ids, layout, tuple(shares))


def first_equal(items: Sequence[TokenIds]) -> npt.NDArray[np.int64]:
    """i64[num_items]: for each item the index of the first one that has the same tokens."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(item.tobytes(), i) for i, item in enumerate(items)], np.int64)


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
