"""The kernel's call: grid, what lies where, and how much memory it may take."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from packscore_kernels.attention.kernel import attend
from packscore_kernels.attention.pieces import SUBLANES
from packscore_kernels.attention.refs import NUM_PREFETCH, Ref, Shape, W
from packscore_kernels.attention.tuning import vmem_bytes
from packscore_kernels.attention.types import SegmentSchedule
from packscore_kernels.hardware import deep_passes, shape_of, vmem_limit

LOG2E = 1.4426950408889634  # the kernel's exponentials are powers of two


def segment_attention_pallas(
    q: jax.Array,  # [num_q_heads, num_tokens, head_dim]
    k: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    v: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    kv_pages: jax.Array | None,  # [num_pages, num_kv_heads, 2, page_size, head_dim]
    schedule: SegmentSchedule,
    *,
    sm_scale: float,
    live_tiles_only: bool = False,
    interpret: Any = False,
    count_visits: bool = False,
) -> Any:
    """The kernel over arrays whose number of tokens is a multiple of `block_kv`.

    Returns:
      [num_q_heads, num_tokens, head_dim], of which with `live_tiles_only` q tiles without a token
      are not written, and with `count_visits` also the blocks each (kv head,
      q tile) read beyond its window, i32[num_kv_heads, num_q_tiles].
    """
    num_q_heads, _, head_dim = q.shape
    num_kv_heads = k.shape[0]
    blocks = schedule.block_sizes
    shape = Shape(
        group_size=num_q_heads // num_kv_heads,
        head_dim=head_dim,
        scale=sm_scale * LOG2E,
        page_size=0 if kv_pages is None else schedule.page_size,
        blocks=blocks,
        count_visits=count_visits,
        ones=deep_passes(),
    )
    group, bq = shape.group_size, blocks.block_q
    used = vmem_bytes(group, head_dim, q.dtype.itemsize, blocks)
    num_tiles: Any = schedule.num_q_tiles
    if live_tiles_only:
        num_tiles = lax.div(schedule.counts[0] + (bq - 1), bq)
    here = lambda h, t, *_: (h, t, 0)  # noqa: E731
    before = lambda h, t, *_: (h, jnp.maximum(t * (bq // W) - 1, 0), 0)  # noqa: E731
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    in_specs = [
        pl.BlockSpec((2, bq), lambda h, t, *_: (0, t)),
        pl.BlockSpec((group, bq, head_dim), here),
        pl.BlockSpec((1, W, head_dim), before),
        pl.BlockSpec((1, bq, head_dim), here),
        pl.BlockSpec((1, W, head_dim), before),
        pl.BlockSpec((1, bq, head_dim), here),
        hbm,
        hbm,
        hbm,
    ]
    out_shape = [shape_of(q.shape, q.dtype)]
    out_specs = [pl.BlockSpec((group, bq, head_dim), here)]
    if count_visits:
        out_shape.append(shape_of((num_kv_heads, schedule.num_q_tiles), jnp.int32))
        out_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    slots = blocks.num_slots + 1  # the last is `redo`'s
    scratch = [
        pltpu.VMEM((slots, 2, blocks.chunk_kv, head_dim), k.dtype),
        pltpu.VMEM((slots, shape.value_rows, blocks.chunk_kv), k.dtype),
        pltpu.VMEM((group, 1, bq), jnp.float32),
        pltpu.VMEM((group, SUBLANES, bq), jnp.float32),
        pltpu.VMEM((group, head_dim, bq), jnp.float32),
        pltpu.VMEM((group, 1, bq), jnp.float32),
        pltpu.SemaphoreType.DMA((slots,)),
    ]

    def kernel(*refs: Ref) -> None:
        before_visits = NUM_PREFETCH + len(in_specs) + 1
        no_visits = () if count_visits else (None,)
        attend(shape, *refs[:before_visits], *no_visits, *refs[before_visits:])

    result = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=NUM_PREFETCH,
            grid=(num_kv_heads, num_tiles),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary" if count_visits else "parallel", "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=vmem_limit(used),
        ),
        interpret=interpret,
        name="segment_paged_attention",
    )(
        schedule.use_starts,
        schedule.narrow,
        schedule.uses,
        schedule.loads,
        schedule.page_indices,
        schedule.counts,
        schedule.rows,
        q,
        k,
        k,
        v,
        v,
        k,
        v,
        k if kv_pages is None else kv_pages,
    )
    return result if count_visits else result[0]
