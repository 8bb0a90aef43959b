"""Segment attention in torch: causal and rectangular parts, no mask, no tokens x tokens buffer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from packscore.errors import InputError
from packscore.flows.page_pool import PAGE_SIZE
from packscore.interfaces import fused_attention
from packscore.torch_engine.pages import KvPages, PageWrite, Run, slot_runs
from packscore_kernels.attention.layout import SegmentLayout

# Scores of one tile of rows in the math path, which serves devices without a fused kernel.
MATH_TILE_BYTES = 64 * 2**20
# Short segments are batched with others up to this share longer, so that few calls serve many;
# one of this many tokens is worth a call of its own, which needs no copies.
MAX_LENGTH_WASTE = 1 / 4
OWN_CALL_TOKENS = 64
FUSED_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """Of [num_heads, num_tokens, head_dim], [num_segments, num_heads, length, head_dim]."""
        if self.start is None:
            return x[:, self.rows].transpose(0, 1)
        run = x[:, self.start : self.start + self.rows.numel()]
        return run.view(len(x), *self.rows.shape, -1).transpose(0, 1)


@dataclass(frozen=True)
class PrefixPart:
    """Rows that all see the same keys: those of packed tokens, or of slots in pages."""

    rows: tuple[int, int]  # storage indices
    packed: tuple[int, int] | None
    slots: tuple[Run, ...] = ()


@dataclass(frozen=True, eq=False)
class SegmentPlan:
    """What one packed batch asks of every attention layer, computed once and shared by all layers.

    `visible = (kv_segment == q_segment) | (kv_segment == PREFIX_SEGMENT)`, and-ed with storage
    order `kv_index <= q_index`, is three things: every segment is causal in itself, the items of
    a group see all of its packed prefix, and both see what of the prefix lies in pages.
    """

    num_tokens: int
    num_real_tokens: int
    device: torch.device
    sequences: tuple[SequenceBatch, ...]
    parts: tuple[PrefixPart, ...]
    writes: tuple[PageWrite, ...] = ()
    _elsewhere: dict[torch.device, SegmentPlan] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls, layout: SegmentLayout, writes: Sequence[PageWrite] = (), page_size: int = PAGE_SIZE
    ) -> SegmentPlan:
        """Plan the attention of `layout` for tensors on the CPU.

        Args:
          layout: who sees whom; cached tokens lie in the pages that its groups name.
          writes: prefix tokens among the packed ones that go into pages.
          page_size: tokens a page.
        """
        parts: list[PrefixPart] = []
        starts, lens = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for group, start in zip(layout.groups, layout.group_starts.tolist(), strict=False):
            items_start, end = start + group.prefix_len, start + group.num_tokens
            own, item_lens = [group.prefix_len], group.item_lens
            if int((item_lens > 0).sum()) == 1:  # it continues the prefix: one causal sequence
                own, item_lens = [group.num_tokens], item_lens[:0]
            elif group.prefix_len and items_start < end:
                parts.append(PrefixPart((items_start, end), (start, items_start)))
            if group.cached_len and start < end:
                slots = slot_runs(group.page_indices, 0, group.cached_len, page_size)
                _add_cached(parts, PrefixPart((start, end), None, slots))
            all_lens = np.concatenate([own, item_lens]).astype(np.int64)
            starts.append(start + np.cumsum(all_lens) - all_lens)
            lens.append(all_lens)
        return cls(
            layout.num_tokens,
            layout.num_real_tokens,
            torch.device("cpu"),
            tuple(batch_by_length(np.concatenate(starts), np.concatenate(lens))),
            tuple(parts),
            tuple(writes),
        )

    def on(self, device: torch.device) -> SegmentPlan:
        """The same plan with its index tensors on `device`, made once for each device."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            moved = tuple(batch.on(device) for batch in self.sequences)
            self._elsewhere[device] = replace(self, device=device, sequences=moved)
        return self._elsewhere[device]


def _add_cached(parts: list[PrefixPart], part: PrefixPart) -> None:
    """Neighbouring groups that read the same pages are served by one call."""
    for i, other in enumerate(parts):
        if other.slots == part.slots and other.rows[1] == part.rows[0]:
            parts[i] = PrefixPart((other.rows[0], part.rows[1]), None, part.slots)
            return
    parts.append(part)


def batch_by_length(
    starts: np.ndarray,  # i64[num_segments]
    lens: np.ndarray,  # i64[num_segments]
) -> Iterator[SequenceBatch]:
    """Runs of tokens, those of similar length together; empty ones are left out."""
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
    pages: KvPages | None = None,
    layer_idx: int = 0,
) -> torch.Tensor:
    """Attention of packed tokens, each item to the prefix and to itself only.

    Memory beside the output is O(num_tokens); nothing of size num_tokens x num_tokens exists.

    Args:
      q: queries of the packed tokens.
      k: keys; `num_q_heads` is a multiple of `num_kv_heads`.
      v: values.
      plan: `SegmentPlan.build(layout)`, on any device.
      sm_scale: factor on the scores before the softmax.
      pages: where cached prefix tokens are, and where the plan writes new ones; None where the
        plan has neither.
      layer_idx: whose pages.

    Returns:
      [1, num_tokens, num_q_heads, head_dim] in q's dtype; padding rows are zeros.

    Raises:
      InputError: the plan needs pages and there are none.

    Source: partial softmaxes merged by their log-sum-exp, as in FlashAttention-2 (Dao, 2023).
    """
    plan = plan.on(q.device)
    if pages is None and (plan.writes or any(part.packed is None for part in plan.parts)):
        raise InputError("pages=None, and the plan has prefix tokens in pages; pass a KvPages")
    out = q.new_empty(plan.num_tokens, q.shape[1], q.shape[3])
    lse = q.new_empty(plan.num_tokens, q.shape[1], dtype=torch.float32)
    out[plan.num_real_tokens :] = 0
    for batch in plan.sequences:
        _attend_within(q[0], k[0], v[0], batch, sm_scale, out, lse)
    if pages is not None:
        pages.write(layer_idx, k, v, plan.writes)
    add_prefixes(q, k, v, plan.parts, out, lse, sm_scale, pages, layer_idx)
    return out[None]


def add_prefixes(
    q: torch.Tensor,  # [1, num_q_heads, num_rows, head_dim]
    k: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    v: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    parts: Sequence[PrefixPart],
    out: torch.Tensor,  # [num_rows, num_q_heads, head_dim], changed in place
    lse: torch.Tensor,  # float32[num_rows, num_q_heads], changed in place
    sm_scale: float,
    pages: KvPages | None,
    layer_idx: int,
) -> None:
    """Fold what rows see of their prefixes, packed or in pages, into what they see of their own."""
    for part in parts:
        if part.packed is not None:
            keys, values = (x[:, :, slice(*part.packed)] for x in (k, v))
        else:
            assert pages is not None
            keys, values = pages.read(layer_idx, part.slots)
        rows = slice(*part.rows)
        part_out, part_lse = attend(q[:, :, rows], keys, values, is_causal=False, sm_scale=sm_scale)
        merge(out[rows], lse[rows], part_out[0].transpose(0, 1), part_lse[0].T)


def merge(
    out: torch.Tensor,  # [num_rows, num_q_heads, head_dim], changed in place
    lse: torch.Tensor,  # float32[num_rows, num_q_heads], changed in place
    part_out: torch.Tensor,  # [num_rows, num_q_heads, head_dim]
    part_lse: torch.Tensor,  # float32[num_rows, num_q_heads]
) -> None:
    """Fold the attention to further keys into what is there."""
    # exp(part_lse) / (exp(part_lse) + exp(lse)), which cannot overflow
    share = torch.sigmoid(part_lse - lse)[..., None]
    out.copy_(out.float().lerp_(part_out.float(), share))
    torch.logaddexp(lse, part_lse, out=lse)


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
    queries, keys, values = (batch.select(x) for x in (q, k, v))
    seq_out, seq_lse = attend(queries, keys, values, is_causal=True, sm_scale=sm_scale)
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
    is_seen: torch.Tensor | None = None,  # bool[batch, num_kv], the same keys for all rows
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp: torch's fused CPU kernel where it serves, else tiled math.

    Returns:
      ([batch, num_q_heads, num_q, head_dim] in q's dtype, float32[batch, num_q_heads, num_q]).
    """
    if q.device.type == "cpu" and q.dtype in FUSED_CPU_DTYPES:
        mask = None
        if is_seen is not None:
            mask = q.new_zeros(is_seen.shape).masked_fill_(~is_seen, -torch.inf)[:, None, None]
        out, lse = fused_attention()(q, k, v, is_causal=is_causal, attn_mask=mask, scale=sm_scale)
        return out, lse
    return attend_math(q, k, v, is_causal=is_causal, sm_scale=sm_scale, is_seen=is_seen)


def attend_math(
    q: torch.Tensor,  # [batch, num_q_heads, num_q, head_dim]
    k: torch.Tensor,  # [batch, num_kv_heads, num_kv, head_dim]
    v: torch.Tensor,  # [batch, num_kv_heads, num_kv, head_dim]
    *,
    is_causal: bool,
    sm_scale: float,
    is_seen: torch.Tensor | None = None,  # bool[batch, num_kv]
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
        if is_seen is not None:
            scores.masked_fill_(~is_seen[:, None, None, None], -torch.inf)
        lses.append(scores.logsumexp(-1))
        outs.append((scores - lses[-1][..., None]).exp_().to(v.dtype) @ values)
    return torch.cat(outs, -2).flatten(1, 2), torch.cat(lses, -1).flatten(1, 2)
