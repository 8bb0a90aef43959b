"""The model as compiled programs on the JAX path: buckets, one compile each, one call a request."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from packscore.bridge import TracedModel
from packscore.errors import InputError, UnexpectedCompileError
from packscore.packing import PackedBatch
from packscore_kernels import BlockSizes, SegmentLayout, build_schedule, resolve_block_sizes
from packscore_kernels.hardware import cdiv, shape_of

logger = logging.getLogger("packscore")

SMALLEST_BUCKET = 128
# Programs up to here double; above, eight sizes an octave waste at most 12.5 %.
LARGEST_DOUBLING = 1024
DEFAULT_MAX_TOKENS = 16_384
# A program scores up to one item for so many tokens, or one for every token.
TOKENS_PER_ITEM = 16
SMALLEST_LABELS = 8

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
    num_labels: int
    over_vocabulary: bool


def program_key(
    num_tokens: int, num_items: int, num_labels: int, over_vocabulary: bool
) -> ProgramKey:
    """The program that serves a request of these sizes."""
    tokens = token_bucket(num_tokens)
    few = max(tokens // TOKENS_PER_ITEM, 1)
    # every item has a token, or shares the row of the prefix's last one with other empty items
    items = few if num_items <= few else 1 << max(num_items - 1, tokens - 1).bit_length()
    labels = max(SMALLEST_LABELS, 1 << (num_labels - 1).bit_length())
    return ProgramKey(tokens, items, labels, over_vocabulary)


def block_sizes_for(
    config: Any, dtype: Any, num_tokens: int, chip: str | None = None
) -> BlockSizes:
    """The attention's tiles for a model and a bucket."""
    num_heads = config.num_attention_heads
    return resolve_block_sizes(
        num_q_heads=num_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        dtype=dtype,
        num_tokens=num_tokens,
        chip=chip,
    )


def program_inputs(
    key: ProgramKey,
    block_sizes: BlockSizes,
    layout: SegmentLayout,
    token_ids: npt.NDArray[np.int64],  # [num_tokens], without padding
    label_ids: list[int],
) -> tuple[Any, ...]:
    """A request as a program takes it: token ids, positions, schedule, scored rows, label ids."""
    padded = replace(layout, num_tokens=key.num_tokens)
    rows = layout.scored_rows
    ids, scored = np.zeros(key.num_tokens, np.int32), np.zeros(key.num_items, np.int32)
    labels = np.zeros(key.num_labels, np.int32)
    ids[: len(token_ids)], scored[: len(rows)] = token_ids, rows
    labels[: len(label_ids)] = label_ids
    schedule = build_schedule(padded, block_sizes=block_sizes)
    return ids, padded.position_ids, schedule, scored, labels


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
        self._traced = TracedModel(type(model), model.config)
        self._weights = jax.device_put(self._traced.weights_of(model), device)
        self._config = model.config
        self._executables: dict[ProgramKey, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def run(
        self, batch: PackedBatch, label_ids: list[int], *, over_vocabulary: bool
    ) -> tuple[Float32, Float32]:
        """Label logits of a packed batch.

        Returns:
          (float32[num_items, num_labels], float32[num_items]): logits and their normaliser, in the
          order of the batch.

        Raises:
          UnexpectedCompileError: the batch needs a program that is not there, and `strict` is on.
        """
        rows = batch.layout.scored_rows
        key = program_key(len(batch.token_ids), len(rows), len(label_ids), over_vocabulary)
        inputs = program_inputs(
            key, self._block_sizes(key), batch.layout, batch.token_ids, label_ids
        )
        logits, normalizer = self._executable(key, inputs)(self._weights, *inputs)
        num_items, num_labels = len(rows), len(label_ids)
        # over the labels it is taken here, without the padding labels
        chosen = np.asarray(logits)[:num_items, :num_labels]
        if over_vocabulary:
            return chosen, np.asarray(normalizer)[:num_items]
        peak = chosen.max(-1)
        return chosen, peak + np.log(np.exp(chosen - peak[:, None]).sum(-1))

    def padding_tokens(self, num_tokens: int) -> int:
        """Padding that a batch of so many tokens runs with."""
        return token_bucket(num_tokens) - num_tokens

    def warmup(
        self,
        *,
        max_tokens: int | None = None,
        num_labels: int = 2,
        over_vocabulary: tuple[bool, ...] = (False, True),
        show_progress_bar: bool = False,
    ) -> int:
        """Compile every program that requests of up to `max_tokens` tokens can need.

        Returns:
          How many programs were compiled.
        """
        before = self.compile_count
        keys = {
            program_key(tokens, items, num_labels, over)
            for tokens in token_ladder(max_tokens or self.max_tokens)
            for items in (1, tokens)
            for over in over_vocabulary
        }
        ordered = sorted(keys, key=lambda key: (key.num_tokens, key.num_items, key.over_vocabulary))
        for key in tqdm(ordered, unit="program", disable=not show_progress_bar):
            layout = SegmentLayout.single(1, [], 1)
            inputs = program_inputs(
                key, self._block_sizes(key), layout, np.zeros(1, np.int64), [0] * num_labels
            )
            self._executable(key, inputs, expected=True)
        return self.compile_count - before

    def _block_sizes(self, key: ProgramKey) -> BlockSizes:
        return block_sizes_for(self._config, self._weights["norm"]["weight"].dtype, key.num_tokens)

    def _executable(
        self, key: ProgramKey, inputs: tuple[Any, ...], *, expected: bool = False
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

    def _compile(self, key: ProgramKey, inputs: tuple[Any, ...]) -> Callable[..., Any]:
        start = time.perf_counter()

        weights = jax.tree.map(lambda x: shape_of(x.shape, x.dtype), self._weights)
        compiled = compile_program(
            self._traced, weights, key, inputs, self.device, self._implementation
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
    key: ProgramKey,
    inputs: tuple[Any, ...],
    device: Any,
    implementation: str,
) -> Any:
    """Compile one program from shapes alone, for a device that need not be there."""

    def program(weights: Any, *arrays: Any) -> tuple[jax.Array, jax.Array | None]:
        return traced.label_logits(
            weights, *arrays, over_vocabulary=key.over_vocabulary, implementation=implementation
        )

    sharding = jax.sharding.SingleDeviceSharding(device)
    struct: Any = jax.ShapeDtypeStruct
    shapes = jax.tree.map(lambda x: struct(x.shape, x.dtype, sharding=sharding), (weights, *inputs))
    mesh = jax.sharding.Mesh([device], ("x",)).abstract_mesh  # pltpu asks it what chip this is
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(program).lower(*shapes).compile()


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
