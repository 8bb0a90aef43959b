"""Programs compiled from shapes alone, and kept on disk for the next process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from packscore.errors import UnexpectedCompileError
from packscore.model.masks import MaskKind
from packscore.model.sizes import ModelSizes
from packscore.programs.interfaces import RESET_CACHE, USE_MESH
from packscore.programs.launch_inputs import LaunchInputs, block_sizes_for
from packscore.programs.mesh.chips import REPLICATED, ChipGroup
from packscore.programs.mesh.cuts import MODEL, PartitionSpec
from packscore.programs.pages import PAGES, pool_struct
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
    """The compiled programs of one model on the chips of one copy of it.

    Compiling happens under a lock; compiled programs run from any number of threads.

    Args:
      traced: the model.
      sizes: of what each chip has of the model.
      chips: where programs run.
      implementation: of the kernels.
    """

    def __init__(
        self,
        traced: TracedModel,
        sizes: ModelSizes,
        chips: ChipGroup,
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
        self._chips = chips
        self._weights: Weights = {}  # as shapes
        self._by_tiles: dict[tuple[KernelImplementation, int], bool] = {}
        self._lock = threading.Lock()

    def follow(self, before: Executables) -> None:
        """Go on where those of another shape of the model end: as strict, counting from there."""
        self.strict, self.folder = before.strict, before.folder
        self.count, self.seconds = before.count, before.seconds

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
            self._by_tiles[asked] = can_skip_tiles(self._traced, *asked, self._chips)
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

    def _compile(self, key: ProgramKey | HeadKey) -> Callable[..., Any]:
        start = time.perf_counter()
        norm = self._weights["norm"]["weight"]
        beside = arguments_of(key, self._sizes, norm, num_chips=len(self._chips))
        arguments = self._weights, *beside
        with compiling_into(self.folder):
            compiled = compile_program(
                self._traced, key, arguments, self._chips, self.implementation
            )
        seconds = time.perf_counter() - start
        self.count += 1
        self.seconds += seconds
        memory = compiled.memory_analysis()
        code_bytes = getattr(memory, "generated_code_size_in_bytes", 0)
        logger.info("compiled %s in %.1f s, %d bytes of code", key, seconds, code_bytes)
        return compiled


def warm_up(
    copies: Sequence[Executables],
    keys: Sequence[ProgramKey | HeadKey],
    *,
    show_progress_bar: bool,
) -> int:
    """Compile those of these programs that are not there, of all copies side by side.

    Returns:
      How many.
    """
    before = sum(one.count for one in copies)
    with ThreadPoolExecutor(len(copies)) as pool:
        for key in tqdm(keys, unit="program", disable=not show_progress_bar):
            list(pool.map(lambda one, key=key: one.get(key, expected=True), copies))
    return sum(one.count for one in copies) - before


def arguments_of(
    key: ProgramKey | HeadKey,
    sizes: ModelSizes,
    norm: Any,
    chip: str | None = None,
    num_chips: int = 1,
) -> tuple[Any, ...]:
    """What a program takes beside weights, of the right shapes and no other meaning.

    Args:
      key: which program.
      sizes: of what each chip has of the model.
      norm: shape and dtype of the final norm's weight, and so of hidden states.
      chip: whose tiles attention has; None is this process's.
      num_chips: that have parts of the model.
    """
    if isinstance(key, HeadKey):
        rows = shape_of((key.num_rows, *norm.shape), norm.dtype)
        if not key.num_labels:
            return (rows,)
        return rows, shape_of((key.num_labels,), np.int32), shape_of((), np.int32)
    blocks = block_sizes_for(sizes, norm.dtype, key, chip)
    layout = SegmentLayout.single(1, [], 1)
    inputs = LaunchInputs.of(key, blocks, layout, np.zeros(1, np.int64), [])
    pool = pool_struct(sizes, norm.dtype, key.num_pages, num_chips) if key.num_pages else None
    return pool, inputs


def can_skip_tiles(
    traced: TracedModel, implementation: KernelImplementation, itemsize: int, chips: ChipGroup
) -> bool:
    """Whether a model's programs can have the number of token tiles as data, on these chips."""
    with tracing_on(chips.mesh.abstract_mesh):
        return traced.can_skip_tiles(implementation, itemsize)


def compile_program(
    traced: TracedModel,
    key: ProgramKey | HeadKey,
    arguments: tuple[Any, ...],
    chips: ChipGroup,
    implementation: KernelImplementation,
) -> jax.stages.Compiled:
    """Compile one program from shapes alone, for chips that need not be there.

    Args:
      traced: the model.
      key: which program.
      arguments: anything with shapes and dtypes: weights and what the head takes for a `HeadKey`,
        else weights, pages (None where the program has none) and `LaunchInputs`.
      chips: jax's, or those of a topology, as many as the model is traced for.
      implementation: of the kernels.

    Returns:
      The compiled program, a function of the arguments. It gives the logits of a `HeadKey`, else
      (hidden rows or label logits, pages) as the methods of `TracedModel` do; the pages are
      changed in place.
    """
    specs = specs_of(traced, key, arguments)
    struct: Any = jax.ShapeDtypeStruct

    def placed(spec: Any, tree: Any) -> Any:
        where = chips.sharding(spec)
        return jax.tree.map(lambda x: struct(x.shape, x.dtype, sharding=where), tree)

    shapes = jax.tree.map(placed, specs, arguments, is_leaf=lambda x: isinstance(x, PartitionSpec))
    with traced.lock, tracing_on(chips.mesh.abstract_mesh):
        lowered = trace_program(traced, key, shapes, implementation, chips).lower()
    compiled: jax.stages.Compiled = lowered.compile()
    return compiled


@contextmanager
def tracing_on(mesh: jax.sharding.AbstractMesh) -> Iterator[None]:
    """Within the block programs are traced and lowered for a chip, and float32 means float32.

    A TPU multiplies float32 in one pass of bfloat16 unless it is asked for more. Asked for the
    most, it takes as many passes as the operands need: of bfloat16 still one.

    Args:
      mesh: of the devices, of which kernels ask what chip it is.
    """
    with USE_MESH()(mesh), jax.default_matmul_precision("highest"):
        yield


def trace_program(
    traced: TracedModel,
    key: ProgramKey | HeadKey,
    shapes: tuple[Any, ...],
    implementation: KernelImplementation,
    chips: ChipGroup | None = None,
) -> jax.stages.Traced:
    """One program before it is lowered, inside `tracing_on`; see `compile_program`.

    Args:
      traced: the model.
      key: which program.
      shapes: of its arguments.
      implementation: of the kernels.
      chips: where it will run; None: on one chip, whichever that is.
    """
    run: Callable[..., Any]
    given: Any
    if isinstance(key, HeadKey):
        run = traced.label_rows if key.num_labels else traced.whole_head
        given = REPLICATED if key.num_labels else PartitionSpec(None, MODEL)
    else:
        run, given = _program(traced, key, implementation), (REPLICATED, PAGES)
    if chips is not None:
        run = chips.on_each(run, specs_of(traced, key, shapes), given)
    donated = (1,) if isinstance(key, ProgramKey) and key.num_pages else ()
    return jax.jit(run, donate_argnums=donated).trace(*shapes)


def specs_of(
    traced: TracedModel, key: ProgramKey | HeadKey, arguments: tuple[Any, ...]
) -> tuple[Any, ...]:
    """How the arguments of a program are cut over the chips that the model is traced for."""
    weights, *others = arguments
    specs = [REPLICATED] * len(others)
    if isinstance(key, ProgramKey):
        specs[0] = PAGES
    return traced.cuts.specs(weights), *specs


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
    with _turn:
        _turn.wait_for(lambda: not _inside or _inside[0][0] == folder)
        options = {**OPTIONS, "jax_compilation_cache_dir": str(folder)}
        before = _inside[0][1] if _inside else {name: getattr(jax.config, name) for name in options}
        if not _inside:
            _configure(options)
        _inside.append((folder, before))
    try:
        yield
    finally:
        with _turn:
            _inside.pop()
            if not _inside:
                _configure(before)
                _turn.notify_all()


# Who compiles into a folder now, and jax's configuration of before: threads of one folder together.
_turn = threading.Condition()
_inside: list[tuple[Path, dict[str, Any]]] = []


def _configure(options: dict[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)  # type: ignore[no-untyped-call]
    RESET_CACHE()()  # jax reads the folder once
