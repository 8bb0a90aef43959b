"""Segment attention in torch: causal and rectangular parts, no mask, no tokens x tokens buffer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from packscore.errors import InputError
from packscore_kernels.segment_paged_attention.layout import SegmentLayout

# Scores of one tile of rows in the math path, which serves devices without a fused kernel.
MATH_TILE_BYTES = 64 * 2**20
# Short segments are batched with others up to this share longer, so that few calls serve many;
# one of this many tokens is worth a call of its own, which needs no copies.
MAX_LENGTH_WASTE = 1 / 4
OWN_CALL_TOKENS = 64
FUSED_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """Segments of similar length that attend causally to themselves, as one batch.

    Shorter segments repeat their own last token up to `length`: causal attention keeps the copies
    out of every real row, and no other segment's keys can leak in.
    """

    length: int
    start: int | None  # storage index of the first token, where the batch is one contiguous run
    rows: torch.Tensor  # i64[num_segments, length]: storage index of every token, copies included
    is_real: torch.Tensor | None  # bool[num_segments, length], None where no token is a copy

    def on(self, device: torch.device) -> SequenceBatch:
        """The same batch with its index tensors on `device`."""
        is_real = None if self.is_real is None else self.is_real.to(device)
        return replace(self, rows=self.rows.to(device), is_real=is_real)


@dataclass(frozen=True, eq=False)
class SegmentPlan:
    """What one packed batch asks of every attention layer, computed once and shared by all layers.

    `visible = (kv_segment == q_segment) | (kv_segment == PREFIX_SEGMENT)`, and-ed with storage
    order `kv_index <= q_index`, is two things: every segment is causal in itself, and the items of
    a group see all of its prefix.
    """

    num_tokens: int
    num_real_tokens: int
    device: torch.device
    sequences: tuple[SequenceBatch, ...]
    # (prefix start or None where it is in the cache, items start, items end), storage indices
    prefixes: tuple[tuple[int | None, int, int], ...]
    _elsewhere: dict[torch.device, SegmentPlan] = field(default_factory=dict, repr=False)

    @classmethod
    def build(cls, layout: SegmentLayout) -> SegmentPlan:
        """Plan the attention of `layout` for tensors on the CPU."""
        prefixes, starts, lens = [], [], []
        for group, start in zip(layout.groups, layout.group_starts.tolist(), strict=False):
            if group.cached_len and (group.prefix_len or len(layout.groups) > 1):
                raise InputError(
                    f"cached_len={group.cached_len}: torch attention takes a prefix whole, from "
                    "the packed tokens or from one cache"
                )
            items_start, end = start + group.prefix_len, start + group.num_tokens
            if items_start < end and (group.prefix_len or group.cached_len):
                prefixes.append((None if group.cached_len else start, items_start, end))
            starts.append(start)
            lens.append(group.prefix_len)
        item_starts, item_ends = layout.item_bounds.T
        all_starts = np.concatenate([starts, item_starts]).astype(np.int64)
        all_lens = np.concatenate([lens, item_ends - item_starts]).astype(np.int64)
        return cls(
            layout.num_tokens,
            layout.num_real_tokens,
            torch.device("cpu"),
            tuple(_batch_by_length(all_starts, all_lens)),
            tuple(prefixes),
        )

    def on(self, device: torch.device) -> SegmentPlan:
        """The same plan with its index tensors on `device`, made once for each device."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            moved = tuple(batch.on(device) for batch in self.sequences)
            self._elsewhere[device] = replace(self, device=device, sequences=moved)
        return self._elsewhere[device]


@dataclass(eq=False)
class PrefixCache:
    """Keys and values of one prefix, kept layer by layer between the batches of a request."""

    prefix_len: int
    layers: dict[int, KeysValues] = field(default_factory=dict)

    def keep(self, layer_idx: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keep the prefix of a layer's k and v, [1, num_kv_heads, num_tokens, head_dim]."""
        self.layers[layer_idx] = (
            k[:, :, : self.prefix_len].contiguous(),
            v[:, :, : self.prefix_len].contiguous(),
        )


def _batch_by_length(
    starts: np.ndarray,  # i64[num_segments]
    lens: np.ndarray,  # i64[num_segments]
) -> Iterator[SequenceBatch]:
    order = np.argsort(lens, kind="stable")
    order = order[lens[order] > 0]
    while len(order):
        shortest = lens[order[0]]
        longest = shortest
        if shortest < OWN_CALL_TOKENS:
            longest = min(math.floor(shortest * (1 + MAX_LENGTH_WASTE)), OWN_CALL_TOKENS - 1)
        count = int(np.searchsorted(lens[order], longest, side="right"))
        batch, order = np.sort(order[:count]), order[count:]
        length = int(lens[batch].max())
        offsets = np.arange(length)
        rows = starts[batch, None] + np.minimum(offsets, lens[batch, None] - 1)
        is_real = offsets < lens[batch, None]
        all_real = bool(is_real.all())
        contiguous = all_real and bool((np.diff(starts[batch]) == length).all())
        yield SequenceBatch(
            length,
            int(starts[batch[0]]) if contiguous else None,
            torch.from_numpy(rows),
            None if all_real else torch.from_numpy(is_real),
        )


def segment_attention(
    q: torch.Tensor,  # [1, num_q_heads, num_tokens, head_dim]
    k: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    v: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    plan: SegmentPlan,
    *,
    sm_scale: float,
    cached: KeysValues | None = None,
) -> torch.Tensor:
    """Attention of packed tokens, each item to the prefix and to itself only.

    Memory beside the output is O(num_tokens); nothing of size num_tokens x num_tokens exists.

    Args:
      q: queries of the packed tokens.
      k: keys; `num_q_heads` is a multiple of `num_kv_heads`.
      v: values.
      plan: `SegmentPlan.build(layout)`, on any device.
      sm_scale: factor on the scores before the softmax.
      cached: keys and values of a prefix that is not among the packed tokens,
        [1, num_kv_heads, cached_len, head_dim] each.

    Returns:
      [1, num_tokens, num_q_heads, head_dim] in q's dtype; padding rows are zeros.

    Source: partial softmaxes merged by their log-sum-exp, as in FlashAttention-2 (Dao, 2023).
    """
    plan = plan.on(q.device)
    out = q.new_empty(plan.num_tokens, q.shape[1], q.shape[3])
    lse = q.new_empty(plan.num_tokens, q.shape[1], dtype=torch.float32)
    out[plan.num_real_tokens :] = 0
    for batch in plan.sequences:
        _attend_within(q[0], k[0], v[0], batch, sm_scale, out, lse)
    for prefix_start, items_start, items_end in plan.prefixes:
        items = slice(items_start, items_end)
        if prefix_start is not None:
            prefix_k, prefix_v = (x[:, :, prefix_start:items_start] for x in (k, v))
        elif cached is not None:
            prefix_k, prefix_v = cached
        else:
            raise InputError("cached=None, and the plan's prefix is not among the packed tokens")
        prefix_out, prefix_lse = attend(
            q[:, :, items], prefix_k, prefix_v, is_causal=False, sm_scale=sm_scale
        )
        # exp(prefix_lse) / (exp(prefix_lse) + exp(lse)), which cannot overflow
        prefix_share = torch.sigmoid(prefix_lse[0].T - lse[items])[..., None]
        out[items] = out[items].float().lerp_(prefix_out[0].transpose(0, 1).float(), prefix_share)
    return out[None]


def _attend_within(
    q: torch.Tensor,  # [num_q_heads, num_tokens, head_dim]
    k: torch.Tensor,  # [num_kv_heads, num_tokens, head_dim]
    v: torch.Tensor,  # [num_kv_heads, num_tokens, head_dim]
    batch: SequenceBatch,
    sm_scale: float,
    out: torch.Tensor,  # [num_tokens, num_q_heads, head_dim], written at the batch's rows
    lse: torch.Tensor,  # [num_tokens, num_q_heads], likewise
) -> None:
    num_segments, length = batch.rows.shape

    def select(x: torch.Tensor) -> torch.Tensor:
        if batch.start is None:
            picked = x[:, batch.rows]
        else:
            run = x[:, batch.start : batch.start + num_segments * length]
            picked = run.view(len(x), num_segments, length, -1)
        return picked.transpose(0, 1)

    seq_out, seq_lse = attend(select(q), select(k), select(v), is_causal=True, sm_scale=sm_scale)
    seq_out, seq_lse = seq_out.transpose(1, 2), seq_lse.transpose(1, 2)
    if batch.start is not None:
        run = slice(batch.start, batch.start + num_segments * length)
        out[run], lse[run] = seq_out.flatten(0, 1), seq_lse.flatten(0, 1)
        return
    rows = batch.rows
    if batch.is_real is not None:
        rows, seq_out, seq_lse = (x[batch.is_real] for x in (rows, seq_out, seq_lse))
    out[rows], lse[rows] = seq_out, seq_lse


def attend(
    q: torch.Tensor,  # [batch, num_q_heads, num_q, head_dim]
    k: torch.Tensor,  # [batch, num_kv_heads, num_kv, head_dim]
    v: torch.Tensor,  # [batch, num_kv_heads, num_kv, head_dim]
    *,
    is_causal: bool,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp: torch's fused CPU kernel where it serves, else tiled math.

    Returns:
      ([batch, num_q_heads, num_q, head_dim] in q's dtype, float32[batch, num_q_heads, num_q]).
    """
    if q.device.type == "cpu" and q.dtype in FUSED_CPU_DTYPES:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = fused(q, k, v, is_causal=is_causal, scale=sm_scale)
        return out, lse
    return attend_math(q, k, v, is_causal=is_causal, sm_scale=sm_scale)


def attend_math(
    q: torch.Tensor,  # [batch, num_q_heads, num_q, head_dim]
    k: torch.Tensor,  # [batch, num_kv_heads, num_kv, head_dim]
    v: torch.Tensor,  # [batch, num_kv_heads, num_kv, head_dim]
    *,
    is_causal: bool,
    sm_scale: float,
    tile_bytes: int = MATH_TILE_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` in plain torch operations, for any device: float32 softmax over tiles of rows."""
    num_sequences, num_q_heads, num_q, _ = q.shape
    num_kv_heads, num_kv = k.shape[1:3]
    grouped = q.view(num_sequences, num_kv_heads, num_q_heads // num_kv_heads, num_q, -1)
    keys, values = k[:, :, None].transpose(-1, -2), v[:, :, None]
    tile = max(1, tile_bytes // (4 * num_sequences * num_q_heads * num_kv))
    outs, lses = [], []
    for start in range(0, num_q, tile):
        scores = (grouped[..., start : start + tile, :] @ keys).float() * sm_scale
        if is_causal:
            row = torch.arange(start, start + scores.shape[-2], device=q.device)[:, None]
            hidden = torch.arange(num_kv, device=q.device) > row
            scores.masked_fill_(hidden, -torch.inf)
        lses.append(scores.logsumexp(-1))
        outs.append((scores - lses[-1][..., None]).exp_().to(v.dtype) @ values)
    return torch.cat(outs, -2).flatten(1, 2), torch.cat(lses, -1).flatten(1, 2)
