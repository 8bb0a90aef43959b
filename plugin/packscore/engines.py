"""What runs packed batches in torch: the segment engine with its pages, and the dense one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel

from packscore.attention import SegmentPlan
from packscore.costs import CostModel, flops_cost_model
from packscore.errors import MaskTooLargeError
from packscore.head import LinearHead
from packscore.kv_pages import KvPages, PageWrite, page_bytes
from packscore.packing import PackedBatch
from packscore.paging import PAGE_SIZE, PagePool
from packscore.planner import Limits
from packscore.results import MaskImpl
from packscore.watching import WeightWatch
from packscore_kernels.segment_paged_attention.layout import PREFIX_SEGMENT, SegmentLayout

logger = logging.getLogger("packscore")

# A dense mask of this size is worth telling the user, who may not know what it costs.
TELL_MASK_BYTES = 256 * 2**20
# Tokens of one launch. On a CPU activations should stay in its caches; elsewhere a launch should
# be long, and memory is what ends it.
TARGET_TOKENS_CPU = 2048
MAX_TOKENS = 32_768
MAX_GROUPS = 256
# A launch may fill this share of the free memory, but is not cut below so many tokens.
MEMORY_SHARE = 0.5
LEAST_MAX_TOKENS = 256

LabelLogits = tuple[torch.Tensor, torch.Tensor]


class Engine(Protocol):
    """What runs packed batches for one model.

    `launch` starts a batch, `read` waits for the results of many: float32 logits
    [num_rows, num_labels] and their normaliser [num_rows], a row for each scored item.
    """

    pool: PagePool | None
    costs: CostModel
    mask_impl: MaskImpl

    @property
    def limits(self) -> Limits:
        """What one launch can hold."""
        ...

    def refresh(self) -> None:
        """Forget prefixes that other weights computed; called before each run."""
        ...

    def launch(self, batch: PackedBatch, label_ids: list[int], over_vocabulary: bool) -> Any:
        """Start a batch; what it returns is for `read`."""
        ...

    def read(
        self, launched: Sequence[Any], label_ids: list[int], over_vocabulary: bool
    ) -> LabelLogits:
        """Logits and normaliser of the scored rows of batches, one behind the other."""
        ...


def pool_for(config: Any, dtype: torch.dtype, cache_bytes: int) -> PagePool | None:
    """Pages for so many bytes of prefix keys and values; None where not one fits."""
    num_pages = cache_bytes // page_bytes(config, dtype, PAGE_SIZE)
    return PagePool(num_pages) if num_pages else None


class TorchEngine:
    """Packed batches through the patched model's own modules.

    Args:
      model: a patched Hugging Face decoder.
      head: reads the labels.
      cache_bytes: what the pages of prefixes may take.
    """

    mask_impl: MaskImpl = "segment"

    def __init__(self, model: PreTrainedModel, head: LinearHead, cache_bytes: int) -> None:
        self._model = model
        self._head = head
        self.pool = pool_for(model.config, model.dtype, cache_bytes)
        self._pages = KvPages(self.pool.num_pages, self.pool.page_size) if self.pool else None
        on_cpu = model.device.type in ("cpu", "meta")
        target = TARGET_TOKENS_CPU if on_cpu else MAX_TOKENS
        self.most = Limits(MAX_TOKENS, target, MAX_GROUPS)
        self.costs = flops_cost_model(model.config)
        self._watch = WeightWatch(model, is_copied=True)
        self._fitting_tokens = self._fitting()

    @property
    def limits(self) -> Limits:
        """What one launch can hold, of the memory that was free when the run began."""
        tokens = min(self.most.max_tokens, self._fitting_tokens)
        return replace(
            self.most, max_tokens=tokens, target_tokens=min(self.most.target_tokens, tokens)
        )

    def _fitting(self) -> int:
        """A power of two, so that a little more or less memory changes no launch."""
        per_token = activation_bytes(self._model.config, self._model.dtype)
        tokens = int(MEMORY_SHARE * free_bytes(device_of(self._model))) // per_token
        return max(1 << max(tokens.bit_length() - 1, 0), LEAST_MAX_TOKENS)

    def refresh(self) -> None:
        """Look how much memory is free, and forget prefixes that other weights computed."""
        self._fitting_tokens = self._fitting()
        if self.pool is not None and self._watch.sees_change(self._model):
            self._watch = WeightWatch(self._model, is_copied=True)
            self.pool.clear()

    def launch(
        self, batch: PackedBatch, label_ids: list[int], over_vocabulary: bool
    ) -> torch.Tensor:
        """[num_items, hidden_size] of the scored rows."""
        writes = [
            PageWrite.of(share.lease, len(share.prefix), start)
            for share, start in zip(batch.shares, batch.layout.group_starts.tolist(), strict=False)
            if share.lease is not None and not share.lease.is_whole
        ]
        device = device_of(self._model)
        inputs: dict[str, Any] = {}
        if writes or not batch.is_causal:
            # An empty 4-D mask keeps HF from building one; a model that dropped our plan would
            # fail on its shape instead of attending to the wrong tokens.
            inputs["attention_mask"] = torch.empty(1, 1, 0, 0, device=device)
            inputs["segment_plan"] = SegmentPlan.build(batch.layout, writes)
            inputs["kv_pages"] = self._pages
            inputs["position_ids"] = positions_of(batch.layout, device)
        return scored_rows(self._model, batch, inputs)

    def read(
        self, launched: Sequence[torch.Tensor], label_ids: list[int], over_vocabulary: bool
    ) -> LabelLogits:
        """Logits and normaliser of all rows at once, so that the head's weight is read once."""
        return read_rows(self._head, launched, label_ids, over_vocabulary)


class DenseEngine:
    """Packed batches under a 4-D mask, through the model's own attention, patched or not."""

    mask_impl: MaskImpl = "dense"
    pool: PagePool | None = None

    def __init__(self, model: PreTrainedModel, head: LinearHead) -> None:
        self._model = model
        self._head = head
        # one forward of everything is what dense means
        self.limits = Limits(2**62, 1, 1)
        self.costs = flops_cost_model(model.config)

    def refresh(self) -> None:
        """Nothing is kept."""

    def launch(
        self, batch: PackedBatch, label_ids: list[int], over_vocabulary: bool
    ) -> torch.Tensor:
        """[num_items, hidden_size] of the scored rows.

        Raises:
          MaskTooLargeError: the mask does not fit.
        """
        device = device_of(self._model)
        inputs: dict[str, Any] = {}
        if not batch.is_causal:
            inputs["attention_mask"] = dense_mask(
                self._model, batch.layout, device, self._model.dtype
            )
            inputs["position_ids"] = positions_of(batch.layout, device)
        return scored_rows(self._model, batch, inputs)

    def read(
        self, launched: Sequence[torch.Tensor], label_ids: list[int], over_vocabulary: bool
    ) -> LabelLogits:
        """Logits and normaliser of all rows at once."""
        return read_rows(self._head, launched, label_ids, over_vocabulary)


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors can have, what torch keeps for them included."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def activation_bytes(config: Any, dtype: torch.dtype) -> int:
    """An upper estimate of what one packed token takes while a layer runs.

    Attention has queries, keys and values before and after the rotation, and two partial results
    in float32; the MLP has its gate, its other half, and what becomes of them.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = 4 * head_dim * (heads + 2 * kv_heads) * dtype.itemsize + 12 * head_dim * heads
    mlp = 4 * getattr(config, "intermediate_size", 4 * config.hidden_size) * dtype.itemsize
    return int(3 * config.hidden_size * dtype.itemsize + max(attention, mlp))


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
) -> LabelLogits:
    """The head on the scored rows of several batches."""
    with torch.inference_mode():
        hidden = torch.cat(list(launched))
        logits = head.label_logits(hidden, label_ids)
        return logits, head.logsumexp(hidden) if over_vocabulary else logits.logsumexp(-1)


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
    free = free_bytes(device)
    told = (
        f"mask_impl='dense' needs {needed / 2**20:,.0f} MiB for {num_tokens:,} tokens "
        f"({per_pair} bytes for each pair of tokens); {free / 2**20:,.0f} MiB are free"
    )
    if needed > free:
        raise MaskTooLargeError(f"{told}; use mask_impl='segment', which needs no mask")
    logger.log(logging.WARNING if needed >= TELL_MASK_BYTES else logging.INFO, told)
