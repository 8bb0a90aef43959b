"""A request as token ids: what texts become, and all that the rest of the house knows of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncodedRequest:
    """One query and its items as token ids, within the budget."""

    prefix: TokenIds  # i64[prefix_len], shared by all items
    items: list[TokenIds]  # i64[item_len] each
    truncated_items: list[int] = field(default_factory=list)
    special_token_items: list[int] = field(default_factory=list)  # items holding special-token text

    @property
    def prompt_tokens(self) -> int:
        """Tokens that scoring the items one by one would compute."""
        return len(self.prefix) * len(self.items) + sum(map(len, self.items))
