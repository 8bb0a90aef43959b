"""Packed batches under a dense 4-D mask: the plain, slow, obviously right way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from packscore.flows.costs import flops_cost_model
from packscore.flows.engine import Limits, Readout, RowValues
from packscore.flows.packing import PackedBatch, Share, pack
from packscore.flows.page_pool import PagePool
from packscore.interfaces import attention_name
from packscore.model.family import base_model, check_supported
from packscore.model.label_head import LinearHead
from packscore.model.masks import as_taken, check_mask_fits, windows_of
from packscore.model.plain import foreign_part
from packscore.model.sizes import ModelSizes
from packscore.results import Flow, MaskImpl
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
from packscore_kernels.attention.layout import PREFIX_SEGMENT, SegmentLayout


class DenseEngine:
    """Packed batches under a 4-D mask, through the model's own attention, patched or not."""

    mask_impl: MaskImpl = "dense"
    keeps_pages = False
    pool: PagePool | None = None

    def __init__(self, model: nn.Module, head: LinearHead) -> None:
        self._given = model
        self._model = base_model(model)
        self._head = head
        self._foreign: str | None = None  # until the first refresh
        self._hooked: list[nn.Module] = []
        self.whole_last: str | None = None
        # one forward of everything is what dense means
        self.limits = Limits(2**62, 1, 1)
        self.costs = flops_cost_model(ModelSizes.of(self._model.config))

    @property
    def only_flow(self) -> Flow | None:
        """One by one, where something in the model is foreign."""
        return "plain" if self._foreign else None

    def refresh(self, *, force: bool = False) -> None:
        """Nothing is kept; look what the model is now."""
        check_supported(self._given)
        self._foreign = foreign_part(self._given, decoder_modules(self._model))
        self._hooked = hooked(decoder_modules(self._model))
        self.whole_last = self._foreign or whole_last(self._model)

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether torch found no room."""
        return is_out_of_memory(error)

    def launch(self, batch: PackedBatch, readout: Readout) -> ScoredRows:
        """Run a batch up to the hidden states of its scored rows.

        Raises:
          MaskTooLargeError: the mask does not fit.
        """
        if self._foreign:
            return whole_rows(self._given, batch, readout)
        device = device_of(self._model)
        inputs: dict[str, Any] = {}
        if not batch.is_causal:
            inputs["attention_mask"] = dense_masks(
                self._model, batch.layout, device, self._model.dtype
            )
            inputs["position_ids"] = positions_of(batch.layout, device)
        is_alone = batch.is_alone
        with changes_by_hooks(() if is_alone else self._hooked) as changed:
            found = self._scored(batch, inputs, readout)
        # behind a mask a value still counts, times zero: NaN and infinity reach all items
        if not is_alone and (changed or not bool(torch.isfinite(found.values).all())):
            each = [self._scored(one, {}, readout).values for one in _alone(batch)]
            found = replace(found, values=torch.cat(each))
        return found

    def _scored(self, batch: PackedBatch, inputs: dict[str, Any], readout: Readout) -> ScoredRows:
        last = on_rows(self._model, batch) if self.reads_rows(batch) else None
        return scored_rows(self._model, batch, inputs, readout, last)

    def reads_rows(self, batch: PackedBatch) -> bool:
        """Whether the last layer runs for the scored rows of a batch alone."""
        return not self.whole_last and reads_few_rows(batch)

    def is_done(self, launched: ScoredRows) -> bool:
        """Whether a launch was computed."""
        return launched.is_done

    def read(self, launched: Sequence[ScoredRows]) -> RowValues:
        """What is read at all rows."""
        return read_rows(self._head, launched)


def _alone(batch: PackedBatch) -> Iterator[PackedBatch]:
    for share in batch.shares:
        for i, item in enumerate(share.items):
            rows = None if share.rows is None else [share.rows[i]]
            yield pack([Share(0, share.prefix, [item], np.arange(1), rows=rows)])


def dense_masks(
    model: PreTrainedModel, layout: SegmentLayout, device: torch.device, dtype: torch.dtype
) -> Any:
    """The segment rule as 4-D masks for the model's own attention, as its decoder takes them.

    `visible = (kv_segment == q_segment) | (kv_segment == PREFIX_SEGMENT)`, and-ed with storage
    order `kv_index <= q_index`. A window counts positions: in storage an item lies behind all items
    before it, and by position right behind its prefix.

    Returns:
      [1, 1, num_tokens, num_tokens]: bool for sdpa, additive in the model's dtype for eager; where
      the model's layers are of several kinds, one for each by its name.

    Raises:
      MaskTooLargeError: masks and the buffers that attention makes of one exceed the free memory.
    """
    eager = "eager" in str(attention_name(model.config))
    window = next((window for window in windows_of(model) if window is not None), None)
    check_dense_fits(model, layout, device, dtype, num_masks=1 if window is None else 2)
    segment = torch.from_numpy(layout.segment_ids).to(device)
    visible = segment[:, None] == segment
    visible |= segment == PREFIX_SEGMENT
    visible.tril_()
    near = visible
    if window is not None:
        positions = positions_of(layout, device)[0]
        near = visible & (positions > positions[:, None] - window)

    def shaped(mask: torch.Tensor) -> torch.Tensor:
        if not eager:
            return mask[None, None]
        additive = torch.full(mask.shape, torch.finfo(dtype).min, dtype=dtype, device=device)
        return additive.masked_fill_(mask, 0.0)[None, None]

    full = shaped(visible)
    return as_taken(model, (full, full if near is visible else shaped(near)))


def check_dense_fits(
    model: PreTrainedModel,
    layout: SegmentLayout,
    device: torch.device,
    dtype: torch.dtype,
    num_masks: int,
) -> None:
    """Say what a dense mask needs, before it exists.

    Raises:
      MaskTooLargeError: it needs more than is free on `device`.
    """
    # sdpa keeps bool masks and makes a float one of it in every layer; eager holds masks in the
    # model's dtype, the scores of all heads too, in float32 for the softmax, and as weights again
    num_tokens, heads = layout.num_tokens, model.config.num_attention_heads
    per_pair = num_masks + dtype.itemsize
    if "eager" in str(attention_name(model.config)):
        per_pair = num_masks * (1 + dtype.itemsize) + heads * (2 * dtype.itemsize + 4)
    what = f"for {num_tokens:,} tokens ({per_pair} bytes for each pair of tokens)"
    needed = num_tokens**2 * per_pair
    check_mask_fits(model, layout.longest, needed, free_bytes(device), what)
