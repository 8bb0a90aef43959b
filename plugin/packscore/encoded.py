"""A request as token ids: what texts become, and all that the rest of the house knows of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from packscore.telling import counted, telling

TokenIds = npt.NDArray[np.int64]
# Tokens of an item, counted from its first; -1 is the last one before it.
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncodedRequest:
    """One query and its items as token ids, within the budget."""

    prefix: TokenIds  # i64[prefix_len], shared by all items
    items: list[TokenIds]  # i64[item_len] each
    truncated_items: list[int] = field(default_factory=list)
    special_token_items: list[int] = field(default_factory=list)  # items holding special-token text
    rows: list[Rows] | None = None  # which tokens of each item are read; None: its last one

    @telling
    def __repr__(self) -> str:
        lens = [len(item) for item in self.items]
        each = f" of up to {counted(max(lens), 'token')}" if lens else ""
        lists = ("truncated_items", "special_token_items")
        more = (f"{len(getattr(self, x)):,} {x}" for x in lists if getattr(self, x))
        prefix = counted(len(self.prefix), "prefix token")
        return ", ".join([prefix, f"{counted(len(lens), 'item')}{each}", *more])

    @property
    def prompt_tokens(self) -> int:
        """Tokens that scoring the items one by one would compute."""
        return len(self.prefix) * len(self.items) + sum(map(len, self.items))

    def part(self, items: Sequence[int]) -> EncodedRequest:
        """The same of some items alone, in the order that they are named in."""
        where = {item: i for i, item in enumerate(items)}

        def listed(indices: list[int]) -> list[int]:
            return [where[i] for i in indices if i in where]

        return replace(
            self,
            items=[self.items[i] for i in items],
            truncated_items=listed(self.truncated_items),
            special_token_items=listed(self.special_token_items),
            rows=None if self.rows is None else [self.rows[i] for i in items],
        )
