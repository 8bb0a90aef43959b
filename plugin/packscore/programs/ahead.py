"""Compile the real program for a TPU that is not there, to see that it fits and what it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedConfig

from packscore.errors import InputError
from packscore.flows.page_pool import PREFIX_CACHE_BYTES, PrefixLease
from packscore.interfaces import MODEL_CLASSES
from packscore.model.masks import MaskKind
from packscore.programs.compiling import can_skip_tiles, compile_program
from packscore.programs.interfaces import TOPOLOGY
from packscore.programs.launch_inputs import LaunchInputs, block_sizes_for
from packscore.programs.mesh.chips import ChipGroup
from packscore.programs.pages import pages_within, pool_struct
from packscore.programs.sizes import DenseKey, ProgramKey, program_key
from packscore.programs.traced_model import TracedModel
from packscore.programs.traced_ops import KernelImplementation
from packscore.programs.weights import weight_shapes
from packscore_kernels import BlockSizes, SegmentLayout
from packscore_kernels.hardware import CHIPS


def bytes_of(shapes: Any) -> int:
    """Bytes of a pytree of arrays that need not exist."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


@dataclass(frozen=True, eq=False)
class AheadOfTime:
    """A program compiled for a chip, and what the compiler says of it."""

    compiled: jax.stages.Compiled
    block_sizes: BlockSizes
    key: ProgramKey
    compile_cpu_seconds: float  # of all threads
    code_bytes: int
    weight_bytes: int
    pool_bytes: int  # pages of prefixes
    temporary_bytes: int
    inputs: LaunchInputs


def slice_of(chip: str, chips: tuple[int, ...] = (1,)) -> ChipGroup:
    """The chips of a slice that need not be there.

    libtpu is to be told of as many: TPU_ACCELERATOR_TYPE=v6e-8 for (2, 4) of them.

    Args:
      chip: a name in `CHIPS`.
      chips: along each axis of the slice; a chip of two devices is one of them.
    """
    kind, one = CHIPS[chip].topology.split(":")
    shape = (*chips, *[1] * (len(one.split("x")) - len(chips)))
    bounds = (*shape, *[1] * (3 - len(shape)))
    name = f"{kind}:{'x'.join(map(str, shape))}"
    found = TOPOLOGY()(platform="tpu", topology_name=name, chips_per_host_bounds=bounds).devices
    return ChipGroup(tuple(found[: math.prod(chips)]))


def compile_ahead(
    config: PreTrainedConfig,
    layout: SegmentLayout,
    *,
    chip: str,
    num_labels: int = 2,
    dtype: Any = jnp.bfloat16,
    prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
    leases: Sequence[PrefixLease | None] = (),
    implementation: KernelImplementation = "pallas",
    mask_impl: MaskKind = "segment",
    group: ChipGroup | None = None,
) -> AheadOfTime:
    """Compile the program that would score `layout` with a model of this configuration.

    libtpu compiles for a named chip on any x86-64 Linux machine (packscore's extra `tpu`).
    It reads its environment when it loads: set TPU_SKIP_MDS_QUERY=1, ALLOW_MULTIPLE_LIBTPU_LOAD=1,
    TPU_WORKER_HOSTNAMES=localhost and TPU_ACCELERATOR_TYPE=v6e-1 (or another chip's) before jax is
    imported.

    Args:
      config: of a Qwen3, Qwen2 or Llama causal model.
      layout: the packed request; it is data, and any other that fits its program runs too.
      chip: "v4", "v5e", "v5p", "v6e" or "tpu7x".
      num_labels: how many labels are read.
      dtype: of the weights.
      prefix_cache_bytes: what the pages of prefixes may take, as in `MultiItemScorer`; 0: none.
      leases: of the pages that the request's prefixes go to; data too.
      implementation: of the kernels: "pallas" (TPU), "pallas_interpret" or "xla".
      mask_impl: "segment", or "dense" for a program that holds a mask.
      group: chips of such a slice that the model is cut over, some of `slice_of`; None: one chip.

    Returns:
      The compiled program with its sizes in bytes.

    Raises:
      InputError: the chip has no such name.
    """
    if chip not in CHIPS:
        raise InputError(f"{chip=} must be one of {', '.join(sorted(CHIPS))}")
    group = group or slice_of(chip)
    model_class: Any = MODEL_CLASSES()[type(config)]
    traced = TracedModel(model_class, config, group.axis)
    sizes = traced.sizes
    num_pages = pages_within(sizes, dtype, prefix_cache_bytes)
    itemsize, is_dense = jnp.dtype(dtype).itemsize, mask_impl == "dense"
    by_tiles = not is_dense and can_skip_tiles(traced, implementation, itemsize, group)
    needed = layout.num_real_tokens, len(layout.scored_rows), num_labels, num_pages
    key = program_key(*needed, by_tiles=by_tiles)
    if is_dense:
        key = DenseKey.of(key, sum(len(group.page_indices) for group in layout.groups))
    blocks = block_sizes_for(sizes, dtype, key, chip)
    token_ids = np.zeros(layout.num_real_tokens, np.int64)
    inputs = LaunchInputs.of(key, blocks, layout, token_ids, range(num_labels), leases=leases)
    pool = pool_struct(sizes, dtype, num_pages, len(group)) if num_pages else None
    weights = weight_shapes(traced.skeleton, dtype, traced.cuts)
    start = time.process_time()
    compiled = compile_program(traced, key, (weights, pool, inputs), group, implementation)
    seconds = time.process_time() - start
    memory: Any = compiled.memory_analysis()  # a TPU program has it
    return AheadOfTime(
        compiled,
        blocks,
        key,
        seconds,
        memory.generated_code_size_in_bytes,
        bytes_of(weights),
        bytes_of(pool),
        memory.temp_size_in_bytes,
        inputs,
    )
