"""The contract of an engine: whoever keeps it gets flows, pages, plans, prefixes and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from packscore.flows.costs import CostModel
from packscore.flows.packing import PackedBatch
from packscore.flows.page_pool import PagePool
from packscore.results import MaskImpl

RowLogits = tuple[torch.Tensor, torch.Tensor]


class Engine(Protocol):
    """What runs packed batches for one model.

    `launch` starts a batch, `read` waits for the results of many: float32 logits
    [num_rows, num_labels] and their normaliser [num_rows], a row for each scored item.
    """

    pool: PagePool | None
    costs: CostModel
    mask_impl: MaskImpl

    @property
    def limits(self) -> Limits:
        """What one launch can hold."""
        ...

    def refresh(self) -> None:
        """Forget prefixes that other weights computed; called before each run."""
        ...

    def launch(self, batch: PackedBatch, label_ids: list[int], over_vocabulary: bool) -> Any:
        """Start a batch; what it returns is for `read`."""
        ...

    def read(
        self, launched: Sequence[Any], label_ids: list[int], over_vocabulary: bool
    ) -> RowLogits:
        """Logits and normaliser of the scored rows of batches, one behind the other."""
        ...


@dataclass(frozen=True)
class Limits:
    """What one launch can hold.

    Args:
      max_tokens: tokens of one launch; one item that is longer is a launch of its own, and so is
        what one item needs of a prefix that has no pages.
      target_tokens: tokens up to which several requests share a launch.
      max_groups: requests in one launch.
      max_pages: pages that the requests of one launch read, beyond those of one alone.
    """

    max_tokens: int
    target_tokens: int
    max_groups: int
    max_pages: int = 2**31
