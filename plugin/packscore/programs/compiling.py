"""Programs compiled from shapes alone, and kept on disk for the next process."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from packscore.errors import UnexpectedCompileError
from packscore.model.masks import MaskKind, final_cap
from packscore.model.sizes import ModelSizes
from packscore.programs.head import whole_head
from packscore.programs.interfaces import RESET_CACHE, USE_MESH
from packscore.programs.launch_inputs import LaunchInputs, block_sizes_for
from packscore.programs.pages import pool_struct
from packscore.programs.sizes import DenseKey, HeadKey, ProgramKey
from packscore.programs.traced_model import TracedModel
from packscore.programs.traced_ops import KernelImplementation
from packscore.programs.weights import Weights
from packscore_kernels import SegmentLayout
from packscore_kernels.hardware import shape_of

logger = logging.getLogger("packscore")

# jax keeps only what took long to compile; here every program is kept
OPTIONS: dict[str, Any] = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_enable_compilation_cache": True,
}


class Executables:
    """The compiled programs of one model on one device.

    Compiling happens under a lock; compiled programs run from any number of threads.

    Args:
      traced: the model.
      sizes: of the model.
      device: where programs run.
      implementation: of the kernels.
    """

    def __init__(
        self,
        traced: TracedModel,
        sizes: ModelSizes,
        device: jax.Device,
        implementation: KernelImplementation,
    ) -> None:
        self.implementation = implementation
        self.strict = False  # compile nothing but what a warm-up asks for
        self.count = 0  # of programs that were made ready
        self.seconds = 0.0  # that this took
        # folder that keeps compiled programs; None leaves that to jax's configuration
        self.folder: Path | None = None
        self.by_key: dict[ProgramKey | HeadKey, Callable[..., Any]] = {}
        self._traced = traced
        self._sizes = sizes
        self._device = device
        self._weights: Weights = {}  # as shapes
        self._by_tiles: dict[tuple[KernelImplementation, int], bool] = {}
        self._lock = threading.Lock()

    def adapt(self, weights: Weights) -> None:
        """Make programs for weights of these shapes from now on; those for others are dropped."""
        shapes = jax.tree.map(lambda x: shape_of(x.shape, x.dtype), weights)
        with self._lock:
            if shapes != self._weights:
                self.by_key.clear()
            self._weights = shapes

    @property
    def by_tiles(self) -> bool:
        """Whether kernels compute the tiles alone that hold tokens: few programs serve all."""
        norm = self._weights["norm"]["weight"]
        asked = self.implementation, norm.dtype.itemsize
        if asked not in self._by_tiles:
            self._by_tiles[asked] = can_skip_tiles(self._traced, *asked, self._device)
        return self._by_tiles[asked]

    def get(self, key: ProgramKey | HeadKey, *, expected: bool = False) -> Callable[..., Any]:
        """A program; see `compile_program` for what it takes and returns.

        Args:
          key: which one.
          expected: whether it may be compiled where `strict` is on.

        Raises:
          UnexpectedCompileError: it is not there, and `strict` is on.
        """
        found = self.by_key.get(key)
        if found is not None:
            return found
        with self._lock:
            if key not in self.by_key:
                if self.strict and not expected:
                    raise UnexpectedCompileError(
                        f"{key} is not compiled and strict=True; call warmup(max_tokens=...) for it"
                    )
                self.by_key[key] = self._compile(key)
            return self.by_key[key]

    def warm_up(self, keys: Iterable[ProgramKey | HeadKey], show_progress_bar: bool) -> int:
        """Compile those of these programs that are not there; returns how many."""
        before = self.count
        for key in tqdm(keys, unit="program", disable=not show_progress_bar):
            self.get(key, expected=True)
        return self.count - before

    def _compile(self, key: ProgramKey | HeadKey) -> Callable[..., Any]:
        start = time.perf_counter()
        norm = self._weights["norm"]["weight"]
        arguments = self._weights, *arguments_of(key, self._sizes, norm)
        with compiling_into(self.folder):
            compiled = compile_program(
                self._traced, key, arguments, self._device, self.implementation
            )
        seconds = time.perf_counter() - start
        self.count += 1
        self.seconds += seconds
        memory = compiled.memory_analysis()
        code_bytes = getattr(memory, "generated_code_size_in_bytes", 0)
        logger.info("compiled %s in %.1f s, %d bytes of code", key, seconds, code_bytes)
        return compiled


def arguments_of(
    key: ProgramKey | HeadKey, sizes: ModelSizes, norm: Any, chip: str | None = None
) -> tuple[Any, ...]:
    """What a program takes beside weights, of the right shapes and no other meaning.

    Args:
      key: which program.
      sizes: of the model.
      norm: shape and dtype of the final norm's weight, and so of hidden states.
      chip: whose tiles attention has; None is this process's.
    """
    if isinstance(key, HeadKey):
        return (shape_of((key.num_rows, *norm.shape), norm.dtype),)
    blocks = block_sizes_for(sizes, norm.dtype, key, chip)
    layout = SegmentLayout.single(1, [], 1)
    inputs = LaunchInputs.of(key, blocks, layout, np.zeros(1, np.int64), [])
    return pool_struct(sizes, norm.dtype, key.num_pages) if key.num_pages else None, inputs


def can_skip_tiles(
    traced: TracedModel, implementation: KernelImplementation, itemsize: int, device: Any
) -> bool:
    """Whether a model's programs can have the number of token tiles as data, on this device."""
    with tracing_on(jax.sharding.Mesh([device], ("x",)).abstract_mesh):
        return traced.can_skip_tiles(implementation, itemsize)


def compile_program(
    traced: TracedModel,
    key: ProgramKey | HeadKey,
    arguments: tuple[Any, ...],
    device: Any,
    implementation: KernelImplementation,
) -> jax.stages.Compiled:
    """Compile one program from shapes alone, for a device that need not be there.

    Args:
      traced: the model.
      key: which program.
      arguments: anything with shapes and dtypes: weights and rows of hidden states for a `HeadKey`,
        else weights, pages (None where the program has none) and `LaunchInputs`.
      device: a jax device, or one of a topology.
      implementation: of the kernels.

    Returns:
      The compiled program, a function of the arguments. It gives the logits of a `HeadKey`, else
      (hidden rows or label logits, pages) as the methods of `TracedModel` do; the pages are
      changed in place.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)
    struct: Any = jax.ShapeDtypeStruct
    shapes = jax.tree.map(lambda x: struct(x.shape, x.dtype, sharding=sharding), arguments)
    with tracing_on(jax.sharding.Mesh([device], ("x",)).abstract_mesh):
        program = trace_program(traced, key, shapes, implementation)
        compiled: jax.stages.Compiled = program.lower().compile()
    return compiled


@contextmanager
def tracing_on(mesh: jax.sharding.AbstractMesh) -> Iterator[None]:
    """Within the block programs are traced and lowered for a chip, and float32 means float32.

    A TPU multiplies float32 in one pass of bfloat16 unless it is asked for more. Asked for the
    most, it takes as many passes as the operands need: of bfloat16 still one.

    Args:
      mesh: of one device, of which kernels ask what chip it is.
    """
    with USE_MESH()(mesh), jax.default_matmul_precision("highest"):
        yield


def trace_program(
    traced: TracedModel,
    key: ProgramKey | HeadKey,
    shapes: tuple[Any, ...],
    implementation: KernelImplementation,
) -> jax.stages.Traced:
    """One program before it is lowered, inside `tracing_on`; see `compile_program`."""
    if isinstance(key, HeadKey):
        head = functools.partial(whole_head, soft_cap=final_cap(traced.skeleton))
        return jax.jit(head).trace(*shapes)
    donated = (1,) if key.num_pages else ()
    jitted = jax.jit(_program(traced, key, implementation), donate_argnums=donated)
    return jitted.trace(*shapes)


def _program(
    traced: TracedModel, key: ProgramKey, implementation: KernelImplementation
) -> Callable[..., Any]:
    mask_impl: MaskKind = "dense" if isinstance(key, DenseKey) else "segment"

    def program(weights: Weights, kv_pages: jax.Array | None, inputs: LaunchInputs) -> Any:
        run = traced.label_logits if key.num_labels else traced.hidden_rows
        return run(weights, kv_pages, inputs, implementation, mask_impl, key.tile)

    return program


@contextmanager
def compiling_into(folder: Path | None) -> Iterator[None]:
    """Within the block jax looks for compiled programs in `folder`, and keeps new ones there.

    jax's configuration is the process's: it is put back afterwards. None leaves it alone, so that
    `JAX_COMPILATION_CACHE_DIR` does what it does for all of jax.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    options = {**OPTIONS, "jax_compilation_cache_dir": str(folder)}
    before = {name: getattr(jax.config, name) for name in options}
    try:
        _configure(options)
        yield
    finally:
        _configure(before)


def _configure(options: dict[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)  # type: ignore[no-untyped-call]
    RESET_CACHE()()  # jax reads the folder once
