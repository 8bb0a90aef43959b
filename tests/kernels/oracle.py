"""Attention in float64 numpy, row by row from the groups' lengths; shares no code."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from packscore_kernels import Group, SegmentLayout


def rows(layout: SegmentLayout) -> Iterator[tuple[int, Group, list[int]]]:
    """(row, group, keys): storage index, group and own packed keys of every real token."""
    start = 0
    for group in layout.groups:
        prefix = list(range(start, start + group.prefix_len))
        for row in prefix:
            yield row, group, prefix[: row - start + 1]
        first = start + group.prefix_len
        for length in group.item_lens.tolist():
            for row in range(first, first + length):
                yield row, group, prefix + list(range(first, row + 1))
            first += length
        start = first


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layout: SegmentLayout,
    sm_scale: float,
    kv_pages: jax.Array | None = None,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
) -> np.ndarray:
    """float64[num_q_heads, num_tokens, head_dim]; padding rows are zeros."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    pages = None if kv_pages is None else np.asarray(kv_pages, np.float64)
    group_size = q.shape[0] // k.shape[0]
    out = np.zeros_like(q)
    cache = {}
    for row, group, keys in rows(layout):
        if id(group) not in cache:
            if group.cached_len:
                # [pages, heads, 2, page_size, dim] -> [2, heads, tokens, dim]
                held = pages[group.page_indices].transpose(2, 1, 0, 3, 4)
                held = held.reshape(2, k.shape[0], -1, k.shape[2])[:, :, : group.cached_len]
            else:
                held = np.zeros((2, k.shape[0], 0, k.shape[2]))
            cache[id(group)] = held
        seen_k = np.concatenate([cache[id(group)][0], k[:, keys]], axis=1).repeat(group_size, 0)
        seen_v = np.concatenate([cache[id(group)][1], v[:, keys]], axis=1).repeat(group_size, 0)
        if sliding_window is not None:
            seen_k, seen_v = (x[:, -sliding_window:] for x in (seen_k, seen_v))
        scores = np.einsum("hd,hkd->hk", q[:, row], seen_k) * sm_scale
        if soft_cap is not None:
            scores = np.tanh(scores / soft_cap) * soft_cap
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        out[:, row] = np.einsum("hk,hkd->hd", weights, seen_v)
    return out
