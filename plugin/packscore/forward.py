"""Packed batches through the model's decoder, with the segment, the dense or the plain mask."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel

from packscore.attention import PrefixCache, SegmentPlan
from packscore.errors import MaskTooLargeError
from packscore.packing import PackedBatch, PackedRequest
from packscore.results import MaskImpl
from packscore_kernels.segment_paged_attention.layout import PREFIX_SEGMENT, SegmentLayout

logger = logging.getLogger("packscore")

# A dense mask of this size is worth telling the user, who may not know what it costs.
TELL_MASK_BYTES = 256 * 2**20

# Item tokens of one forward. On a CPU activations should stay in its caches; elsewhere a forward
# should be long, and memory is what ends it.
CHUNK_TOKENS_CPU = 2048
CHUNK_TOKENS = 32_768


def chunk_tokens_of(device: torch.device) -> int:
    """Item tokens to compute in one forward on `device`."""
    return CHUNK_TOKENS_CPU if device.type == "cpu" else CHUNK_TOKENS


def scored_hidden_states(
    model: PreTrainedModel, request: PackedRequest, mask_impl: MaskImpl
) -> torch.Tensor:
    """Run the decoder over the batches of a request and keep the scored rows.

    Args:
      model: a Hugging Face causal model; patched, for "segment".
      request: prefix and items; one batch alone, unless "segment".
      mask_impl: "causal" runs plain HF, for a batch whose `is_causal` is true.

    Returns:
      [num_items, hidden_size] after the final norm, in the order of the items.

    Raises:
      MaskTooLargeError: the dense mask does not fit.
    """
    prefix_len = request.batches[0].layout.groups[0].prefix_len
    cache = PrefixCache(prefix_len) if prefix_len and len(request.batches) > 1 else None
    hidden = torch.cat([_run(model, batch, mask_impl, cache) for batch in request.batches])
    in_order = torch.empty_like(hidden)
    in_order[torch.from_numpy(request.order).to(hidden.device)] = hidden
    return in_order


def _run(
    model: PreTrainedModel, batch: PackedBatch, mask_impl: MaskImpl, cache: PrefixCache | None
) -> torch.Tensor:
    """[num_items, hidden_size] of one batch; the first one fills the cache for the others."""
    layout = batch.layout
    embedding: Any = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    if device.type == "meta":  # offloaded: accelerate's hooks bring inputs to the right place
        device = torch.device("cpu")
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(batch.token_ids)[None].to(device)}
    if mask_impl != "causal":
        positions = torch.from_numpy(layout.position_ids.astype(np.int64))
        inputs["position_ids"] = positions[None].to(device)
    if mask_impl == "segment":
        # An empty 4-D mask keeps HF from building one; a model that dropped our plan would fail on
        # its shape instead of attending to the wrong tokens.
        inputs["attention_mask"] = torch.empty(1, 1, 0, 0, device=device)
        inputs["segment_plan"] = SegmentPlan.build(layout)
        inputs["prefix_cache"] = cache
    elif mask_impl == "dense":
        inputs["attention_mask"] = dense_mask(model, layout, device, embedding.weight.dtype)
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]  # untyped in transformers
    hidden: torch.Tensor = decoder(**inputs, use_cache=False).last_hidden_state
    rows = torch.from_numpy(layout.scored_rows.astype(np.int64)).to(hidden.device)
    return hidden[0, rows]


def dense_mask(
    model: PreTrainedModel, layout: SegmentLayout, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """The segment rule as a 4-D mask for the model's own attention.

    `visible = (kv_segment == q_segment) | (kv_segment == PREFIX_SEGMENT)`, and-ed with storage
    order `kv_index <= q_index`.

    Returns:
      [1, 1, num_tokens, num_tokens]: bool for sdpa, additive in the model's dtype for eager.

    Raises:
      MaskTooLargeError: mask and the buffers that attention makes of it exceed the free memory.
    """
    eager = "eager" in str(model.config._attn_implementation)
    check_dense_fits(layout.num_tokens, model.config.num_attention_heads, dtype, device, eager)
    segment = torch.from_numpy(layout.segment_ids).to(device)
    visible = segment[:, None] == segment
    visible |= segment == PREFIX_SEGMENT
    visible.tril_()
    if eager:
        additive = torch.full(visible.shape, torch.finfo(dtype).min, dtype=dtype, device=device)
        return additive.masked_fill_(visible, 0.0)[None, None]
    return visible[None, None]


def check_dense_fits(
    num_tokens: int, num_q_heads: int, dtype: torch.dtype, device: torch.device, eager: bool
) -> None:
    """Say what a dense mask needs, before it exists.

    Raises:
      MaskTooLargeError: it needs more than is free on `device`.
    """
    # sdpa keeps a bool mask and makes a float one of it in every layer; eager holds the scores of
    # all heads in the model's dtype, in float32 for the softmax, and once more as weights
    per_pair = 1 + dtype.itemsize
    if eager:
        per_pair = 1 + dtype.itemsize + num_q_heads * (2 * dtype.itemsize + 4)
    needed = num_tokens**2 * per_pair
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    told = (
        f"mask_impl='dense' needs {needed / 2**20:,.0f} MiB for {num_tokens:,} tokens "
        f"({per_pair} bytes for each pair of tokens); {free / 2**20:,.0f} MiB are free"
    )
    if needed > free:
        raise MaskTooLargeError(f"{told}; use mask_impl='segment', which needs no mask")
    logger.log(logging.WARNING if needed >= TELL_MASK_BYTES else logging.INFO, told)
