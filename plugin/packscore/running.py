"""One encoded request to label logits, in torch or through compiled programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from packscore.encoding import EncodedRequest
from packscore.forward import chunk_tokens_of, scored_hidden_states
from packscore.head import LabelHead
from packscore.packing import pack, split_items
from packscore.results import Flow, MaskImpl, Usage

if TYPE_CHECKING:
    from packscore.program import ModelProgram


@dataclass(frozen=True)
class LabelLogits:
    """What scores are made of, in float32 and in the order of the items."""

    logits: torch.Tensor  # [num_items, num_labels]
    normalizer: torch.Tensor  # [num_items]: log-sum-exp over the vocabulary or over the labels
    usage: Usage


def run_torch(
    model: PreTrainedModel,
    head: LabelHead,
    request: EncodedRequest,
    label_ids: list[int],
    over_vocabulary: bool,
    mask_impl: Literal["segment", "dense"],
) -> LabelLogits:
    """Score a request with the model's own torch modules."""
    # one forward of everything is what dense means; segment keeps its activations in cache
    chunk_tokens = chunk_tokens_of(model.device) if mask_impl == "segment" else None
    packed = pack(request.prefix, request.items, chunk_tokens=chunk_tokens)
    chosen: MaskImpl = "causal" if packed.is_causal else mask_impl
    with torch.inference_mode():
        hidden = scored_hidden_states(model, packed, chosen)
        logits = head.label_logits(hidden, label_ids)
        normalizer = head.logsumexp(hidden) if over_vocabulary else logits.logsumexp(-1)
    computed = sum(batch.layout.num_real_tokens for batch in packed.batches)
    return LabelLogits(
        logits, normalizer, usage_of(request, len(packed.batches), computed, 0, chosen)
    )


def run_program(
    program: ModelProgram, request: EncodedRequest, label_ids: list[int], over_vocabulary: bool
) -> LabelLogits:
    """Score a request with compiled programs; the prefix runs once for each program it needs."""
    item_lens = [len(item) for item in request.items]
    parts = split_items(len(request.prefix), item_lens, program.max_tokens)
    logits = np.zeros((len(item_lens), len(label_ids)), np.float32)
    normalizer = np.zeros(len(item_lens), np.float32)
    computed = padding = 0
    for part in parts:
        packed = pack(request.prefix, [request.items[i] for i in part])
        (batch,) = packed.batches
        index = np.array(part)[packed.order]
        logits[index], normalizer[index] = program.run(
            batch, label_ids, over_vocabulary=over_vocabulary
        )
        computed += len(batch.token_ids)
        padding += program.padding_tokens(len(batch.token_ids))
    return LabelLogits(
        torch.from_numpy(logits),
        torch.from_numpy(normalizer),
        usage_of(request, len(parts), computed, padding, "segment"),
    )


def usage_of(
    request: EncodedRequest,
    num_forwards: int,
    computed_tokens: int,
    padding_tokens: int,
    mask_impl: MaskImpl,
) -> Usage:
    """The usage of one request."""
    prompt_tokens = len(request.prefix) * len(request.items) + sum(map(len, request.items))
    flow: Flow = "packed" if num_forwards == 1 else "chunked"
    if not len(request.prefix) or len(request.items) == 1:
        flow = "plain"
    return Usage(
        prompt_tokens=prompt_tokens,
        computed_tokens=computed_tokens,
        prefix_tokens_saved=prompt_tokens - computed_tokens,
        padding_tokens=padding_tokens,
        truncated_items=tuple(request.truncated_items),
        special_token_items=tuple(request.special_token_items),
        flow=flow,
        mask_impl=mask_impl,
    )
