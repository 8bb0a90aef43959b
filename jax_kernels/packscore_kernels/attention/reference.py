"""The specification: segment attention in plain float32 jnp, one matrix of scores, no tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from packscore_kernels.attention.layout import PAD_SEGMENT, PREFIX_SEGMENT, SegmentLayout


def visible(layout: SegmentLayout) -> jax.Array:
    """Which packed token sees which.

    `visible = (kv_segment == q_segment) | (kv_segment == PREFIX_SEGMENT)` inside one group, and-ed
    with storage order `kv_index <= q_index`; padding sees nothing and is seen by nobody.

    Args:
      layout: the packed tokens' groups.

    Returns:
      bool[num_tokens, num_tokens]: rows are queries, columns are keys.
    """
    segment = jnp.asarray(layout.segment_ids)
    group = jnp.asarray(layout.group_ids)
    index = jnp.arange(layout.num_tokens)
    same = (segment[None, :] == segment[:, None]) | (segment[None, :] == PREFIX_SEGMENT)
    same &= (group[None, :] == group[:, None]) & (group[:, None] != PAD_SEGMENT)
    return same & (index[None, :] <= index[:, None])


def cached_tokens(layout: SegmentLayout, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the cached prefixes lie in the pool, group by group, and whose they are.

    Returns:
      (i32[num_cached], i32[num_cached]): token index `page * page_size + offset`, and group.
    """
    places, owners = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for g, group in enumerate(layout.groups):
        index = np.arange(group.cached_len)
        if group.cached_len:
            page = np.asarray(group.page_indices)[index // page_size]
            places.append((page * page_size + index % page_size).astype(np.int32))
            owners.append(np.full(group.cached_len, g, np.int32))
    return np.concatenate(places), np.concatenate(owners)


def segment_attention_reference(
    q: jax.Array,  # [num_q_heads, num_tokens, head_dim]
    k: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    v: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    layout: SegmentLayout,
    *,
    sm_scale: float,
    kv_pages: jax.Array | None = None,  # [num_pages, num_kv_heads, 2, page_size, head_dim]
    soft_cap: float | None = None,
    sliding_window: int | jax.Array | None = None,
) -> jax.Array:
    """Attention of the packed tokens to their groups' pages and among themselves, in float32.

    Keys that a row may not see never touch it, not even as NaN times zero; padding rows are zeros.

    Args:
      q: queries of the packed tokens.
      k: keys of the packed tokens; `num_q_heads` is a multiple of `num_kv_heads`.
      v: values of the packed tokens.
      layout: who sees whom.
      sm_scale: factor on the scores before the softmax.
      kv_pages: keys (0) and values (1) of the cached prefix tokens.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`; None leaves them.
      sliding_window: how many tokens back a row sees by position, itself included; None: all.

    Returns:
      float32[num_q_heads, num_tokens, head_dim].
    """
    mask = visible(layout)
    positions = layout.position_ids
    if kv_pages is not None:
        num_heads, page_size, head_dim = kv_pages.shape[1], kv_pages.shape[3], kv_pages.shape[4]
        places, owners = cached_tokens(layout, page_size)
        pool = kv_pages.transpose(2, 1, 0, 3, 4).reshape(2, num_heads, -1, head_dim)[:, :, places]
        k = jnp.concatenate([pool[0], k], axis=1)
        v = jnp.concatenate([pool[1], v], axis=1)
        cached = jnp.asarray(layout.group_ids)[:, None] == jnp.asarray(owners)[None, :]
        mask = jnp.concatenate([cached, mask], axis=1)
        before = [np.arange(group.cached_len) for group in layout.groups]
        positions = np.concatenate([*before, positions])
    if sliding_window is not None:
        mask &= positions[None, :] > layout.position_ids[:, None] - sliding_window
    seen = mask.any(axis=1)[None, :, None]
    group_size = q.shape[0] // k.shape[0]
    k = jnp.repeat(k.astype(jnp.float32), group_size, axis=0)
    v = jnp.repeat(v.astype(jnp.float32), group_size, axis=0)
    scores = jnp.einsum("hqd,hkd->hqk", q.astype(jnp.float32), k, precision="highest") * sm_scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(mask, scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.where(seen, scores.max(axis=-1, keepdims=True), 0.0))
    weights /= jnp.where(seen, weights.sum(axis=-1, keepdims=True), 1.0)
    # A value nobody may see is left out of the product, so that its NaN is too.
    weights = jnp.where(seen, weights, 0.0)
    seen_value = jnp.where(jnp.isnan(v), 0.0, v)
    out = jnp.einsum("hqk,hkd->hqd", weights, seen_value, precision="highest")
    poisoned = jnp.einsum("qk,hkd->hqd", mask.astype(jnp.float32), jnp.isnan(v).astype(jnp.float32))
    return jnp.where(poisoned > 0, jnp.nan, out)
