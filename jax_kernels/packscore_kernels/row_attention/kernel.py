"""The same in Pallas: a grid step is a block of keys, for all heads and all rows that see it.

Scores are transposed as in the kernel of all tokens (`attention/kernel.py`). Rows come in parts; a
block meets the parts that see some of it, without a mask where they see all of it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from packscore_kernels.attention.pieces import (
    MASKED,
    SUBLANES,
    Stage,
    dot,
    pipeline,
    scaled,
    scores,
    sublanes,
    sum8,
    tame,
    within,
)
from packscore_kernels.attention.types import SegmentSchedule
from packscore_kernels.hardware import (
    CHIPS,
    LANES,
    align_to,
    shape_of,
    vmem_capacity,
    vmem_limit,
)
from packscore_kernels.row_attention.blocks import BLOCK_KEYS, Blocks, Seen, listed

LOG2E = 1.4426950408889634  # the kernel's exponentials are powers of two
ROWS, MIN_ROWS = LANES, 16  # of all q heads of a group in a part; of one
# Rows of all kv heads in one straight piece of code, and scores ahead of their softmax.
PIECE, AHEAD = 1024, 4
Ref = Any


def part_rows(group_size: int) -> int:
    """Rows of a part, of one q head."""
    return max(ROWS // group_size // MIN_ROWS * MIN_ROWS, MIN_ROWS)


def heads_at_once(num_kv_heads: int, lanes: int) -> int:
    """KV heads of one straight piece of code, whose parts have so many rows."""
    most = max(PIECE // lanes, 1)
    return next(n for n in range(min(most, num_kv_heads), 0, -1) if num_kv_heads % n == 0)


def parts_of(seen: Seen, group_size: int) -> Seen:
    """What rows see by parts, i32[num_parts, part_rows]; rows that fill up the last see nothing."""
    rows = part_rows(group_size)
    missing = -len(seen.own) % rows
    return Seen(*(jnp.pad(x, (0, missing)).reshape(-1, rows) for x in seen))


def _kernel(
    # prefetch
    order: Ref,  # i32[num_blocks]: which block a step is
    met: Ref,  # i32[num_parts * num_blocks]: 0 where a part sees nothing of one, 2 where all of it
    page_indices: Ref,  # i32[num_entries]
    # inputs
    seen: Ref,  # i32[num_parts, 8, lanes]: see `Seen`, for each q head of a group; then zeros
    q: Ref,  # [num_q_heads, num_rows, head_dim]
    k: Ref,  # [num_kv_heads, keys, head_dim]
    v: Ref,  # [num_kv_heads, keys, head_dim]
    *others: Ref,  # [num_kv_heads, 2, page_size, head_dim] for each page; then output and scratch
    blocks: Blocks,
    scale: float,
) -> None:
    del page_indices
    pages, (o, m, total, acc, keys, values) = others[: blocks.pages], others[blocks.pages :]
    num_kv_heads, head_dim = k.shape[0], k.shape[2]
    (num_parts, _, lanes), step = seen.shape, pl.program_id(0)
    group, block = q.shape[0] // num_kv_heads, order[step]
    rows = lanes // group
    at_once = heads_at_once(num_kv_heads, lanes)

    @pl.when(step == 0)
    def start() -> None:
        m[...] = jnp.full(m.shape, MASKED / 2, jnp.float32)  # above that of a key nobody sees
        total[...], acc[...] = jnp.zeros_like(total), jnp.zeros_like(acc)

    def at(head: jax.Array, part: jax.Array) -> tuple[Any, Any]:
        first = pl.multiple_of(part * rows, rows)
        return pl.ds(head * group, group), pl.ds(first, rows)

    def take(head: jax.Array, found_keys: jax.Array, found_values: jax.Array) -> None:
        tamed_keys, tamed_values = tame(found_keys, found_values, 1.0)
        keys[head], values[head] = tamed_keys, tamed_values.T

    @pl.when(block >= blocks.num_cached)
    def packed() -> None:
        def one(head: jax.Array, _: None) -> None:
            take(head, k[head], v[head])

        lax.fori_loop(0, num_kv_heads, one, None, unroll=at_once)

    if pages:

        @pl.when(block < blocks.num_cached)
        def cached() -> None:
            def one(head: jax.Array, _: None) -> None:
                take(head, *(jnp.concatenate([page[head, i] for page in pages]) for i in (0, 1)))

            lax.fori_loop(0, num_kv_heads, one, None, unroll=at_once)

    is_cached = block < blocks.num_cached
    first = jnp.where(is_cached, block, block - blocks.num_cached) * blocks.keys
    # of pages the one run, and none; of packed keys a row's own and its prefix
    runs = [jnp.where(is_cached, *pair) for pair in ((4, 0), (6, 2))]

    def issue(part: jax.Array, is_masked: bool, head: jax.Array) -> jax.Array:
        own_q = q[at(head, part)].reshape(lanes, head_dim)
        s = scaled(scores(keys[head], own_q), scale)
        if not is_masked:
            return s
        key = sublanes(*s.shape)
        spans = [(seen[part, pl.ds(i, 1)] - first, seen[part, pl.ds(i + 1, 1)]) for i in runs]
        visible = functools.reduce(jnp.logical_or, [within(key, *span) for span in spans])
        return jnp.where(visible, s, MASKED)

    def finish(part: jax.Array, head: jax.Array, s: jax.Array) -> None:
        own = part * num_kv_heads + head
        before = m[own]
        after = jnp.maximum(before, jnp.max(s, axis=0, keepdims=True))
        p, keep = jnp.exp2(s - after), jnp.exp2(before - after)
        out = dot(values[head], p.astype(values.dtype), 1, 0)
        m[own], total[own] = after, total[own] * keep + sum8(p)
        acc[own] = acc[own] * keep + out

    def meet(part: jax.Array, is_masked: bool) -> None:
        def some(i: jax.Array, _: None) -> None:
            heads = [i * at_once + j for j in range(at_once)]
            stages = [
                Stage(
                    functools.partial(issue, part, is_masked, head),
                    functools.partial(finish, part, head),
                )
                for head in heads
            ]
            pipeline(stages, AHEAD)

        lax.fori_loop(0, num_kv_heads // at_once, some, None)

    def attend(part: jax.Array, _: None) -> None:
        how = met[part * order.shape[0] + block]
        pl.when(how == 1)(lambda: meet(part, True))
        pl.when(how == 2)(lambda: meet(part, False))

    lax.fori_loop(0, num_parts, attend, None)

    @pl.when(step == pl.num_programs(0) - 1)
    def end() -> None:
        def one(own: jax.Array, _: None) -> None:
            part, head = lax.div(own, num_kv_heads), lax.rem(own, num_kv_heads)
            sums = jnp.sum(total[own], axis=0, keepdims=True)
            out = acc[own] / jnp.where(seen[part, 1:2] > 0, sums, 1.0)
            o[at(head, part)] = out.T.reshape(group, rows, head_dim).astype(o.dtype)

        lax.fori_loop(0, num_kv_heads * num_parts, one, None)


def block_keys(page_size: int) -> list[int]:
    """Keys of a block, the most first: whole pages, and whole registers of packed keys."""
    sizes = [BLOCK_KEYS]
    while sizes[-1] // 2 >= max(LANES, page_size):
        sizes.append(sizes[-1] // 2)
    return sizes


def vmem_bytes(
    heads: tuple[int, int], head_dim: int, itemsize: int, num_rows: int, blocks: Blocks
) -> int:
    """What the kernel holds: queries and outputs, blocks of keys and values, and the softmax."""
    num_q_heads, num_kv_heads = heads
    rows = align_to(num_rows, part_rows(num_q_heads // num_kv_heads))
    arrived = 4 * (2 if blocks.pages else 1) + 2  # of both kinds two each, and what is taken
    arrays = 2 * num_q_heads * rows + num_kv_heads * arrived * blocks.keys
    state = 4 * num_q_heads * rows * (head_dim + 2 * SUBLANES)
    return arrays * align_to(head_dim, LANES) * itemsize + state


def attend_rows_pallas(
    q: jax.Array,  # [num_q_heads, num_rows, head_dim]
    k: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    v: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    kv_pages: jax.Array | None,  # [num_pages, num_kv_heads, 2, page_size, head_dim]
    schedule: SegmentSchedule,
    seen: Seen,
    sm_scale: float,
    *,
    interpret: Any = False,
) -> jax.Array:
    """See `segment_attention_rows`."""
    (num_q_heads, num_rows, head_dim), num_kv_heads = q.shape, k.shape[0]
    group, has_pages = num_q_heads // num_kv_heads, kv_pages is not None
    held = functools.partial(vmem_bytes, (num_q_heads, num_kv_heads), head_dim, q.dtype.itemsize)
    room = (vmem_capacity() or CHIPS["v5e"].vmem_bytes) * 3 // 4
    sizes = (Blocks.of(schedule, has_pages, keys) for keys in block_keys(schedule.page_size))
    for blocks in sizes:
        if held(num_rows, blocks) <= room:
            break
    else:
        half = align_to(num_rows // 2, part_rows(group))
        if half < num_rows:
            both = [
                attend_rows_pallas(
                    *(q[:, own], k, v, kv_pages, schedule, Seen(*(x[own] for x in seen)), sm_scale),
                    interpret=interpret,
                )
                for own in (slice(half), slice(half, None))
            ]
            return jnp.concatenate(both, axis=1)
    parts = parts_of(seen, group)
    num_parts, rows = parts.own.shape
    lanes = rows * group
    q = jnp.pad(q, ((0, 0), (0, num_parts * rows - num_rows), (0, 0)))
    met = jax.vmap(blocks.met)(parts)
    order, count = listed((met > 0).any(axis=0))
    about = jnp.tile(jnp.stack([*parts, *[jnp.zeros_like(parts.own)] * 2], axis=1), (1, 1, group))
    page_indices = jnp.asarray(schedule.page_indices)
    missing = blocks.num_cached * blocks.pages - len(page_indices)
    page_indices = jnp.pad(page_indices, (0, max(missing, 0)))

    def whole(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape), pipeline_mode=pl.Buffered(1))

    def of_packed(i: Any, order: Ref, *_: Any) -> tuple[Any, ...]:
        return 0, jnp.maximum(order[i] - blocks.num_cached, 0), 0

    def of_page(i: Any, order: Ref, met: Ref, pages: Ref, *, page: int) -> tuple[Any, ...]:
        del met
        entry = jnp.minimum(order[i], blocks.num_cached - 1) * blocks.pages + page
        return pages[entry], 0, 0, 0, 0

    packed = pl.BlockSpec((num_kv_heads, blocks.keys, head_dim), of_packed)
    page_shape = (None, num_kv_heads, 2, schedule.page_size, head_dim)
    states = num_kv_heads * num_parts
    out: jax.Array = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, scale=sm_scale * LOG2E),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(jnp.maximum(count, 1),),
            in_specs=[
                whole(about.shape),
                whole(q.shape),
                packed,
                packed,
                *(
                    pl.BlockSpec(page_shape, functools.partial(of_page, page=page))
                    for page in range(blocks.pages)
                ),
            ],
            out_specs=whole(q.shape),
            scratch_shapes=[
                pltpu.VMEM((states, 1, lanes), jnp.float32),
                pltpu.VMEM((states, SUBLANES, lanes), jnp.float32),
                pltpu.VMEM((states, head_dim, lanes), jnp.float32),
                pltpu.VMEM((num_kv_heads, blocks.keys, head_dim), k.dtype),
                pltpu.VMEM((num_kv_heads, head_dim, blocks.keys), k.dtype),
            ],
        ),
        out_shape=shape_of(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_limit(held(num_rows, blocks))
        ),
        interpret=interpret,
        name="row_attention",
    )(order, met.reshape(-1), page_indices, about, q, k, v, *[kv_pages] * blocks.pages)
    return out[:, :num_rows]
