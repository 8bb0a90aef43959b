"""Who sees whom: groups of one prefix and its items, laid out in one packed sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Int32Array = npt.NDArray[np.int32]

PREFIX_SEGMENT = 0
PAD_SEGMENT = -1


def _no_pages() -> Int32Array:
    return np.zeros(0, np.int32)


@dataclass(frozen=True, eq=False)
class Group:
    """One prefix and the items that share it.

    The first `cached_len` tokens of the prefix lie in pages and are not part of the packed
    tokens; the next `prefix_len` tokens, and every item, are.
    """

    prefix_len: int  # prefix tokens among the packed tokens
    item_lens: Int32Array  # i32[num_items], tokens
    cached_len: int = 0  # prefix tokens that lie in pages
    page_indices: Int32Array = field(default_factory=_no_pages)  # i32[cdiv(cached_len, page_size)]

    @property
    def num_items(self) -> int:
        """Items that share the prefix, empty ones included."""
        return len(self.item_lens)

    @property
    def num_tokens(self) -> int:
        """Packed tokens of this group, without padding."""
        return self.prefix_len + int(self.item_lens.sum())


@dataclass(frozen=True, eq=False)
class SegmentLayout:
    """Packed tokens in storage order: each group's prefix and then its items; padding last.

    `visible = (kv_segment == q_segment) | (kv_segment == PREFIX_SEGMENT)` inside one group, and-ed
    with storage order `kv_index <= q_index`; the pages of a group come before its packed tokens.
    All arrays are int32 numpy and derived from `groups` once.
    """

    groups: tuple[Group, ...]
    num_tokens: int  # packed tokens with padding, i.e. the bucket

    @classmethod
    def single(
        cls, prefix_len: int, item_lens: Sequence[int] | Int32Array, num_tokens: int | None = None
    ) -> SegmentLayout:
        """The layout of one prefix and its items, padded to `num_tokens` (default: no padding)."""
        group = Group(prefix_len, np.asarray(item_lens, np.int32))
        return cls((group,), group.num_tokens if num_tokens is None else num_tokens)

    @property
    def num_real_tokens(self) -> int:
        """Packed tokens without padding."""
        return sum(group.num_tokens for group in self.groups)

    @cached_property
    def group_starts(self) -> Int32Array:
        """i32[num_groups + 1]: storage index of each group's first packed token, and the end."""
        return np.cumsum([0, *(group.num_tokens for group in self.groups)], dtype=np.int32)

    @cached_property
    def item_bounds(self) -> Int32Array:
        """i32[num_items, 2]: storage start and end of every item, group by group."""
        bounds = []
        for group, start in zip(self.groups, self.group_starts, strict=False):
            ends = start + group.prefix_len + np.cumsum(group.item_lens, dtype=np.int32)
            bounds.append(np.stack([ends - group.item_lens, ends], axis=1))
        return np.concatenate(bounds).astype(np.int32) if bounds else np.zeros((0, 2), np.int32)

    def _per_token(self, per_group: list[Int32Array], pad: int) -> Int32Array:
        out = np.full(self.num_tokens, pad, np.int32)
        if per_group:
            real = np.concatenate(per_group)
            out[: len(real)] = real
        return out

    @cached_property
    def group_ids(self) -> Int32Array:
        """i32[num_tokens]: group of every token, PAD_SEGMENT for padding."""
        ids = [np.full(group.num_tokens, g, np.int32) for g, group in enumerate(self.groups)]
        return self._per_token(ids, PAD_SEGMENT)

    @cached_property
    def segment_ids(self) -> Int32Array:
        """i32[num_tokens]: PREFIX_SEGMENT, k for a group's k-th item, PAD_SEGMENT for padding."""
        ids = [
            np.repeat(
                np.arange(group.num_items + 1, dtype=np.int32),
                np.concatenate([[group.prefix_len], group.item_lens]),
            )
            for group in self.groups
        ]
        return self._per_token(ids, PAD_SEGMENT)

    @cached_property
    def position_ids(self) -> Int32Array:
        """i32[num_tokens]: rotary positions; every item restarts at its whole prefix's length."""
        positions = []
        for group in self.groups:
            lens = np.concatenate([[group.prefix_len], group.item_lens])
            starts = np.cumsum(lens) - lens
            restart = np.full(len(lens), group.cached_len + group.prefix_len)
            restart[0] = group.cached_len
            index = np.arange(group.num_tokens)
            positions.append((index + np.repeat(restart - starts, lens)).astype(np.int32))
        return self._per_token(positions, 0)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: a whole prefix, in pages or packed, and one item."""
        return max(
            (g.cached_len + g.prefix_len + int(g.item_lens.max(initial=0)) for g in self.groups),
            default=0,
        )

    @cached_property
    def scored_rows(self) -> Int32Array:
        """i32[num_items]: storage index of every item's last token.

        An empty item is scored at the last packed token of its prefix, and at -1 where its group
        has no packed prefix token.
        """
        prefix_ends = np.repeat(
            [
                start + group.prefix_len if group.prefix_len else 0
                for group, start in zip(self.groups, self.group_starts, strict=False)
            ],
            [group.num_items for group in self.groups],
        )
        starts, ends = self.item_bounds.T
        return (np.where(ends > starts, ends, prefix_ends) - 1).astype(np.int32)
