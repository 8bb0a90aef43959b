"""The model as compiled programs on the JAX path: one compile a bucket, one call a request."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from packscore.errors import InputError, UnexpectedCompileError
from packscore.flows.engine import Readout
from packscore.flows.packing import PackedBatch
from packscore.flows.page_pool import PREFIX_CACHE_BYTES
from packscore.model.family import class_count
from packscore.model.sizes import ModelSizes
from packscore.model.weight_watch import WeightWatch
from packscore.programs.compiling import compile_program, compiling_into
from packscore.programs.launch_inputs import block_sizes_for, program_inputs
from packscore.programs.pages import DevicePages, pages_within, pool_struct
from packscore.programs.sizes import (
    DEFAULT_MAX_TOKENS,
    HEAD_ROWS,
    HeadKey,
    ProgramKey,
    program_key,
    token_bucket,
    token_ladder,
)
from packscore.programs.traced_model import TracedModel
from packscore.programs.weights import shares_memory, to_torch
from packscore_kernels import BlockSizes, SegmentLayout
from packscore_kernels.hardware import shape_of

logger = logging.getLogger("packscore")

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Launched:
    """A program that is running, and which of its results are real."""

    logits: jax.Array  # float32[at least num_items, at least num_labels]
    normalizer: jax.Array | None  # float32[at least num_items]
    num_items: int
    num_labels: int

    def read(self) -> tuple[Float32, Float32]:
        """Wait for (float32[num_items, num_labels], float32[num_items]): logits and normaliser."""
        # over the labels it is taken here, without the padding labels
        chosen = np.asarray(self.logits)[: self.num_items, : self.num_labels]
        if self.normalizer is not None:
            return chosen, np.asarray(self.normalizer)[: self.num_items]
        peak = chosen.max(-1)
        return chosen, peak + np.log(np.exp(chosen - peak[:, None]).sum(-1))


class ModelProgram:
    """The programs of one model on one device.

    Compiling happens under a lock; compiled programs run from any number of threads.

    Args:
      model: a plain Hugging Face causal model on the CPU; its weights become shared with jax.
      device: where programs run; the weights are put there once.
      implementation: of the attention, as `segment_paged_attention` names them.
      max_tokens: the largest program; longer requests are split.

    Raises:
      UnsupportedModelError: an adapter, quantised weights, or weights that are elsewhere.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: jax.Device,
        implementation: str = "xla",
        max_tokens: int = DEFAULT_MAX_TOKENS,
    ) -> None:
        self.max_tokens = token_bucket(max_tokens)
        self.strict = False
        self.compile_count = 0
        self.device = device
        self._implementation = implementation
        # folder that keeps compiled programs; None leaves that to jax's configuration
        self.compile_cache: Path | None = None
        self._traced = TracedModel(type(model), model.config)
        self._model = weakref.ref(model)
        self.sizes = ModelSizes.of(model.config)
        self._weights, self._watch = self._put(model)
        self.num_classes = class_count(model)
        self._executables: dict[ProgramKey | HeadKey, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def _put(self, model: PreTrainedModel) -> tuple[Any, WeightWatch]:
        weights = jax.device_put(self._traced.weights_of(model), self.device)
        whole: Any = model
        is_shared = shares_memory(weights["norm"]["weight"], whole.get_decoder().norm.weight)
        return weights, WeightWatch(model, is_copied=not is_shared)

    @property
    def model(self) -> PreTrainedModel:
        """The model, which must still be there."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model of these programs is gone; keep it while they are used")
        return model

    def refresh(self) -> bool:
        """Take the model's weights again if they are no longer those that the programs have.

        Every call of the programs does this first.

        Returns:
          Whether they had changed.

        Raises:
          UnsupportedModelError: an adapter was added, or weights were quantised or moved.
        """
        model = self._model()
        if model is None or not self._watch.sees_change(model):
            return False
        with self._lock:
            if not self._watch.sees_change(model):  # another thread was faster
                return False
            shapes = self._shapes()
            self._weights, self._watch = self._put(model)
            if shapes != self._shapes():
                self._executables.clear()
        logger.info("the weights of %s changed, and were taken again", type(model).__name__)
        return True

    def _current(self) -> Any:
        self.refresh()
        return self._weights

    def _shapes(self) -> Any:
        return jax.tree.map(lambda x: shape_of(x.shape, x.dtype), self._weights)

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
        self, batch: PackedBatch, readout: Readout, pages: DevicePages | None = None
    ) -> Launched:
        """Begin a packed batch; raises what `run` does.

        Args:
          batch: whose leases say what is read from pages and written to them.
          readout: what is read of its scored rows.
          pages: that the leases speak of.
        """
        weights = self._current()
        layout = batch.layout
        num_items, num_labels = len(layout.scored_rows), len(readout.label_ids)
        num_pages = pages.num_pages if pages else 0
        over_vocabulary = readout.over_vocabulary
        key = program_key(len(batch.token_ids), num_items, num_labels, over_vocabulary, num_pages)
        leases = [share.lease for share in batch.shares]
        blocks = self._block_sizes(key)
        inputs = program_inputs(
            key, blocks, layout, batch.token_ids, readout.label_ids, leases=leases
        )
        if pages is None:
            logits, normalizer = self._executable(key, inputs)(weights, *inputs)
        else:
            run = self._executable(key, (pages.struct, *inputs))
            logits, normalizer = pages.through(lambda array: run(weights, array, *inputs), leases)
        return Launched(logits, normalizer, num_items, num_labels)

    def device_pages(self, num_pages: int) -> DevicePages:
        """Pages for the keys and values of this model's prefixes."""
        dtype = self._weights["norm"]["weight"].dtype
        return DevicePages(num_pages, pool_struct(self.sizes, dtype, num_pages), self.device)

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
        weights = self._current()
        key = program_key(len(batch.token_ids), len(rows), 0, False)
        blocks = self._block_sizes(key)
        inputs = program_inputs(key, blocks, batch.layout, batch.token_ids, [], rows)
        hidden = np.asarray(self._executable(key, inputs)(weights, *inputs))[: len(rows)]
        few, many = HEAD_ROWS
        step = few if len(rows) <= few else many
        for start in range(0, len(rows), step):
            chunk = np.zeros((step, hidden.shape[1]), hidden.dtype)
            part = hidden[start : start + step]
            chunk[: len(part)] = part
            found = self._executable(HeadKey(step), (chunk,))(weights, chunk)
            yield start, to_torch(found)[: len(part)]

    def padding_tokens(self, num_tokens: int) -> int:
        """Padding that a batch of so many tokens runs with."""
        return token_bucket(num_tokens) - num_tokens

    def warmup(
        self,
        *,
        max_tokens: int | None = None,
        max_items: int | None = None,
        num_labels: int = 2,
        over_vocabulary: tuple[bool, ...] = (False, True),
        plain_calls: bool = False,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        show_progress_bar: bool = False,
    ) -> int:
        """Compile every program that requests of up to `max_tokens` tokens can need.

        Args:
          max_tokens: of the longest request; None takes the largest program.
          max_items: of one request; None: one for every token, which takes two programs a bucket.
          num_labels: how many labels requests read; a classifier's are all of its classes.
          over_vocabulary: which programs: over the labels (False), over the vocabulary (True).
          plain_calls: with the programs of `model(input_ids=...)`.
          prefix_cache_bytes: of the scorer that will run them.
          show_progress_bar: show one, counting programs.

        Returns:
          How many programs were compiled.
        """
        before = self.compile_count
        num_pages = self.num_pages(prefix_cache_bytes)
        if self.num_classes:
            kinds = {(self.num_classes, False, num_pages)}
        else:
            kinds = {(num_labels, over, num_pages) for over in over_vocabulary}
        if plain_calls:  # which keep nothing
            kinds.add((self.num_classes, False, 0))
        keys = {
            program_key(tokens, items, labels, over, pages)
            for tokens in token_ladder(max_tokens or self.max_tokens)
            for items in (1, min(tokens, max_items or tokens))
            for labels, over, pages in kinds
        }
        heads = [HeadKey(n) for n in HEAD_ROWS if plain_calls and not self.num_classes]
        ordered = sorted(keys, key=lambda key: (key.num_tokens, key.num_items, key.over_vocabulary))
        for key in tqdm([*ordered, *heads], unit="program", disable=not show_progress_bar):
            self._executable(key, self._example(key), expected=True)
        return self.compile_count - before

    def _example(self, key: ProgramKey | HeadKey) -> tuple[Any, ...]:
        """Inputs of the shapes that a program takes."""
        if isinstance(key, HeadKey):
            norm = self._weights["norm"]["weight"]
            return (np.zeros((key.num_rows, *norm.shape), norm.dtype),)
        layout = SegmentLayout.single(1, [], 1)
        inputs = program_inputs(key, self._block_sizes(key), layout, np.zeros(1, np.int64), [])
        return (self.device_pages(key.num_pages).struct, *inputs) if key.num_pages else inputs

    def num_pages(self, cache_bytes: int) -> int:
        """Pages that so many bytes hold, and that a schedule can name."""
        return pages_within(self.sizes, self._weights["norm"]["weight"].dtype, cache_bytes)

    def _block_sizes(self, key: ProgramKey) -> BlockSizes:
        dtype = self._weights["norm"]["weight"].dtype
        return block_sizes_for(self.sizes, dtype, key)

    def _executable(
        self, key: ProgramKey | HeadKey, inputs: tuple[Any, ...], *, expected: bool = False
    ) -> Callable[..., Any]:
        found = self._executables.get(key)
        if found is not None:
            return found
        with self._lock:
            if key not in self._executables:
                if self.strict and not expected:
                    raise UnexpectedCompileError(
                        f"{key} is not compiled and strict=True; call warmup(max_tokens=...) for it"
                    )
                self._executables[key] = self._compile(key, inputs)
            return self._executables[key]

    def _compile(self, key: ProgramKey | HeadKey, inputs: tuple[Any, ...]) -> Callable[..., Any]:
        start = time.perf_counter()
        with compiling_into(self.compile_cache):
            compiled = compile_program(
                self._traced, self._shapes(), key, inputs, self.device, self._implementation
            )
        self.compile_count += 1
        memory = compiled.memory_analysis()
        code_bytes = getattr(memory, "generated_code_size_in_bytes", 0)
        logger.info(
            "compiled %s in %.1f s, %d bytes of code", key, time.perf_counter() - start, code_bytes
        )
        run: Callable[..., Any] = compiled
        return run


def resolve_device(device: str) -> tuple[jax.Device, str] | None:
    """(jax device, attention implementation) for "tpu", "jax" or "auto"; None is torch.

    Raises:
      InputError: the name is not one of these, or there is no TPU.
    """
    if device not in ("tpu", "jax", "auto"):
        raise InputError(f"{device=} must be 'tpu', 'jax', 'auto' or None")
    if device == "jax":
        return jax.devices()[0], "pallas" if jax.default_backend() == "tpu" else "xla"
    try:
        return jax.devices("tpu")[0], "pallas"
    except RuntimeError as error:
        if device == "tpu":
            raise InputError(
                f"{device=}: jax sees no TPU ({error}); install packscore[tpu] on a TPU machine, "
                "or pass device='jax'"
            ) from error
        return None
