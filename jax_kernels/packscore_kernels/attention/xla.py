"""The same attention without Pallas: composed for any device, and dense to check with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from packscore_kernels.attention.schedule import LOAD_FIELDS, USE_FIELDS, Load, Use
from packscore_kernels.attention.types import SegmentSchedule
from packscore_kernels.hardware import LANES

MASKED = -1e30
State = tuple[jax.Array, jax.Array, jax.Array]


def _fold(state: State, s: jax.Array, seen: jax.Array, v: jax.Array) -> State:
    """One step of the online softmax; s [kv heads, group, rows, keys], v [kv heads, keys, dim]."""
    m, total, acc = state
    s = jnp.where(seen, s, MASKED)
    new_m = jnp.maximum(m, s.max(axis=-1, keepdims=True))
    p = jnp.where(seen, jnp.exp(s - new_m), 0.0)
    keep = jnp.exp(m - new_m)
    # NaN in a value that a row may not see must not reach it as NaN times zero.
    bad = ~jnp.isfinite(v)
    out = jnp.einsum(
        "hgqk,hkd->hgqd",
        p.astype(v.dtype),
        jnp.where(bad, 0, v),
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    poison = jnp.einsum("qk,hkd->hqd", seen.astype(jnp.float32), bad.astype(jnp.float32))
    out = jnp.where(poison[:, None] > 0, jnp.nan, out)
    return new_m, total * keep + p.sum(axis=-1, keepdims=True), acc * keep + out


def segment_attention_xla(
    q: jax.Array,  # [num_q_heads, num_tokens, head_dim]
    k: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    v: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    kv_pages: jax.Array | None,  # [num_pages, num_kv_heads, 2, page_size, head_dim]
    schedule: SegmentSchedule,
    *,
    sm_scale: float,
) -> jax.Array:
    """The kernel's work list walked by XLA: memory of tokens x chunk, on any device.

    Args:
      q: queries of the packed tokens; their number is a multiple of `block_kv`.
      k: keys of the packed tokens.
      v: values of the packed tokens.
      kv_pages: keys (0) and values (1) of the cached prefix tokens.
      schedule: the work list.
      sm_scale: factor on the scores before the softmax.

    Returns:
      [num_q_heads, num_tokens, head_dim] in the dtype of q.
    """
    blocks, page = schedule.block_sizes, schedule.page_size
    num_q_heads, num_tokens, head_dim = q.shape
    num_kv_heads = k.shape[0]
    bq, chunk = blocks.block_q, blocks.chunk_kv
    num_tiles = schedule.num_q_tiles
    tail = max(num_tiles * bq - num_tokens, 0)
    grouped = jnp.pad(q, ((0, 0), (0, tail), (0, 0))).reshape(
        num_kv_heads, num_q_heads // num_kv_heads, -1, head_dim
    )
    # One lane group of room in front for the first window, one chunk behind for the last chunk.
    room = ((0, 0), (LANES, tail + chunk), (0, 0))
    k, v = jnp.pad(k, room), jnp.pad(v, room)
    uses = jnp.reshape(schedule.uses, (-1, USE_FIELDS))
    loads = jnp.reshape(schedule.loads, (-1, LOAD_FIELDS))
    page_indices = jnp.asarray(schedule.page_indices)
    rows = jnp.asarray(schedule.rows)
    starts = jnp.asarray(schedule.use_starts)

    def scores(queries: jax.Array, keys: jax.Array) -> jax.Array:
        s = jnp.einsum(
            "hgqd,hkd->hgqk",
            queries,
            keys,
            precision="highest",
            preferred_element_type=jnp.float32,
        )
        return s * sm_scale

    def read(load: Load) -> tuple[jax.Array, jax.Array]:
        start = jnp.where(load.paged == 1, 0, load.start) + LANES
        packed = [lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in (k, v)]
        if kv_pages is None:
            return packed[0], packed[1]
        entry = jnp.minimum(load.start + jnp.arange(chunk // page), len(page_indices) - 1)
        cached = kv_pages[page_indices[entry]].transpose(2, 1, 0, 3, 4)
        cached = cached.reshape(2, num_kv_heads, chunk, head_dim)
        return (
            jnp.where(load.paged == 1, cached[0], packed[0]),
            jnp.where(load.paged == 1, cached[1], packed[1]),
        )

    def tile(t: jax.Array) -> jax.Array:
        first_row = t * bq
        queries = lax.dynamic_slice_in_dim(grouped, first_row, bq, axis=2)
        own, far = lax.dynamic_slice_in_dim(rows, first_row, bq, axis=1)
        row = (first_row + jnp.arange(bq))[:, None]
        window = row // LANES * LANES - LANES
        own, far = own[:, None], far[:, None]

        key = first_row - LANES + jnp.arange(bq + LANES)
        keys = lax.dynamic_slice_in_dim(k, first_row, bq + LANES, axis=1)
        values = lax.dynamic_slice_in_dim(v, first_row, bq + LANES, axis=1)
        shape = (*queries.shape[:3], 1)
        state = (
            jnp.full(shape, MASKED, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros(queries.shape, jnp.float32),
        )
        seen = (key >= jnp.maximum(own, window)) & (key <= row)
        state = _fold(state, scores(queries, keys), seen, values)

        def one(i: jax.Array, state: State) -> State:
            use = Use(*uses[i])
            keys, values = read(Load(*loads[use.load]))
            key = jnp.arange(chunk)
            causal = jnp.minimum(jnp.maximum(window, first_row) - use.base, use.last_key)
            end = jnp.where(row < use.first_item_row, causal, use.last_key)
            prefix = (key >= use.first_key) & (key < end)
            prefix &= (row >= use.first_row) & (row < use.last_row)
            own_far = (key >= far - use.base) & (key < window - use.base)
            seen = jnp.where(use.own == 1, own_far, prefix)
            return _fold(state, scores(queries, keys), seen, values)

        _, total, acc = lax.fori_loop(starts[t], starts[t + 1], one, state)
        return jnp.where(row < schedule.counts[0], acc / total, 0.0).astype(q.dtype)

    tiles = lax.map(tile, jnp.arange(num_tiles))  # [tiles, kv heads, group, block_q, head_dim]
    out: jax.Array = jnp.moveaxis(tiles, 0, 2).reshape(num_q_heads, num_tiles * bq, head_dim)
    return out[:, : schedule.num_tokens]


def dense_mask(schedule: SegmentSchedule) -> jax.Array:
    """Who sees whom, rebuilt from the schedule's per-token and per-group numbers.

    Returns:
      bool[num_tokens, max_pages * page_size + num_tokens]: the entries of `page_indices` come
      before the packed tokens.
    """
    group_ids = jnp.asarray(schedule.group_ids)
    num_tokens = schedule.num_tokens
    groups = jnp.asarray(schedule.groups)
    real: jax.Array = (group_ids >= 0)[:, None]
    if not groups.shape[0]:
        groups = jnp.zeros((1, 4), jnp.int32)
    start, prefix_end, cached_len, first_page = (x[:, None] for x in groups[group_ids].T)
    index = jnp.arange(num_tokens)
    own = jnp.asarray(schedule.rows)[0, :num_tokens, None]
    packed: jax.Array = ((index >= own) & (index <= index[:, None])) | (
        (index >= start) & (index < prefix_end) & (index <= index[:, None])
    )
    if schedule.page_size:
        entry = jnp.arange(len(schedule.page_indices) * schedule.page_size)
        at = entry - first_page * schedule.page_size
        packed = jnp.concatenate([(at >= 0) & (at < cached_len), packed], axis=1)
    mask: jax.Array = packed & real
    return mask


def segment_attention_dense(
    q: jax.Array,  # [num_q_heads, num_tokens, head_dim]
    k: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    v: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    kv_pages: jax.Array | None,  # [num_pages, num_kv_heads, 2, page_size, head_dim]
    schedule: SegmentSchedule,
    *,
    sm_scale: float,
) -> jax.Array:
    """Attention with the mask of `dense_mask` in memory: slow, large, plain.

    Args:
      q: queries of the packed tokens.
      k: keys of the packed tokens.
      v: values of the packed tokens.
      kv_pages: keys (0) and values (1) of the cached prefix tokens.
      schedule: the work list, of which only the tokens' and groups' numbers are read.
      sm_scale: factor on the scores before the softmax.

    Returns:
      [num_q_heads, num_tokens, head_dim] in the dtype of q.
    """
    num_q_heads, num_tokens, head_dim = q.shape
    num_kv_heads = k.shape[0]
    if kv_pages is not None:
        pool = kv_pages[jnp.asarray(schedule.page_indices)].transpose(2, 1, 0, 3, 4)
        pool = pool.reshape(2, num_kv_heads, -1, head_dim)
        k, v = jnp.concatenate([pool[0], k], axis=1), jnp.concatenate([pool[1], v], axis=1)
    mask = dense_mask(schedule)
    grouped = q.reshape(num_kv_heads, -1, num_tokens, head_dim)
    s = jnp.einsum(
        "hgqd,hkd->hgqk", grouped, k, precision="highest", preferred_element_type=jnp.float32
    )
    shape = (*grouped.shape[:3], 1)
    state = (
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(grouped.shape, jnp.float32),
    )
    _, total, acc = _fold(state, s * sm_scale, mask, v)
    real = jnp.asarray(schedule.group_ids)[:, None] >= 0
    out = jnp.where(real, acc / jnp.where(real, total, 1.0), 0.0)
    return out.reshape(num_q_heads, num_tokens, head_dim).astype(q.dtype)
