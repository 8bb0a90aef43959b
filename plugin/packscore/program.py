"""The model as compiled programs on the JAX path: buckets, one compile each, one call a request."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from packscore.bridge import TracedModel, shares_memory, to_torch, whole_head
from packscore.compile_cache import compiling_into
from packscore.errors import InputError, UnexpectedCompileError
from packscore.head import class_count
from packscore.kv_pages import page_bytes
from packscore.packing import PackedBatch
from packscore.paging import PAGE_SIZE, PREFIX_CACHE_BYTES, PrefixLease
from packscore.traced_ops import LayerPages
from packscore.watching import WeightWatch
from packscore_kernels import (
    BlockSizes,
    PageWrites,
    SegmentLayout,
    build_page_writes,
    build_schedule,
    resolve_block_sizes,
)
from packscore_kernels.hardware import cdiv, shape_of

logger = logging.getLogger("packscore")

SMALLEST_BUCKET = 128
# Programs up to here double; above, eight sizes an octave waste at most 12.5 %.
LARGEST_DOUBLING = 1024
DEFAULT_MAX_TOKENS = 16_384
# A program scores up to one item for so many tokens, or one for every token.
TOKENS_PER_ITEM = 16
SMALLEST_LABELS = 8
# What a schedule has room for: requests of one launch, pages of the pool, and pages that the
# requests of one launch name, each for itself where they share some.
MAX_GROUPS = 32
MAX_PAGES = 512
NAMED_PAGES = 256
# Rows of the programs that give the logits of the whole vocabulary: one token each of a few
# sequences, or many tokens in steps, whose logits fit beside the weights (78 MB for Qwen3).
HEAD_ROWS = (8, 128)

Float32 = npt.NDArray[np.float32]


def token_bucket(num_tokens: int) -> int:
    """The program that serves `num_tokens`: a power of two, or in eighths of one above 1 024."""
    size = max(SMALLEST_BUCKET, 1 << (num_tokens - 1).bit_length())
    if size <= LARGEST_DOUBLING:
        return size
    step = size // 16
    return cdiv(num_tokens, step) * step


def token_ladder(max_tokens: int) -> list[int]:
    """Every bucket up to the one that serves `max_tokens`."""
    sizes, size = [], SMALLEST_BUCKET
    while size < token_bucket(max_tokens):
        sizes.append(size)
        size = token_bucket(size + 1)
    return [*sizes, size]


@dataclass(frozen=True)
class ProgramKey:
    """What a program is compiled for; everything else is data."""

    num_tokens: int
    num_items: int
    num_labels: int  # 0: the program stops before the head and gives hidden states
    over_vocabulary: bool
    num_pages: int = 0  # of the pool that the program reads and writes; 0: it has none


@dataclass(frozen=True)
class HeadKey:
    """The program from hidden states to the logits of the whole vocabulary."""

    num_rows: int


def program_key(
    num_tokens: int, num_items: int, num_labels: int, over_vocabulary: bool, num_pages: int = 0
) -> ProgramKey:
    """The program that serves a request of these sizes."""
    tokens = token_bucket(num_tokens)
    few = max(tokens // TOKENS_PER_ITEM, 1)
    # every item has a token, or shares the row of the prefix's last one with other empty items
    items = few if num_items <= few else 1 << max(num_items - 1, tokens - 1).bit_length()
    labels = max(SMALLEST_LABELS, 1 << (num_labels - 1).bit_length()) if num_labels else 0
    return ProgramKey(tokens, items, labels, over_vocabulary, num_pages)


def block_sizes_for(
    config: Any, dtype: Any, num_tokens: int, chip: str | None = None, page_size: int = 0
) -> BlockSizes:
    """The attention's tiles for a model and a bucket."""
    num_heads = config.num_attention_heads
    return resolve_block_sizes(
        num_q_heads=num_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        dtype=dtype,
        num_tokens=num_tokens,
        page_size=page_size,
        chip=chip,
    )


def program_inputs(
    key: ProgramKey,
    block_sizes: BlockSizes,
    layout: SegmentLayout,
    token_ids: npt.NDArray[np.int64],  # [num_tokens], without padding
    label_ids: list[int],
    rows: npt.NDArray[np.integer[Any]] | None = None,  # [num_items]: None takes the scored ones
    leases: Sequence[PrefixLease | None] = (),
) -> tuple[Any, ...]:
    """A request as a program takes it.

    Returns:
      (token ids, positions, schedule, scored rows, label ids), and of a program with pages what it
      writes to them.
    """
    padded = replace(layout, num_tokens=key.num_tokens)
    rows = layout.scored_rows if rows is None else rows
    ids, scored = np.zeros(key.num_tokens, np.int32), np.zeros(key.num_items, np.int32)
    labels = np.zeros(key.num_labels, np.int32)
    ids[: len(token_ids)], scored[: len(rows)] = token_ids, rows
    labels[: len(label_ids)] = label_ids
    schedule = build_schedule(
        padded,
        block_sizes=block_sizes,
        page_size=PAGE_SIZE if key.num_pages else 0,
        num_pages=key.num_pages,
        max_groups=MAX_GROUPS,
        max_pages=max(key.num_pages, NAMED_PAGES) if key.num_pages else 0,
    )
    inputs = ids, padded.position_ids, schedule, scored, labels
    return (*inputs, _page_writes(key, padded, leases)) if key.num_pages else inputs


def most_page_writes(num_tokens: int) -> int:
    """Pages that a launch of so many tokens can write: a group may begin and end inside one."""
    return cdiv(num_tokens, PAGE_SIZE) + MAX_GROUPS


def _page_writes(
    key: ProgramKey, layout: SegmentLayout, leases: Sequence[PrefixLease | None]
) -> PageWrites:
    """What a launch leaves in pages: the tokens that its leases miss."""
    missing = [lease if lease and not lease.is_whole else None for lease in leases]
    missing += [None] * (len(layout.groups) - len(missing))
    return build_page_writes(
        layout,
        [lease.pages if lease else np.zeros(0, np.int32) for lease in missing],
        page_size=PAGE_SIZE,
        num_pages=key.num_pages,
        max_writes=most_page_writes(key.num_tokens),
        copied_pages=[lease.copied_page if lease else None for lease in missing],
    )


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


def pages_within(config: Any, dtype: Any, cache_bytes: int) -> int:
    """Pages that so many bytes hold, and that a schedule can name."""
    return min(cache_bytes // page_bytes(config, jnp.dtype(dtype), PAGE_SIZE), MAX_PAGES)


def pool_struct(config: Any, dtype: Any, num_pages: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the pages of all layers of a model, as one array."""
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    page = (config.num_key_value_heads, 2, PAGE_SIZE, head_dim)
    return shape_of((config.num_hidden_layers * num_pages, *page), dtype)


class DevicePages:
    """Pages of all layers as one array, handed from launch to launch and changed in place.

    Args:
      num_pages: pages of a layer.
      struct: of the array, from `pool_struct`.
      device: where it is.
    """

    def __init__(self, num_pages: int, struct: jax.ShapeDtypeStruct, device: Any) -> None:
        self.num_pages = num_pages
        self.struct = struct
        self._device = device
        self._array: jax.Array | None = None
        self._lock = threading.Lock()
        # called when a launch failed and took what was in the pages with it
        self.on_lost: Callable[[], None] = lambda: None

    def through(
        self,
        run: Callable[[jax.Array], tuple[Any, jax.Array]],
        leases: Sequence[PrefixLease | None] = (),
    ) -> Any:
        """Hand the array to a launch and keep what it makes of it.

        Args:
          run: the launch; the array is donated to it.
          leases: whose pages it reads.

        Raises:
          StalePrefixError: another launch failed since a lease was taken, and lost its pages.
        """
        with self._lock:
            for lease in leases:
                if lease is not None:
                    lease.check()
            array, self._array = self._array, None
            if array is None:
                array = jnp.zeros(self.struct.shape, self.struct.dtype, device=self._device)
            try:
                out, self._array = run(array)
            except BaseException:
                if array.is_deleted():
                    self.on_lost()
                else:
                    self._array = array
                raise
            return out

    def recover(self) -> None:
        """Let the array go if a launch that failed has spoilt it; waits for the device."""
        with self._lock:
            try:
                if self._array is not None:
                    self._array.block_until_ready()
            except Exception:
                self._array = None
                self.on_lost()


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
        self.config = model.config
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

    def run(
        self, batch: PackedBatch, label_ids: list[int], *, over_vocabulary: bool
    ) -> tuple[Float32, Float32]:
        """Label logits of a packed batch without pages.

        Returns:
          (float32[num_items, num_labels], float32[num_items]): logits and their normaliser, in the
          order of the batch.

        Raises:
          UnexpectedCompileError: the batch needs a program that is not there, and `strict` is on.
          UnsupportedModelError: the model was changed in a way that programs cannot follow.
        """
        return self.start(batch, label_ids, over_vocabulary).read()

    def start(
        self,
        batch: PackedBatch,
        label_ids: list[int],
        over_vocabulary: bool,
        pages: DevicePages | None = None,
    ) -> Launched:
        """Begin a packed batch; raises what `run` does.

        Args:
          batch: whose leases say what is read from pages and written to them.
          label_ids: the labels' rows of the head.
          over_vocabulary: with the normaliser over the vocabulary.
          pages: that the leases speak of.
        """
        weights = self._current()
        layout = batch.layout
        num_items, num_labels = len(layout.scored_rows), len(label_ids)
        num_pages = pages.num_pages if pages else 0
        key = program_key(len(batch.token_ids), num_items, num_labels, over_vocabulary, num_pages)
        leases = [share.lease for share in batch.shares]
        blocks = self._block_sizes(key)
        inputs = program_inputs(key, blocks, layout, batch.token_ids, label_ids, leases=leases)
        if pages is None:
            logits, normalizer = self._executable(key, inputs)(weights, *inputs)
        else:
            run = self._executable(key, (pages.struct, *inputs))
            logits, normalizer = pages.through(lambda array: run(weights, array, *inputs), leases)
        return Launched(logits, normalizer, num_items, num_labels)

    def device_pages(self, num_pages: int) -> DevicePages:
        """Pages for the keys and values of this model's prefixes."""
        dtype = self._weights["norm"]["weight"].dtype
        return DevicePages(num_pages, pool_struct(self.config, dtype, num_pages), self.device)

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
        return pages_within(self.config, self._weights["norm"]["weight"].dtype, cache_bytes)

    def _block_sizes(self, key: ProgramKey) -> BlockSizes:
        dtype = self._weights["norm"]["weight"].dtype
        page_size = PAGE_SIZE if key.num_pages else 0
        return block_sizes_for(self.config, dtype, key.num_tokens, page_size=page_size)

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


def compile_program(
    traced: TracedModel,
    weights: Any,
    key: ProgramKey | HeadKey,
    inputs: tuple[Any, ...],
    device: Any,
    implementation: str,
) -> Any:
    """Compile one program from shapes alone, for a device that need not be there."""

    def program(weights: Any, *arrays: Any) -> Any:
        if isinstance(key, HeadKey):
            return whole_head(weights, *arrays)
        if not key.num_labels:
            tokens = arrays[:-1]  # all but the label ids, of which there are none
            return traced.hidden_rows(weights, *tokens, implementation=implementation)
        pages = None
        if key.num_pages:
            kv_pages, *arrays, writes = arrays  # type: ignore[assignment]
            pages = LayerPages(kv_pages, writes)
        found = traced.label_logits(
            weights,
            *arrays,
            over_vocabulary=key.over_vocabulary,
            pages=pages,
            implementation=implementation,
        )
        return found if pages is None else (found, pages.kv_pages)

    sharding = jax.sharding.SingleDeviceSharding(device)
    struct: Any = jax.ShapeDtypeStruct
    shapes = jax.tree.map(lambda x: struct(x.shape, x.dtype, sharding=sharding), (weights, *inputs))
    mesh = jax.sharding.Mesh([device], ("x",)).abstract_mesh  # pltpu asks it what chip this is
    with jax.sharding.use_abstract_mesh(mesh):
        # the pool is changed in place
        donated = (1,) if isinstance(key, ProgramKey) and key.num_pages else ()
        return jax.jit(program, donate_argnums=donated).lower(*shapes).compile()


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
