"""The specification: segment attention in plain float32 jnp, one matrix of scores, no tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from packscore_kernels.segment_paged_attention.types import (
    PAD_SEGMENT,
    PREFIX_SEGMENT,
    SegmentLayout,
)


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


def segment_attention_reference(
    q: jax.Array,  # [num_q_heads, num_tokens, head_dim]
    k: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    v: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    layout: SegmentLayout,
    *,
    sm_scale: float,
) -> jax.Array:
    """Attention of the packed tokens among themselves, in float32.

    Keys that a row may not see never touch it, not even as NaN times zero; padding rows are zeros.

    Args:
      q: queries of the packed tokens.
      k: keys of the packed tokens; `num_q_heads` is a multiple of `num_kv_heads`.
      v: values of the packed tokens.
      layout: who sees whom.
      sm_scale: factor on the scores before the softmax.

    Returns:
      float32[num_q_heads, num_tokens, head_dim].
    """
    mask = visible(layout)
    seen = mask.any(axis=1)[None, :, None]
    group_size = q.shape[0] // k.shape[0]
    k = jnp.repeat(k.astype(jnp.float32), group_size, axis=0)
    v = jnp.repeat(v.astype(jnp.float32), group_size, axis=0)
    scores = jnp.einsum("hqd,hkd->hqk", q.astype(jnp.float32), k, precision="highest") * sm_scale
    scores = jnp.where(mask, scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.where(seen, scores.max(axis=-1, keepdims=True), 0.0))
    weights /= jnp.where(seen, weights.sum(axis=-1, keepdims=True), 1.0)
    # A value nobody may see is left out of the product, so that its NaN is too.
    seen_value = jnp.where(jnp.isnan(v), 0.0, v)
    out = jnp.einsum("hqk,hkd->hqd", weights, seen_value, precision="highest")
    poisoned = jnp.einsum("qk,hkd->hqd", mask.astype(jnp.float32), jnp.isnan(v).astype(jnp.float32))
    return jnp.where(poisoned > 0, jnp.nan, out)
