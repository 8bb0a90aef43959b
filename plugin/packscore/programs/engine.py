"""Packed batches through compiled programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from packscore.flows.costs import CostModel, flops_cost_model, tpu_cost_model
from packscore.flows.engine import Limits, Readout, RowLogits
from packscore.flows.packing import PackedBatch
from packscore.flows.page_pool import PagePool
from packscore.model.weight_watch import WeightWatch
from packscore.programs.program import Launched, ModelProgram
from packscore.programs.sizes import MAX_GROUPS, NAMED_PAGES, token_bucket
from packscore.results import MaskImpl
from packscore_kernels.hardware import chip_of


class ProgramEngine:
    """What runs packed batches on the JAX path.

    Args:
      program: of the patched model.
      cache_bytes: what the pages of prefixes may take.
    """

    mask_impl: MaskImpl = "segment"

    def __init__(self, program: ModelProgram, cache_bytes: int) -> None:
        self._program = program
        num_pages = program.num_pages(cache_bytes)
        self.pool: PagePool | None = PagePool(num_pages) if num_pages else None
        self._pages = program.device_pages(num_pages) if num_pages else None
        if self.pool is not None and self._pages is not None:
            self._pages.on_lost = self.pool.clear
        self.costs = _costs(program)
        self._watch = WeightWatch(program.model, is_copied=True)

    @property
    def limits(self) -> Limits:
        """One program's."""
        most = self._program.max_tokens
        return Limits(most, most, MAX_GROUPS, NAMED_PAGES)

    def refresh(self) -> None:
        """Forget prefixes that other weights computed."""
        model = self._program.model
        if self.pool is not None and self._watch.sees_change(model):
            self._watch = WeightWatch(model, is_copied=True)
            self.pool.clear()

    def launch(self, batch: PackedBatch, readout: Readout) -> Launched:
        """Start a batch; the host goes on while the device computes."""
        with self._recovering():
            return self._program.start(batch, readout, self._pages)

    def read(self, launched: Sequence[Launched]) -> RowLogits:
        """Logits and normaliser of all rows."""
        with self._recovering():
            found = [one.read() for one in launched]
        logits, normalizer = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return torch.from_numpy(logits), torch.from_numpy(normalizer)

    @contextmanager
    def _recovering(self) -> Iterator[None]:
        """A launch that fails, at once or when it is read, must not leave spoilt pages behind."""
        try:
            yield
        except BaseException:
            if self._pages is not None:
                self._pages.recover()
            raise


def _costs(program: ModelProgram) -> CostModel:
    chip = chip_of(program.device)
    if chip is None:
        return flops_cost_model(program.sizes, token_bucket)
    itemsize = program.model.dtype.itemsize
    return tpu_cost_model(program.sizes, chip, itemsize, token_bucket)
