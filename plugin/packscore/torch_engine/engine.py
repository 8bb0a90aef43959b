"""Packed batches in torch, through the patched model's own modules and its pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from packscore.flows.costs import flops_cost_model
from packscore.flows.engine import Limits, Readout, RowLogits
from packscore.flows.packing import PackedBatch
from packscore.flows.page_pool import PAGE_SIZE, PagePool
from packscore.model.label_head import LinearHead
from packscore.model.sizes import ModelSizes
from packscore.model.weight_watch import WeightWatch
from packscore.results import MaskImpl
from packscore.torch_engine.attention import SegmentPlan
from packscore.torch_engine.forward import (
    ScoredRows,
    device_of,
    free_bytes,
    positions_of,
    read_rows,
    scored_rows,
)
from packscore.torch_engine.pages import KvPages, PageWrite

# Tokens of one launch. On a CPU activations should stay in its caches; elsewhere a launch should
# be long, and memory is what ends it.
TARGET_TOKENS_CPU = 2048
MAX_TOKENS = 32_768
MAX_GROUPS = 256
# A launch may fill this share of the free memory, but is not cut below so many tokens.
MEMORY_SHARE = 0.5
LEAST_MAX_TOKENS = 256


def pool_for(sizes: ModelSizes, dtype: torch.dtype, cache_bytes: int) -> PagePool | None:
    """Pages for so many bytes of prefix keys and values; None where not one fits."""
    num_pages = cache_bytes // sizes.page_bytes(PAGE_SIZE, dtype.itemsize)
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
        self._sizes = ModelSizes.of(model.config)
        self.pool = pool_for(self._sizes, model.dtype, cache_bytes)
        self._pages = KvPages(self.pool.num_pages, self.pool.page_size) if self.pool else None
        on_cpu = model.device.type in ("cpu", "meta")
        target = TARGET_TOKENS_CPU if on_cpu else MAX_TOKENS
        self.most = Limits(MAX_TOKENS, target, MAX_GROUPS)
        self.costs = flops_cost_model(self._sizes)
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
        per_token = self._sizes.activation_bytes(self._model.dtype.itemsize)
        tokens = int(MEMORY_SHARE * free_bytes(device_of(self._model))) // per_token
        return max(1 << max(tokens.bit_length() - 1, 0), LEAST_MAX_TOKENS)

    def refresh(self) -> None:
        """Look how much memory is free, and forget prefixes that other weights computed."""
        self._fitting_tokens = self._fitting()
        if self.pool is not None and self._watch.sees_change(self._model):
            self._watch = WeightWatch(self._model, is_copied=True)
            self.pool.clear()

    def launch(self, batch: PackedBatch, readout: Readout) -> ScoredRows:
        """Run a batch up to the hidden states of its scored rows."""
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
        return scored_rows(self._model, batch, inputs, readout)

    def read(self, launched: Sequence[ScoredRows]) -> RowLogits:
        """Logits and normaliser of all rows."""
        return read_rows(self._head, launched)
