"""Token ids to packed batches: `[prefix, item 1, ..., item N]` a group, nothing between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from packscore.encoded import Rows, TokenIds
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
      rows: of each item, the tokens that are read; None: its last one, or its prefix's last.
    """

    request: int
    prefix: TokenIds
    items: Sequence[TokenIds]
    index: npt.NDArray[np.int64]
    lease: PrefixLease | None = None
    rows: Sequence[Rows] | None = None

    @property
    def cached_len(self) -> int:
        """Prefix tokens to read from pages now: more once the lease is committed.

        Where the prefix's last token is read, it is computed again.
        """
        if self.lease is None:
            return 0
        is_in_pages = self.lease.cached_len == len(self.prefix)
        return self.lease.cached_len - int(is_in_pages and self._reads_prefix)

    @property
    def _reads_prefix(self) -> bool:
        if self.rows is None:
            return any(not len(item) for item in self.items)
        return any(-1 in rows for rows in self.rows)

    @property
    def row_counts(self) -> npt.NDArray[np.int64]:
        """i64[num_items]: how many tokens are read of each item."""
        if self.rows is None:
            return np.ones(len(self.items), np.int64)
        return np.array([len(rows) for rows in self.rows], np.int64)

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

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """i64[num_rows]: storage index of every token that is read, item by item."""
        scored = self.layout.scored_rows.astype(np.int64)
        if all(share.rows is None for share in self.shares):
            return scored
        found, first = [], 0
        for share, group, start in zip(
            self.shares, self.layout.groups, self.layout.group_starts.tolist(), strict=False
        ):
            own = slice(first, first + len(share.items))
            first = own.stop
            if share.rows is None:
                found.append(scored[own])
                continue
            prefix_end = start + group.prefix_len - 1
            begins = self.layout.item_bounds[own, 0].tolist()
            found += [
                np.where(rows < 0, prefix_end, begin + rows)
                for rows, begin in zip(share.rows, begins, strict=True)
            ]
        return np.concatenate(found) if found else scored

    @property
    def is_causal(self) -> bool:
        """Whether plain causal attention already shows every token what it may see."""
        (group, *others) = self.layout.groups
        return not others and not group.cached_len and int((group.item_lens > 0).sum()) <= 1

    @property
    def is_alone(self) -> bool:
        """Whether it is one sequence that is read at its end: nothing comes behind what is read."""
        return self.is_causal and self.rows.tolist() == [len(self.token_ids) - 1]


def pack(shares: Sequence[Share]) -> PackedBatch:
    """Pack shares one behind the other."""
    parts: list[TokenIds] = []
    for share in shares:
        parts += [share.prefix[share.cached_len :], *share.items]
    token_ids = np.concatenate(parts).astype(np.int64)
    layout = SegmentLayout(tuple(share.group for share in shares), len(token_ids))
    return PackedBatch(token_ids, layout, tuple(shares))


def first_equal(
    items: Sequence[TokenIds], rows: Sequence[Rows] | None = None
) -> npt.NDArray[np.int64]:
    """i64[num_items]: for each the index of the first one of the same tokens, read at the same."""
    seen: dict[Any, int] = {}
    keys: Iterable[Any] = (item.tobytes() for item in items)
    if rows is not None:
        keys = zip(keys, (one.tobytes() for one in rows), strict=True)
    return np.array([seen.setdefault(key, i) for i, key in enumerate(keys)], np.int64)


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
