"""The contract of an engine: whoever keeps it gets flows, pages, plans, prefixes and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from packscore.flows.costs import CostModel
from packscore.flows.packing import PackedBatch
from packscore.flows.page_pool import PagePool
from packscore.results import Flow, MaskImpl

# float32[num_rows, num_labels] logits and float32[num_rows] normaliser, a row for each scored item
RowLogits = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Readout:
    """What is read from the hidden states of the scored rows.

    Args:
      label_ids: the labels' rows of the head.
      over_vocabulary: normalise over the whole head instead of over the labels.
    """

    label_ids: tuple[int, ...]
    over_vocabulary: bool


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


class Engine(Protocol):
    """What runs packed batches for one model: `launch` starts one, `read` waits for many."""

    pool: PagePool | None
    costs: CostModel
    mask_impl: MaskImpl
    keeps_pages: bool  # whether it could; a cache of no bytes has none either
    whole_last: str | None  # why the last layer runs for all tokens; None: where it is read

    @property
    def only_flow(self) -> Flow | None:
        """The one flow that it can run now; None: all of them."""
        ...

    @property
    def limits(self) -> Limits:
        """What one launch can hold."""
        ...

    def refresh(self, *, force: bool = False) -> None:
        """Forget prefixes that another model computed; called once before each run.

        Args:
          force: whatever was seen of the model.

        Raises:
          UnsupportedModelError: the model cannot be scored exactly any more.
        """
        ...

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether a launch failed, or its reading, for the device's memory was short."""
        ...

    def reads_rows(self, batch: PackedBatch) -> bool:
        """Whether the last layer runs for the scored rows of a batch alone.

        Of the other tokens it then computes keys and values, and nothing else.
        """
        ...

    def launch(self, batch: PackedBatch, readout: Readout) -> Any:
        """Start a batch; what it returns is for `read`."""
        ...

    def read(self, launched: Sequence[Any]) -> RowLogits:
        """Logits and normaliser of the scored rows of batches, one behind the other.

        Args:
          launched: at least one, all of one readout.
        """
        ...
