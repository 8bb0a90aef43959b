"""The same attention without Pallas: composed for any device, and dense to check with."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from packscore_kernels.attention.types import SegmentSchedule
from packscore_kernels.attention.uses import HERE, ITEMS, LOAD_FIELDS, USE_FIELDS, Load, Use
from packscore_kernels.hardware import LANES

MASKED = -1e30
State = tuple[jax.Array, jax.Array, jax.Array]


def start_of(queries: jax.Array) -> State:
    """Maximum, sum and output of an online softmax that has seen nothing yet."""
    shape = (*queries.shape[:-1], 1)
    return (
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(queries.shape, jnp.float32),
    )


def scores_of(queries: jax.Array, keys: jax.Array, sm_scale: float) -> jax.Array:
    """Scores [kv heads, group, rows, keys] in float32."""
    s = jnp.einsum(
        "hgqd,hkd->hgqk", queries, keys, precision="highest", preferred_element_type=jnp.float32
    )
    return s * sm_scale


def fold(state: State, s: jax.Array, seen: jax.Array, v: jax.Array) -> State:
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


class _Keys(NamedTuple):
    """Where keys and values come from."""

    # [num_kv_heads, num_tokens, head_dim], with one lane group of room in front for the first
    # window, and one chunk behind for the last chunk
    k: jax.Array
    v: jax.Array
    pages: jax.Array | None  # [num_pages, num_kv_heads, 2, page_size, head_dim]
    page_indices: jax.Array  # i32[max_pages]


def _read_chunk(keys: _Keys, load: Load, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one load, [num_kv_heads, chunk, head_dim]; beyond its end, anything."""
    start = jnp.where(load.paged == 1, 0, load.start) + LANES
    packed = [lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in (keys.k, keys.v)]
    if keys.pages is None:
        return packed[0], packed[1]
    _, num_kv_heads, _, page_size, head_dim = keys.pages.shape
    entry = load.start + jnp.arange(chunk // page_size)
    entry = jnp.minimum(entry, len(keys.page_indices) - 1)
    cached = keys.pages[keys.page_indices[entry]].transpose(2, 1, 0, 3, 4)
    cached = cached.reshape(2, num_kv_heads, chunk, head_dim)
    return (
        jnp.where(load.paged == 1, cached[0], packed[0]),
        jnp.where(load.paged == 1, cached[1], packed[1]),
    )


def _seen_in_chunk(
    use: Use,
    row: jax.Array,  # i32[rows, 1]: storage indices of a q tile
    window: jax.Array,  # i32[rows, 1]: first key of the row's local window
    far: jax.Array,  # i32[rows, 1]: first own key of rows that reach further back than it
    chunk: int,
) -> jax.Array:
    """Which keys of a chunk the rows of a q tile see, bool[rows, chunk]."""
    key = jnp.arange(chunk)
    causal = jnp.minimum(jnp.maximum(window, row[0]) - use.base, use.last_key)
    end = jnp.where(row < use.first_item_row, causal, use.last_key)
    prefix = (key >= use.first_key) & (key < end)
    prefix &= (row >= use.first_row) & (row < use.last_row)
    own = (key >= far - use.base) & (key < window - use.base)
    return jnp.where(use.kind == ITEMS, own, prefix)


def _attend_tile(
    t: jax.Array, grouped: jax.Array, keys: _Keys, schedule: SegmentSchedule, sm_scale: float
) -> jax.Array:
    """Rows of q tile t, float32[num_kv_heads, group_size, block_q, head_dim]."""
    bq, chunk = schedule.block_sizes.block_q, schedule.block_sizes.chunk_kv
    uses = jnp.reshape(schedule.uses, (-1, USE_FIELDS))
    loads = jnp.reshape(schedule.loads, (-1, LOAD_FIELDS))
    first_row = t * bq
    queries = lax.dynamic_slice_in_dim(grouped, first_row, bq, axis=2)
    own, far = lax.dynamic_slice_in_dim(jnp.asarray(schedule.rows), first_row, bq, axis=1)
    own, far = own[:, None], far[:, None]
    row = (first_row + jnp.arange(bq))[:, None]
    window = row // LANES * LANES - LANES

    key = first_row - LANES + jnp.arange(bq + LANES)
    k, v = (lax.dynamic_slice_in_dim(x, first_row, bq + LANES, axis=1) for x in (keys.k, keys.v))
    seen = (key >= jnp.maximum(own, window)) & (key <= row)
    state = fold(start_of(queries), scores_of(queries, k, sm_scale), seen, v)

    def one(i: jax.Array, state: State) -> State:
        use = Use(*uses[i])
        load, here = Load(*loads[use.load]), use.kind == HERE
        start, paged = jnp.where(here, use.base, load.start), jnp.where(here, 0, load.paged)
        k, v = _read_chunk(keys, load._replace(start=start, paged=paged), chunk)
        seen = _seen_in_chunk(use, row, window, far, chunk)
        return fold(state, scores_of(queries, k, sm_scale), seen, v)

    starts = jnp.asarray(schedule.use_starts)
    _, total, acc = lax.fori_loop(starts[t], starts[t + 1], one, state)
    return jnp.where(row < schedule.counts[0], acc / total, 0.0)


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
    num_q_heads, num_tokens, head_dim = q.shape
    num_kv_heads = k.shape[0]
    num_rows = schedule.num_q_tiles * schedule.block_sizes.block_q
    tail = max(num_rows - num_tokens, 0)
    grouped = jnp.pad(q, ((0, 0), (0, tail), (0, 0))).reshape(
        num_kv_heads, num_q_heads // num_kv_heads, -1, head_dim
    )
    room = ((0, 0), (LANES, tail + schedule.block_sizes.chunk_kv), (0, 0))
    page_indices = jnp.asarray(schedule.page_indices)
    keys = _Keys(jnp.pad(k, room), jnp.pad(v, room), kv_pages, page_indices)

    def tile(t: jax.Array) -> jax.Array:
        return _attend_tile(t, grouped, keys, schedule, sm_scale).astype(q.dtype)

    tiles = lax.map(tile, jnp.arange(schedule.num_q_tiles))
    # [tiles, kv heads, group, block_q, head_dim] -> [q heads, tokens, head_dim]
    out: jax.Array = jnp.moveaxis(tiles, 0, 2).reshape(num_q_heads, num_rows, head_dim)
    return out[:, : schedule.num_tokens]


def dense_mask(
    schedule: SegmentSchedule, sliding_window: int | jax.Array | None = None
) -> jax.Array:
    """Who sees whom, rebuilt from the schedule's per-token and per-group numbers.

    Args:
      schedule: of which only the tokens' and groups' numbers are read.
      sliding_window: how many tokens back a row sees in its own sequence, itself included: by
        positions, for in storage an item lies behind all items before it.

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
    row = index[:, None]
    in_item = row >= prefix_end
    position = cached_len + jnp.where(in_item, prefix_end - start + row - own, row - start)
    if sliding_window is not None:
        packed &= position - sliding_window < position.T
    if schedule.page_size:
        entry = jnp.arange(len(schedule.page_indices) * schedule.page_size)
        at = entry - first_page * schedule.page_size
        cached = (at >= 0) & (at < cached_len)
        if sliding_window is not None:
            cached &= at > position - sliding_window
        packed = jnp.concatenate([cached, packed], axis=1)
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
    soft_cap: float | None = None,
    sliding_window: int | jax.Array | None = None,
    rows: jax.Array | None = None,  # i32[num_rows]
) -> jax.Array:
    """Attention with the mask of `dense_mask` in memory: slow, large, plain.

    Args:
      q: queries of the packed tokens.
      k: keys of the packed tokens.
      v: values of the packed tokens.
      kv_pages: keys (0) and values (1) of the cached prefix tokens.
      schedule: the work list, of which only the tokens' and groups' numbers are read.
      sm_scale: factor on the scores before the softmax.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`; None leaves them.
      sliding_window: see `dense_mask`; it may be data, another one in each layer.
      rows: the tokens whose queries these are; None: all.

    Returns:
      [num_q_heads, num_tokens, head_dim] in the dtype of q.
    """
    num_q_heads, num_rows, head_dim = q.shape
    num_kv_heads = k.shape[0]
    if kv_pages is not None:
        pool = kv_pages[jnp.asarray(schedule.page_indices)].transpose(2, 1, 0, 3, 4)
        pool = pool.reshape(2, num_kv_heads, -1, head_dim)
        k, v = jnp.concatenate([pool[0], k], axis=1), jnp.concatenate([pool[1], v], axis=1)
    mask = dense_mask(schedule, sliding_window)
    real = jnp.asarray(schedule.group_ids)[:, None] >= 0
    if rows is not None:
        mask, real = mask[rows], real[rows]
    grouped = q.reshape(num_kv_heads, -1, num_rows, head_dim)
    scores = scores_of(grouped, k, sm_scale)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    _, total, acc = fold(start_of(grouped), scores, mask, v)
    out = jnp.where(real, acc / jnp.where(real, total, 1.0), 0.0)
    return out.reshape(num_q_heads, num_rows, head_dim).astype(q.dtype)
