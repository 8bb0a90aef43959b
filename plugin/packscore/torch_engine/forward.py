"""What both torch engines share: where inputs go, the decoder's forward, the head's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel

from packscore.flows.engine import RowLogits
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


def scored_rows(model: PreTrainedModel, batch: PackedBatch, inputs: dict[str, Any]) -> torch.Tensor:
    """[num_items, hidden_size] after the final norm, at the items' last tokens."""
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]  # untyped in transformers
    token_ids = torch.from_numpy(batch.token_ids)[None].to(device_of(model))
    with torch.inference_mode():
        hidden = decoder(input_ids=token_ids, use_cache=False, **inputs).last_hidden_state
        rows = torch.from_numpy(batch.layout.scored_rows.astype(np.int64)).to(hidden.device)
        found: torch.Tensor = hidden[0, rows]
    return found


def read_rows(
    head: LinearHead, launched: Sequence[torch.Tensor], label_ids: list[int], over_vocabulary: bool
) -> RowLogits:
    """The head on the scored rows of several batches."""
    with torch.inference_mode():
        hidden = torch.cat(list(launched))
        logits = head.label_logits(hidden, label_ids)
        return logits, head.logsumexp(hidden) if over_vocabulary else logits.logsumexp(-1)
