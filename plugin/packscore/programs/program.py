"""The model as compiled programs on the JAX path: one compile a size, one call a request."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from packscore.flows.engine import Readout, RowValues
from packscore.flows.packing import PackedBatch
from packscore.flows.page_pool import PAGE_SIZE, PREFIX_CACHE_BYTES
from packscore.inputs import checked
from packscore.model.family import check_supported, class_count, model_told, output_head
from packscore.model.masks import MaskKind, check_segment, mask_reason
from packscore.programs.compiling import Executables, warm_up
from packscore.programs.dense import check_dense_fits, fitting_tokens
from packscore.programs.fused_layer import grid_steps
from packscore.programs.launch_inputs import LaunchInputs, block_sizes_for
from packscore.programs.launched import Launched, chunks, fetched, stops_before_head
from packscore.programs.mesh.chips import ChipGroup, copies_told
from packscore.programs.pages import DevicePages, pages_within, pool_struct
from packscore.programs.row_attention import row_arguments
from packscore.programs.sizes import (
    DEFAULT_MAX_TOKENS,
    HEAD_ROWS,
    MOST_LABELS,
    DenseKey,
    HeadKey,
    ProgramKey,
    computed_tokens,
    program_key,
    program_sizes,
    token_bucket,
)
from packscore.programs.traced_model import TracedModel
from packscore.programs.traced_ops import KernelImplementation
from packscore.programs.weights import DeviceWeights, to_torch
from packscore.results import MaskChoice
from packscore.telling import counted, telling
from packscore_kernels import BlockSizes, SegmentLayout
from packscore_kernels.hardware import cdiv

logger = logging.getLogger("packscore")


class ModelProgram:
    """The programs of one model, on one chip or on several.

    Compiling happens under a lock; compiled programs run from any number of threads.

    Args:
      model: a plain Hugging Face causal model on the CPU, whose weights become shared with jax, or
        on torchax.
      device: where programs run; the weights are put there once. None where `copies` say it.
      copies: the chips of each copy of the model, as many in each; what a launch runs on.
      implementation: of the kernels: "pallas" (TPU), "pallas_interpret" or "xla".
      max_tokens: the largest program; longer requests are split.

    Raises:
      UnsupportedModelError: an adapter, quantised weights, or weights that are elsewhere.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: jax.Device | None = None,
        copies: Sequence[ChipGroup] = (),
        implementation: KernelImplementation = "xla",
        max_tokens: int = DEFAULT_MAX_TOKENS,
    ) -> None:
        self.max_tokens = token_bucket(max_tokens)
        self.copies = tuple(copies) or (ChipGroup.of(device),)
        self.device = self.copies[0].first  # which stands for all
        self._model = weakref.ref(model)
        self._implementation = implementation
        self._lock = threading.Lock()
        self._generations = 0  # of weights that earlier shapes of the model had
        self._trace(model)

    def _trace(self, model: PreTrainedModel) -> None:
        """Programs for the modules that the model has now."""
        traced = TracedModel(type(model), model.config, self.copies[0].axis)
        given = traced, traced.sizes
        found = [Executables(*given, chips, self._implementation) for chips in self.copies]
        on_taken = [one.adapt for one in found]
        weights = DeviceWeights(model, traced.skeleton, self.copies, traced.cuts, on_taken)
        self.sizes, self.num_classes = traced.sizes, class_count(model)
        self._vocab_size = len(output_head(model).weight)
        self._executables, self._of_copies, self._weights = found[0], found, weights

    @telling
    def __repr__(self) -> str:
        model = self._model()
        told = "its model is gone" if model is None else model_told(model)
        ready = f"{counted(self.compile_count, 'program')} ready"
        most = f"up to {self.max_tokens:,} tokens"
        return f"{told}, on {self.place} by {self._implementation!r}, {ready}, {most}"

    @property
    def place(self) -> str:
        """Where programs run, in words."""
        return copies_told(self.copies)

    @property
    def model(self) -> PreTrainedModel:
        """The model, which must still be there."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model of these programs is gone; keep it while they are used")
        return model

    @property
    def compile_count(self) -> int:
        """How many programs were made ready, compiled or loaded."""
        return sum(executables.count for executables in self._of_copies)

    @property
    def compile_seconds(self) -> float:
        """What that took."""
        return sum(executables.seconds for executables in self._of_copies)

    @property
    def strict(self) -> bool:
        """Whether a program that no warm-up made ready is an `UnexpectedCompileError`."""
        return self._executables.strict

    @strict.setter
    def strict(self, strict: bool) -> None:
        for executables in self._of_copies:
            executables.strict = strict

    @property
    def compile_cache(self) -> Path | None:
        """Folder that keeps compiled programs; None leaves that to jax's configuration."""
        return self._executables.folder

    @compile_cache.setter
    def compile_cache(self, folder: Path | None) -> None:
        for executables in self._of_copies:
            executables.folder = folder

    @property
    def generation(self) -> int:
        """How often the model was seen to be another than before."""
        return self._generations + self._weights.generation

    def refresh(self, *, force: bool = False) -> bool:
        """Follow the model where it changed: its weights, their dtype, its sizes.

        A scorer and ordinary calls of the model do this once a request; whoever calls `run` or
        `logits` does it before.

        Args:
          force: whatever was seen of the model.

        Returns:
          Whether it had changed.

        Raises:
          UnsupportedModelError: an adapter or a hook was added, a module replaced, weights were
            quantised or moved, or the configuration contradicts the modules.
        """
        model = self._model()
        if model is None:
            return False
        with self._lock:  # whoever comes meanwhile waits, and finds the new ones
            if not force and not self._weights.sees_change(model):
                return False
            check_supported(model)
            if self._weights.fits(model):
                self._weights.follow(model)
            else:
                self._retrace(model)
        logger.info("%s changed, and its weights were looked at again", type(model).__name__)
        return True

    def _retrace(self, model: PreTrainedModel) -> None:
        """Programs for other modules: a vocabulary that grew, a layer that went."""
        before, generation = self._of_copies, self.generation
        self._trace(model)
        self._generations = generation + 1
        for own, earlier in zip(self._of_copies, before, strict=True):
            own.follow(earlier)

    def run(self, batch: PackedBatch, readout: Readout) -> RowValues:
        """What is read of a packed batch without pages, in the order of the batch.

        Raises:
          UnexpectedCompileError: the batch needs a program that is not there, and `strict` is on.
          UnsupportedModelError: the model was changed in a way that programs cannot follow.
        """
        return self.start(batch, readout).read()

    def start(
        self,
        batch: PackedBatch,
        readout: Readout,
        pages: DevicePages | None = None,
        mask_kind: MaskKind | None = None,
        copy: int = 0,
    ) -> Launched:
        """Begin a packed batch; raises what `run` does.

        Args:
          batch: whose leases say what is read from pages and written to them.
          readout: what is read of its rows.
          pages: that the leases speak of.
          mask_kind: how items are kept apart; None: in segments, unless the model needs a mask.
          copy: which of `copies` runs it, and has the pages.

        Raises:
          MaskTooLargeError: a dense mask does not fit into the device's memory.
        """
        weights, executables = self._weights.of_copies[copy], self._of_copies[copy]
        layout = batch.layout
        rows, of_hidden = batch.rows, stops_before_head(readout)
        label_ids = () if of_hidden else readout.label_ids
        num_pages = pages.num_pages if pages else 0
        key = self._key(layout, len(rows), len(label_ids), num_pages, mask_kind)
        leases = [share.lease for share in batch.shares]
        inputs = LaunchInputs.of(
            *(key, self._blocks(key), layout, batch.token_ids, label_ids),
            rows=rows,
            leases=leases,
            over_vocabulary=readout.over_vocabulary,
        )
        run = executables.get(key)
        if pages is None:
            parts, _ = run(weights, None, inputs)
        else:
            parts = pages.through(lambda array: run(weights, array, inputs), leases)

        def head(hidden: npt.NDArray[Any], *labels: Any) -> Any:
            return executables.get(HeadKey(len(hidden), MOST_LABELS))(weights, hidden, *labels)

        return Launched(parts, len(rows), readout, head if of_hidden else None)

    def logits(
        self,
        batch: PackedBatch,
        rows: npt.NDArray[np.integer[Any]],  # [num_rows], indices into the packed tokens
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Logits of the whole vocabulary at some tokens, a few rows at a time.

        Yields:
          (index of the first row, [at most 128, vocab_size] on the CPU in the model's dtype).

        Raises:
          UnexpectedCompileError: a program is not there, and `strict` is on.
          UnsupportedModelError: the model was changed in a way that programs cannot follow.
        """
        weights = self._weights.arrays
        key = self._key(batch.layout, len(rows), 0)
        inputs = LaunchInputs.of(
            key, self._blocks(key), batch.layout, batch.token_ids, (), rows=rows
        )
        parts, _ = self._executables.get(key)(weights, None, inputs)
        hidden = fetched(parts, len(rows))
        for at, chunk in chunks(hidden):
            logits = self._executables.get(HeadKey(len(chunk)))(weights, chunk)
            yield at.start, to_torch(logits)[: at.stop - at.start, : self._vocab_size]

    def needs_mask(self, longest: int) -> bool:
        """Whether sequences of up to so many tokens are exact under a dense mask alone."""
        return mask_reason(self.model, longest) is not None

    def fitting_tokens(self) -> int:
        """Tokens of the largest program under a dense mask that the free memory holds."""
        itemsize = self._weights.dtype.itemsize
        return fitting_tokens(self.sizes, itemsize, self.device, self.max_tokens)

    def computed_tokens(self, num_tokens: int, mask_kind: MaskKind = "segment") -> int:
        """Tokens that a launch of so many runs with."""
        by_tiles = mask_kind == "segment" and self._executables.by_tiles
        return computed_tokens(num_tokens, by_tiles=by_tiles)

    def room(self, num_tokens: int, mask_kind: MaskKind = "segment") -> int:
        """Tokens that the program of such a launch has room for."""
        by_tiles = mask_kind == "segment" and self._executables.by_tiles
        return program_key(num_tokens, 1, 1, 0, by_tiles=by_tiles).num_tokens

    def grid_steps(self, num_tokens: int) -> int:
        """Steps of the kernels' grids in a launch of so many tokens, where these are counted."""
        if not self._executables.by_tiles:
            return 0
        key = program_key(num_tokens, 1, 1, 1, by_tiles=True)
        itemsize, block_q = self._weights.dtype.itemsize, self._blocks(key).block_q
        return grid_steps(self.sizes, itemsize, key, block_q, num_tokens)

    def _key(
        self,
        layout: SegmentLayout,
        num_rows: int,
        num_labels: int,
        num_pages: int = 0,
        mask_kind: MaskKind | None = None,
    ) -> ProgramKey:
        """The program that serves a layout and keeps items apart in this way.

        Raises:
          MaskTooLargeError: its mask does not fit.
          UnsupportedModelError: segments are asked for, and would not be exact.
        """
        if mask_kind == "segment":
            check_segment(self.model, layout.longest)
        needed = layout.num_real_tokens, num_rows, num_labels, num_pages
        if mask_kind == "segment" or not (mask_kind or self.needs_mask(layout.longest)):
            return program_key(*needed, by_tiles=self._executables.by_tiles)
        named = sum(len(group.page_indices) for group in layout.groups)
        dense = DenseKey.of(program_key(*needed), named)
        itemsize = self._weights.dtype.itemsize
        check_dense_fits(self.model, self.sizes, itemsize, self.device, dense, layout.longest)
        return dense

    def row_arguments(self, attention_mask: Any) -> dict[str, Any]:
        """What an ordinary call of a model on torchax takes in the place of its 2-D mask."""
        return row_arguments(attention_mask, self._implementation)

    @checked
    def warmup(
        self,
        *,
        max_tokens: int | None = None,
        num_labels: int = 2,
        hidden_states: bool = False,
        plain_calls: bool = False,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        mask_impl: MaskChoice = "auto",
        show_progress_bar: bool = False,
    ) -> int:
        """Compile every program that requests of up to `max_tokens` tokens can need.

        Args:
          max_tokens: of the longest request; None takes the largest program.
          num_labels: how many labels requests read; a classifier's are all of its classes.
          hidden_states: with the programs that leave the head to others, for `Hidden` readouts and
            for launches that read over 64 labels.
          plain_calls: with the programs of `model(input_ids=...)`.
          prefix_cache_bytes: of the scorer that will run them.
          mask_impl: of that scorer; under a dense mask a program for every few pages it may read.
          show_progress_bar: show one, counting programs.

        Returns:
          How many programs were compiled.
        """
        num_pages = self.num_pages(prefix_cache_bytes)
        labels = self.num_classes or num_labels
        kinds = {(labels if labels <= MOST_LABELS else 0, num_pages)}
        if hidden_states:
            kinds.add((0, num_pages))
        if plain_calls:  # which keep nothing
            kinds.add((self.num_classes, 0))
        longest = max_tokens or self.max_tokens

        def keys_of(kinds: set[tuple[int, int]], *, by_tiles: bool) -> set[ProgramKey]:
            return {
                program_key(tokens, 1, labels, pages, by_tiles=by_tiles)
                for tokens in program_sizes(longest, by_tiles=by_tiles)
                for labels, pages in kinds
            }

        keys = keys_of(kinds, by_tiles=self._executables.by_tiles)
        heads = [HeadKey(n) for n in HEAD_ROWS if plain_calls and not self.num_classes]
        if hidden_states or labels > MOST_LABELS:
            heads += [HeadKey(n, MOST_LABELS) for n in HEAD_ROWS]
        if mask_impl == "segment":
            check_segment(self.model, longest=1)
        elif mask_impl == "dense" or self.needs_mask(longest):
            # ordinary calls take segments for rows that no window cuts
            plain = {key for key in keys if plain_calls and not key.num_pages}
            keys = {
                DenseKey.of(key, n)
                for key in keys_of(kinds, by_tiles=False)
                for n in range(min(cdiv(longest, PAGE_SIZE), key.num_pages) + 1)
            } | (plain if not self.needs_mask(1) else set())
        ordered = sorted(keys, key=lambda key: (key.num_tokens, key.num_labels))
        return warm_up(self._of_copies, [*ordered, *heads], show_progress_bar=show_progress_bar)

    def num_pages(self, cache_bytes: int) -> int:
        """Pages that so many bytes hold, and that a schedule can name."""
        return pages_within(self.sizes, self._weights.dtype, cache_bytes)

    def device_pages(self, num_pages: int, copy: int = 0) -> DevicePages:
        """Pages for the keys and values of this model's prefixes, on the chips of a copy."""
        chips = self.copies[copy]
        struct = pool_struct(self.sizes, self._weights.dtype, num_pages, len(chips))
        return DevicePages(num_pages, struct, chips)

    def _blocks(self, key: ProgramKey) -> BlockSizes:
        return block_sizes_for(self.sizes, self._weights.dtype, key)
