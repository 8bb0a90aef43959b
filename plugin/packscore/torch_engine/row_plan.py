"""Attention of the rows that are read, a few of many: what the last layer needs of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from packscore.errors import InputError
from packscore.torch_engine.attention import (
    PrefixPart,
    SegmentPlan,
    SequenceBatch,
    add_prefixes,
    attend,
    batch_by_length,
)
from packscore.torch_engine.pages import KvPages, PageWrite


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Who sees whom where a few rows' queries meet all tokens' keys.

    Every row sees its own segment up to itself, and what of the prefix the plan of all rows says.
    """

    num_rows: int
    sequences: tuple[SequenceBatch, ...]  # the own keys of a row each
    index: tuple[torch.Tensor, ...]  # i64[num_segments] of each batch: which rows
    parts: tuple[PrefixPart, ...]  # whose rows are these
    writes: tuple[PageWrite, ...]

    @classmethod
    def of(
        cls,
        plan: SegmentPlan,
        rows: npt.NDArray[np.int64],  # [num_rows], ascending storage indices
    ) -> RowPlan:
        """The part of a plan on the CPU that some rows need."""
        firsts = [batch.rows[:, 0].numpy() for batch in plan.sequences]
        starts = np.sort(np.concatenate([np.zeros(0, np.int64), *firsts]))
        own = starts[np.searchsorted(starts, rows, side="right") - 1]
        sequences = tuple(batch_by_length(own, rows - own + 1))
        # the last token of a row's own keys is the row, also where copies of it fill them up
        index = (np.searchsorted(rows, batch.rows[:, -1].numpy()) for batch in sequences)
        return cls(
            len(rows),
            sequences,
            tuple(map(torch.from_numpy, index)),
            tuple(_parts_at(plan.parts, rows)),
            plan.writes,
        )

    def on(self, device: torch.device) -> RowPlan:
        """The same plan with its index tensors on `device`."""
        if device.type == "cpu":
            return self
        moved = tuple(batch.on(device) for batch in self.sequences)
        return replace(self, sequences=moved, index=tuple(x.to(device) for x in self.index))


def _parts_at(parts: Sequence[PrefixPart], rows: npt.NDArray[np.int64]) -> list[PrefixPart]:
    found = []
    for part in parts:
        first, end = np.searchsorted(rows, part.rows).tolist()
        if first < end:
            found.append(replace(part, rows=(first, end)))
    return found


def rows_attention(
    q: torch.Tensor,  # [1, num_q_heads, num_rows, head_dim]
    k: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    v: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    plan: RowPlan,
    *,
    sm_scale: float,
    pages: KvPages | None = None,
    layer_idx: int = 0,
) -> torch.Tensor:
    """`segment_attention` of some rows: as there, and all tokens' keys and values go into pages.

    Returns:
      [1, num_rows, num_q_heads, head_dim] in q's dtype.

    Raises:
      InputError: the plan needs pages and there are none.
    """
    plan = plan.on(q.device)
    if pages is None and (plan.writes or any(part.packed is None for part in plan.parts)):
        raise InputError("pages=None, and the plan has prefix tokens in pages; pass a KvPages")
    out = q.new_empty(plan.num_rows, q.shape[1], q.shape[3])
    lse = q.new_empty(plan.num_rows, q.shape[1], dtype=torch.float32)
    for batch, index in zip(plan.sequences, plan.index, strict=True):
        queries = q[0, :, index].transpose(0, 1)[:, :, None]
        found, found_lse = attend(
            queries,
            batch.select(k[0]),
            batch.select(v[0]),
            is_causal=False,
            sm_scale=sm_scale,
            is_seen=batch.is_real,
        )
        out[index], lse[index] = found[:, :, 0], found_lse[:, :, 0]
    if pages is not None:
        pages.write(layer_idx, k, v, plan.writes)
    add_prefixes(q, k, v, plan.parts, out, lse, sm_scale, pages, layer_idx)
    return out[None]
