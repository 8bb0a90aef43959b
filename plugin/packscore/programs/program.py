"""The model as compiled programs on the JAX path: one compile a size, one call a request."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from packscore.flows.engine import Readout
from packscore.flows.packing import PackedBatch
from packscore.flows.page_pool import PAGE_SIZE, PREFIX_CACHE_BYTES
from packscore.inputs import checked
from packscore.model.family import check_supported, class_count, model_told
from packscore.model.masks import MaskKind, check_segment, mask_reason
from packscore.model.sizes import ModelSizes
from packscore.programs.compiling import Executables
from packscore.programs.dense import check_dense_fits, fitting_tokens
from packscore.programs.fused_layer import grid_steps
from packscore.programs.launch_inputs import LaunchInputs, block_sizes_for
from packscore.programs.launched import Launched, fetched
from packscore.programs.pages import DevicePages, pages_within, pool_struct
from packscore.programs.row_attention import row_arguments
from packscore.programs.sizes import (
    DEFAULT_MAX_TOKENS,
    HEAD_ROWS,
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

Float32 = npt.NDArray[np.float32]


class ModelProgram:
    """The programs of one model on one device.

    Compiling happens under a lock; compiled programs run from any number of threads.

    Args:
      model: a plain Hugging Face causal model on the CPU, whose weights become shared with jax, or
        on torchax.
      device: where programs run; the weights are put there once.
      implementation: of the kernels: "pallas" (TPU), "pallas_interpret" or "xla".
      max_tokens: the largest program; longer requests are split.

    Raises:
      UnsupportedModelError: an adapter, quantised weights, or weights that are elsewhere.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: jax.Device,
        implementation: KernelImplementation = "xla",
        max_tokens: int = DEFAULT_MAX_TOKENS,
    ) -> None:
        self.max_tokens = token_bucket(max_tokens)
        self.device = device
        self._model = weakref.ref(model)
        self._implementation = implementation
        self._lock = threading.Lock()
        self._generations = 0  # of weights that earlier shapes of the model had
        self._trace(model)

    def _trace(self, model: PreTrainedModel) -> None:
        """Programs for the modules that the model has now."""
        traced = TracedModel(type(model), model.config)
        sizes = ModelSizes.of(model.config)
        executables = Executables(traced, sizes, self.device, self._implementation)
        weights = DeviceWeights(model, traced.skeleton, self.device, executables.adapt)
        self.sizes, self.num_classes = sizes, class_count(model)
        self._executables, self._weights = executables, weights

    @telling
    def __repr__(self) -> str:
        model = self._model()
        told = "its model is gone" if model is None else model_told(model)
        ready = f"{counted(self.compile_count, 'program')} ready"
        most = f"up to {self.max_tokens:,} tokens"
        return f"{told}, on {self.device} by {self._implementation!r}, {ready}, {most}"

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
        return self._executables.count

    @property
    def compile_seconds(self) -> float:
        """What that took."""
        return self._executables.seconds

    @property
    def strict(self) -> bool:
        """Whether a program that no warm-up made ready is an `UnexpectedCompileError`."""
        return self._executables.strict

    @strict.setter
    def strict(self, strict: bool) -> None:
        self._executables.strict = strict

    @property
    def compile_cache(self) -> Path | None:
        """Folder that keeps compiled programs; None leaves that to jax's configuration."""
        return self._executables.folder

    @compile_cache.setter
    def compile_cache(self, folder: Path | None) -> None:
        self._executables.folder = folder

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
        before, generation = self._executables, self.generation
        self._trace(model)
        self._generations = generation + 1
        self._executables.strict, self._executables.folder = before.strict, before.folder
        self._executables.count, self._executables.seconds = before.count, before.seconds

    def run(self, batch: PackedBatch, readout: Readout) -> tuple[Float32, Float32]:
        """Label logits of a packed batch without pages.

        Returns:
          (float32[num_items, num_labels], float32[num_items]): logits and their normaliser, in the
          order of the batch.

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
    ) -> Launched:
        """Begin a packed batch; raises what `run` does.

        Args:
          batch: whose leases say what is read from pages and written to them.
          readout: what is read of its scored rows.
          pages: that the leases speak of.
          mask_kind: how items are kept apart; None: in segments, unless the model needs a mask.

        Raises:
          MaskTooLargeError: a dense mask does not fit into the device's memory.
        """
        weights = self._weights.arrays
        layout = batch.layout
        num_items, num_labels = len(layout.scored_rows), len(readout.label_ids)
        num_pages = pages.num_pages if pages else 0
        key = self._key(layout, num_items, num_labels, num_pages, mask_kind)
        leases = [share.lease for share in batch.shares]
        inputs = LaunchInputs.of(
            *(key, self._blocks(key), layout, batch.token_ids, readout.label_ids),
            leases=leases,
            over_vocabulary=readout.over_vocabulary,
        )
        run = self._executables.get(key)
        if pages is None:
            parts, _ = run(weights, None, inputs)
        else:
            parts = pages.through(lambda array: run(weights, array, inputs), leases)
        return Launched(parts, num_items, readout)

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
        few, many = HEAD_ROWS
        step = few if len(rows) <= few else many
        for start in range(0, len(rows), step):
            chunk = np.zeros((step, hidden.shape[1]), hidden.dtype)
            part = hidden[start : start + step]
            chunk[: len(part)] = part
            logits = self._executables.get(HeadKey(step))(weights, chunk)
            yield start, to_torch(logits)[: len(part)]

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
        plain_calls: bool = False,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        mask_impl: MaskChoice = "auto",
        show_progress_bar: bool = False,
    ) -> int:
        """Compile every program that requests of up to `max_tokens` tokens can need.

        Args:
          max_tokens: of the longest request; None takes the largest program.
          num_labels: how many labels requests read; a classifier's are all of its classes.
          plain_calls: with the programs of `model(input_ids=...)`.
          prefix_cache_bytes: of the scorer that will run them.
          mask_impl: of that scorer; under a dense mask a program for every few pages it may read.
          show_progress_bar: show one, counting programs.

        Returns:
          How many programs were compiled.
        """
        num_pages = self.num_pages(prefix_cache_bytes)
        kinds = {(self.num_classes or num_labels, num_pages)}
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
        return self._executables.warm_up([*ordered, *heads], show_progress_bar)

    def num_pages(self, cache_bytes: int) -> int:
        """Pages that so many bytes hold, and that a schedule can name."""
        return pages_within(self.sizes, self._weights.dtype, cache_bytes)

    def device_pages(self, num_pages: int) -> DevicePages:
        """Pages for the keys and values of this model's prefixes."""
        struct = pool_struct(self.sizes, self._weights.dtype, num_pages)
        return DevicePages(num_pages, struct, self.device)

    def _blocks(self, key: ProgramKey) -> BlockSizes:
        return block_sizes_for(self.sizes, self._weights.dtype, key)
