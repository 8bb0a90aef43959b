"""Packed batches in torch, through the patched model's own modules and its pages."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from packscore.errors import StalePrefixError
from packscore.flows.costs import flops_cost_model
from packscore.flows.engine import Limits, Readout, RowValues
from packscore.flows.packing import PackedBatch
from packscore.flows.page_pool import PAGE_SIZE, PagePool
from packscore.model.family import base_model, check_supported
from packscore.model.label_head import LinearHead
from packscore.model.last_layer import OnRows
from packscore.model.masks import check_segment
from packscore.model.plain import foreign_part
from packscore.model.sizes import ModelSizes
from packscore.model.weight_watch import WeightWatch
from packscore.results import Flow, MaskImpl
from packscore.torch_engine.attention import SegmentPlan
from packscore.torch_engine.forward import (
    ScoredRows,
    decoder_modules,
    device_of,
    free_bytes,
    is_out_of_memory,
    on_rows,
    positions_of,
    read_rows,
    reads_few_rows,
    scored_rows,
    whole_last,
    whole_rows,
)
from packscore.torch_engine.hooks import changes_by_hooks, hooked
from packscore.torch_engine.pages import KvPages, LaunchPages, PageWrite
from packscore.torch_engine.row_plan import RowPlan

logger = logging.getLogger("packscore")

# Tokens of one launch. On a CPU activations should stay in its caches; elsewhere a launch should
# be long, and memory is what ends it.
TARGET_TOKENS_CPU = 2048
MAX_TOKENS = 32_768
MAX_GROUPS = 256
# A launch may fill this share of the free memory, but is not cut below so many tokens.
MEMORY_SHARE = 0.5
LEAST_MAX_TOKENS = 256


class TorchEngine:
    """Packed batches through the patched model's own modules.

    What is foreign in a model runs as the model's own whole forward, an item at a time.

    Args:
      model: a patched Hugging Face decoder, PEFT-wrapped or not.
      head: reads the labels.
      cache_bytes: what the pages of prefixes may take.
    """

    mask_impl: MaskImpl = "segment"
    keeps_pages = True

    def __init__(self, model: nn.Module, head: LinearHead, cache_bytes: int) -> None:
        self._given = model
        self._model = base_model(model)
        self._head = head
        self._cache_bytes = cache_bytes
        on_cpu = self._model.device.type in ("cpu", "meta")
        target = TARGET_TOKENS_CPU if on_cpu else MAX_TOKENS
        self.most = Limits(MAX_TOKENS, target, MAX_GROUPS)
        self._lock = threading.Lock()
        self.pool: PagePool | None = None
        self._foreign: str | None = None
        self._renew()
        self.costs = flops_cost_model(self._sizes, whole_last=bool(self.whole_last))
        self._fitting_tokens = self._fitting()

    @property
    def only_flow(self) -> Flow | None:
        """One by one, where something in the model is foreign."""
        return "plain" if self._foreign else None

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
        enough = int(self.most.max_tokens * per_token / MEMORY_SHARE)
        free = free_bytes(device_of(self._model), enough)
        tokens = int(MEMORY_SHARE * free) // per_token
        return max(1 << max(tokens.bit_length() - 1, 0), LEAST_MAX_TOKENS)

    def refresh(self, *, force: bool = False) -> None:
        """Look how much memory is free, and follow the model where it changed."""
        self._fitting_tokens = self._fitting()
        with self._lock:  # whoever comes meanwhile waits, and finds no page of before
            if force or self._watch.sees_change(self._given):
                self._renew()

    def _renew(self) -> None:
        """Pages for the model as it is now, which hold nothing yet."""
        # first: what changes from here on is seen the next time
        watch = WeightWatch(self._given)
        if self.pool is not None:
            self.pool.clear()
        check_supported(self._given)
        check_segment(self._given, longest=1)
        self._hooked = hooked(decoder_modules(self._model))
        foreign = foreign_part(self._given, decoder_modules(self._model))
        self.whole_last = foreign or whole_last(self._model)
        self._sizes = ModelSizes.of(self._model.config)
        page_bytes = self._sizes.page_bytes(PAGE_SIZE, self._model.dtype.itemsize)
        num_pages = self._cache_bytes // page_bytes
        if self.pool is None or self.pool.num_pages != num_pages:
            self.pool = PagePool(num_pages) if num_pages else None
        self._pages = KvPages(num_pages, PAGE_SIZE) if num_pages else None
        self._foreign, self._watch = None, watch
        if foreign:
            self._run_whole(foreign)

    def _run_whole(self, foreign: str) -> None:
        """From now on run the model's own whole forward, an item at a time, and keep no pages."""
        logger.warning("packscore runs each item by itself, for the model has %s", foreign)
        self._foreign = self.whole_last = foreign
        if self.pool is not None:
            self.pool.clear()
        self.pool = self._pages = None

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether torch found no room."""
        return is_out_of_memory(error)

    def launch(self, batch: PackedBatch, readout: Readout) -> ScoredRows:
        """Run a batch up to the hidden states of its scored rows.

        Raises:
          StalePrefixError: a hook mixed tokens, or may have; another launch runs without pages.
          UnsupportedModelError: a sequence is longer than the model's window.
        """
        if self._foreign:
            return whole_rows(self._given, batch, readout)
        writes = [
            PageWrite.of(share.lease, len(share.prefix), start)
            for share, start in zip(batch.shares, batch.layout.group_starts.tolist(), strict=False)
            if share.lease is not None and not share.lease.is_whole
        ]
        device = device_of(self._model)
        inputs: dict[str, Any] = {}
        last = None
        if writes or not batch.is_causal:
            check_segment(self._model, batch.layout.longest)
            plan = SegmentPlan.build(batch.layout, writes)
            pages = LaunchPages(self._pages) if self._pages else None
            # An empty 4-D mask keeps HF from building one; a model that dropped our plan would
            # fail on its shape instead of attending to the wrong tokens.
            inputs["attention_mask"] = torch.empty(1, 1, 0, 0, device=device)
            inputs["segment_plan"], inputs["kv_pages"] = plan, pages
            inputs["position_ids"] = positions_of(batch.layout, device)
            if self.reads_rows(batch):
                last = _rows_of_plan(self._model, batch, plan, pages)
        elif self.reads_rows(batch):
            last = on_rows(self._model, batch)
        is_alone = not inputs and batch.is_alone
        with changes_by_hooks(() if is_alone else self._hooked) as changed:
            found = scored_rows(self._model, batch, inputs, readout, last)
        if changed:
            with self._lock:
                self._run_whole(f"a hook that changes what it sees, on a {changed[0]}")
            raise StalePrefixError(
                f"the prefix went into pages before a hook on a {changed[0]} changed what it sees; "
                "open a new one with scorer.prefix(query)"
            )
        return found

    def reads_rows(self, batch: PackedBatch) -> bool:
        """Whether the last layer runs for the scored rows of a batch alone."""
        return not self.whole_last and reads_few_rows(batch)

    def is_done(self, launched: ScoredRows) -> bool:
        """Whether a launch was computed."""
        return launched.is_done

    def read(self, launched: Sequence[ScoredRows]) -> RowValues:
        """What is read at all rows."""
        return read_rows(self._head, launched)


def _rows_of_plan(
    model: PreTrainedModel, batch: PackedBatch, plan: SegmentPlan, pages: LaunchPages | None
) -> OnRows:
    """The last layer for the rows that a batch reads; without any, its pages are written."""

    def keep(keys: torch.Tensor, values: torch.Tensor) -> None:
        if pages is not None:
            pages.pages.write(pages.next_layer(), keys, values, plan.writes)

    rows = RowPlan.of(plan, np.unique(batch.rows))
    return on_rows(model, batch, keep=keep, segment_plan=rows)
