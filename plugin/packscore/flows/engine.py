"""The contract of an engine: whoever keeps it gets flows, pages, plans, prefixes and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from packscore.flows.costs import CostModel
from packscore.flows.packing import PackedBatch
from packscore.flows.page_pool import PagePool
from packscore.results import Flow, MaskImpl


@dataclass(frozen=True)
class Readout:
    """What is read at the rows of a launch.

    Args:
      label_ids: rows of the head, whose logits are read; none: no logits.
      over_vocabulary: with the log-sum-exp of the whole head, and its largest logit.
      hidden: with the hidden states.
    """

    label_ids: tuple[int, ...] = ()
    over_vocabulary: bool = False
    hidden: bool = False


@dataclass(frozen=True, eq=False)
class RowValues:
    """What was read, in float32, a row for each that the launches named.

    Args:
      logits: [num_rows, num_labels].
      normalizer: [num_rows], the log-sum-exp over the vocabulary; None where nobody asked.
      largest: [num_rows], the largest logit of the vocabulary; None where nobody asked.
      hidden: [num_rows, hidden_size] after the final norm; None where nobody asked.
    """

    logits: torch.Tensor
    normalizer: torch.Tensor | None = None
    largest: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[RowValues]) -> RowValues:
        """The rows of all of them, one behind the other."""

        def of(name: str) -> Any:
            found = [getattr(part, name) for part in parts]
            return None if found[0] is None else torch.cat(found)

        return cls(of("logits"), of("normalizer"), of("largest"), of("hidden"))

    def at(self, rows: npt.NDArray[np.int64]) -> RowValues:
        """Some of the rows, in another order."""
        chosen = torch.from_numpy(rows)

        def of(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values[chosen.to(values.device)]

        return RowValues(
            self.logits[chosen.to(self.logits.device)],
            of(self.normalizer),
            of(self.largest),
            of(self.hidden),
        )


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

    @classmethod
    def least(cls, limits: Sequence[Limits]) -> Limits:
        """What a launch can hold under all of them."""
        return limits[0] if len(limits) == 1 else cls(*map(min, *map(astuple, limits)))


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

    def is_done(self, launched: Any) -> bool:
        """Whether a launch was computed, without waiting for it; asked where there are copies."""
        ...

    def read(self, launched: Sequence[Any]) -> RowValues:
        """What is read at the rows of batches, one behind the other; of all copies on one device.

        Args:
          launched: at least one, all of one readout.
        """
        ...
