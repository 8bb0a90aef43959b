"""The same in XLA, on any device: block by block of what rows see, with an online softmax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from packscore_kernels.attention.pieces import within
from packscore_kernels.attention.types import SegmentSchedule
from packscore_kernels.attention.xla import State, fold, scores_of, start_of
from packscore_kernels.row_attention.blocks import Blocks, Seen, listed


def attend_rows_xla(
    q: jax.Array,  # [num_q_heads, num_rows, head_dim]
    k: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    v: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    kv_pages: jax.Array | None,  # [num_pages, num_kv_heads, 2, page_size, head_dim]
    schedule: SegmentSchedule,
    seen: Seen,
    sm_scale: float,
) -> jax.Array:
    """See `segment_attention_rows`."""
    num_kv_heads, num_tokens, head_dim = k.shape
    queries = q.reshape(num_kv_heads, -1, *q.shape[1:])
    blocks = Blocks.of(schedule, kv_pages is not None)
    spans = Seen(*(x[:, None] for x in seen))
    page_indices = jnp.asarray(schedule.page_indices)

    def packed(block: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        first = block * blocks.keys
        start = jnp.minimum(first, num_tokens - blocks.keys)  # the last one begins earlier
        keys, values = (lax.dynamic_slice_in_dim(x, start, blocks.keys, 1) for x in (k, v))
        at = start + jnp.arange(blocks.keys)
        own = within(at, spans.own, spans.num_own)
        return keys, values, (own | within(at, spans.prefix, spans.num_prefix)) & (at >= first)

    def cached(block: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        assert kv_pages is not None
        entries = block * blocks.pages + jnp.arange(blocks.pages)
        pages = kv_pages[page_indices[jnp.minimum(entries, len(page_indices) - 1)]]
        keys, values = pages.transpose(2, 1, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)
        at = block * blocks.keys + jnp.arange(blocks.keys)
        return keys, values, within(at, spans.cached, spans.num_cached)

    needed, state = blocks.met(seen) > 0, start_of(queries)
    parts = [(needed[: blocks.num_cached], cached), (needed[blocks.num_cached :], packed)]
    for own, keys_of in parts[0 if blocks.num_cached else 1 :]:
        order, count = listed(own)

        def one(i: jax.Array, state: State, order: Any = order, keys_of: Any = keys_of) -> State:
            keys, values, visible = keys_of(order[i])
            return fold(state, scores_of(queries, keys, sm_scale), visible, values)

        state = lax.fori_loop(0, count, one, state)
    _, total, acc = state
    is_real = spans.num_own > 0
    out = jnp.where(is_real, acc / jnp.where(is_real, total, 1.0), 0.0)
    return out.reshape(q.shape).astype(q.dtype)
