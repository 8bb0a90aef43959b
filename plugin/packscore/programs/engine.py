"""Packed batches through compiled programs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from packscore.errors import MaskTooLargeError, PackscoreError, UnsupportedModelError
from packscore.flows.costs import CostModel, flops_cost_model, tpu_cost_model
from packscore.flows.engine import Engine, Limits, Readout, RowValues
from packscore.flows.packing import PackedBatch
from packscore.flows.page_pool import PagePool
from packscore.model.family import check_supported
from packscore.model.masks import MaskKind, check_segment
from packscore.model.plain import foreign_part
from packscore.programs.interfaces import RUNTIME_ERROR
from packscore.programs.launched import Launched
from packscore.programs.pages import DevicePages
from packscore.programs.program import ModelProgram
from packscore.programs.sizes import MAX_GROUPS, NAMED_PAGES
from packscore.results import Flow, MaskImpl
from packscore_kernels.hardware import chip_of

# XLA's status, which its errors begin with.
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


class ProgramEngine:
    """What runs packed batches on the JAX path.

    Args:
      program: of the patched model.
      cache_bytes: what the pages of prefixes may take.
      mask_kind: how items are kept apart; the programs of both share the weights.
      copy: which of the program's copies of the model it runs on.
    """

    only_flow: Flow | None = None
    keeps_pages = True
    whole_last: str | None = None  # what is foreign in a model is refused

    def __init__(
        self, program: ModelProgram, cache_bytes: int, mask_kind: MaskKind, copy: int = 0
    ) -> None:
        self.mask_impl: MaskImpl = mask_kind
        self._mask_kind: MaskKind = mask_kind
        self._program, self._copy = program, copy
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self.pool: PagePool | None = None
        self._pages: DevicePages | None = None
        self._most_tokens = program.max_tokens
        self._follow()
        self.costs = _costs(program, mask_kind)

    @property
    def limits(self) -> Limits:
        """One program's; under a dense mask one request's, of the memory free when a run began."""
        if self._mask_kind == "dense":
            return Limits(min(self._most_tokens, self._program.max_tokens), 1, 1, NAMED_PAGES)
        most = self._program.max_tokens
        return Limits(most, most, MAX_GROUPS, NAMED_PAGES)

    def refresh(self, *, force: bool = False) -> None:
        """Follow the model where it changed, and forget prefixes of before."""
        if self._copy == 0:  # for all, who are asked one behind the other
            self._program.refresh(force=force)
        if self._mask_kind == "dense":
            self._most_tokens = self._program.fitting_tokens()
        with self._lock:  # whoever comes meanwhile waits, and finds no page of before
            if self._generation != self._program.generation:
                self._follow()
        if self._foreign:
            raise UnsupportedModelError(
                f"the model has {self._foreign}, which programs would not run; take it away, or "
                "patch the model without device=..."
            )

    def _follow(self) -> None:
        """Pages for the model as it is now, which hold nothing yet."""
        program, generation = self._program, self._program.generation
        check_supported(program.model)
        if self._mask_kind == "segment":
            check_segment(program.model, longest=1)
        self._foreign = foreign_part(program.model)
        if self.pool is not None:
            self.pool.clear()
        num_pages = program.num_pages(self._cache_bytes)
        pages = program.device_pages(num_pages, self._copy) if num_pages else None
        # fewer layers of more pages may be an array of the same shape
        is_as_large = self.pool is not None and self.pool.num_pages == num_pages
        has_pages = pages is not None and self._pages is not None and is_as_large
        if not has_pages or pages.struct != self._pages.struct:  # type: ignore[union-attr]
            self.pool = PagePool(num_pages) if num_pages else None
            self._pages = pages
            if self.pool is not None and pages is not None:
                pages.on_lost = self.pool.clear
        self._generation = generation

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether the device, the compiler for it, or the count of a mask's bytes found no room."""
        if isinstance(error, MemoryError):
            return isinstance(error, MaskTooLargeError) or not isinstance(error, PackscoreError)
        return isinstance(error, RUNTIME_ERROR()) and OUT_OF_MEMORY in str(error)

    def reads_rows(self, batch: PackedBatch) -> bool:
        """Whether the last layer runs for the scored rows of a batch alone: always."""
        return True

    def launch(self, batch: PackedBatch, readout: Readout) -> Launched:
        """Start a batch; the host goes on while the device computes."""
        with self._recovering():
            return self._program.start(batch, readout, self._pages, self._mask_kind, self._copy)

    def is_done(self, launched: Launched) -> bool:
        """Whether the device has computed a launch."""
        return launched.is_done

    def read(self, launched: Sequence[Launched]) -> RowValues:
        """What is read at all rows."""
        with self._recovering():
            return RowValues.joined([one.read() for one in launched])

    @contextmanager
    def _recovering(self) -> Iterator[None]:
        """A launch that fails, at once or when it is read, must not leave spoilt pages behind."""
        try:
            yield
        except BaseException:
            if self._pages is not None:
                self._pages.recover()
            raise


def engines_of(program: ModelProgram, cache_bytes: int, mask_kind: MaskKind) -> list[Engine]:
    """One for each of a program's copies of the model."""
    given = program, cache_bytes, mask_kind
    return [ProgramEngine(*given, copy) for copy in range(len(program.copies))]


def _costs(program: ModelProgram, mask_kind: MaskKind) -> CostModel:
    chip = chip_of(program.device)
    padded = functools.partial(program.computed_tokens, mask_kind=mask_kind)
    if chip is None:
        return flops_cost_model(program.sizes, padded)
    steps = program.grid_steps if mask_kind == "segment" else None
    chips, room = len(program.copies[0]), functools.partial(program.room, mask_kind=mask_kind)
    itemsize = program.model.dtype.itemsize
    return tpu_cost_model(program.sizes, chip, itemsize, padded, steps, chips, room)
