"""What both torch engines share: where inputs go, the decoder's forward, the head's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel

from packscore.flows.engine import Readout, RowLogits
from packscore.flows.packing import PackedBatch
from packscore.model.label_head import LinearHead
from packscore_kernels.attention.layout import SegmentLayout


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors can have, what torch keeps for them included."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model's inputs go."""
    embedding: Any = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    # offloaded: accelerate's hooks bring inputs to the right place
    return torch.device("cpu") if device.type == "meta" else device


def positions_of(layout: SegmentLayout, device: torch.device) -> torch.Tensor:
    """i64[1, num_tokens]: rotary positions."""
    return torch.from_numpy(layout.position_ids.astype(np.int64))[None].to(device)


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """What a launch in torch leaves for the head."""

    hidden: torch.Tensor  # [num_items, hidden_size], after the final norm
    readout: Readout


def scored_rows(
    model: PreTrainedModel, batch: PackedBatch, inputs: dict[str, Any], readout: Readout
) -> ScoredRows:
    """The decoder's forward, and of it the rows at the items' last tokens."""
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]  # untyped in transformers
    token_ids = torch.from_numpy(batch.token_ids)[None].to(device_of(model))
    with torch.inference_mode():
        hidden = decoder(input_ids=token_ids, use_cache=False, **inputs).last_hidden_state
        rows = torch.from_numpy(batch.layout.scored_rows.astype(np.int64)).to(hidden.device)
        return ScoredRows(hidden[0, rows], readout)


def read_rows(head: LinearHead, launched: Sequence[ScoredRows]) -> RowLogits:
    """The head on the rows of several launches at once, so that its weight is read once."""
    (readout,) = {one.readout for one in launched}
    with torch.inference_mode():
        hidden = torch.cat([one.hidden for one in launched])
        logits = head.label_logits(hidden, list(readout.label_ids))
        if readout.over_vocabulary:
            return logits, head.logsumexp(hidden)
        return logits, logits.logsumexp(-1)
