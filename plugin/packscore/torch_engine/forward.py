"""What both torch engines share: where inputs go, the decoder's forward, the head's rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from packscore.errors import PackscoreError, StalePrefixError, UnsupportedModelError
from packscore.flows.engine import Readout, RowValues
from packscore.flows.packing import PackedBatch, Share
from packscore.model.family import base_model, class_count
from packscore.model.label_head import LinearHead
from packscore.model.last_layer import OnRows, whole_reason, with_last
from packscore_kernels.attention.layout import SegmentLayout

CHANGED = "what runs the model changed while a request did; score it again"


def free_bytes(device: torch.device, enough: int = 2**62) -> int:
    """Memory that new tensors can have, what torch keeps for them included.

    Args:
      device: where.
      enough: with so much, how much more there is does not matter.
    """
    if device.type != "cuda":
        idle = _idle_bytes()
        return idle if idle >= enough else int(psutil.virtual_memory().available)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def _idle_bytes() -> int:
    """Memory that nothing uses, caches neither; a moment's question where the system knows it."""
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch, or numpy, found no room; torch has no class of error for a CPU's memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, MemoryError):
        return not isinstance(error, PackscoreError)
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model's inputs go."""
    embedding: Any = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    # offloaded: accelerate's hooks bring inputs to the right place
    return torch.device("cpu") if device.type == "meta" else device


def decoder_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    """What a packed forward runs as it is, with its hooks."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    return decoder.modules()


def positions_of(layout: SegmentLayout, device: torch.device) -> torch.Tensor:
    """i64[1, num_tokens]: rotary positions."""
    return torch.from_numpy(layout.position_ids.astype(np.int64))[None].to(device)


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """What a launch in torch leaves to be read: hidden states, or what the model's head made."""

    values: torch.Tensor  # [num_rows, hidden_size] after the final norm, or all logits
    readout: Readout
    are_logits: bool = False
    done: Any = None  # a CUDA event behind it; None where the launch waited

    @property
    def is_done(self) -> bool:
        """Whether it was computed."""
        return self.done is None or bool(self.done.query())


def event_behind(values: torch.Tensor) -> Any:
    """What tells when a tensor was computed; None where it is already."""
    if values.device.type != "cuda":
        return None
    with torch.cuda.device(values.device):
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # untyped in torch
        event.record()
    return event


def scored_rows(
    model: PreTrainedModel,
    batch: PackedBatch,
    inputs: dict[str, Any],
    readout: Readout,
    last: nn.Module | None = None,
) -> ScoredRows:
    """The decoder's forward, and of it the rows that are read.

    Args:
      model: whose decoder.
      batch: packed.
      inputs: the decoder's, but for the tokens.
      readout: what is read of the rows.
      last: in the place of the last layer, gives those rows alone; None: it runs on all tokens.
    """
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]  # untyped in transformers
    token_ids = torch.from_numpy(batch.token_ids)[None].to(device_of(model))
    rows = batch.rows
    if last is not None:
        rows = np.unique(rows, return_inverse=True)[1]
        decoder = with_last(decoder, last)
    with torch.inference_mode():
        output = decoder(input_ids=token_ids, use_cache=False, return_dict=True, **inputs)
        hidden = output.last_hidden_state
        values = hidden[0, torch.from_numpy(rows).to(hidden.device)]
        return ScoredRows(values, readout, done=event_behind(values))


def reads_few_rows(batch: PackedBatch) -> bool:
    """Whether the last layer need not run for all tokens.

    It would gain nothing where more than half are read, for those have their keys and values
    computed twice; nor is there a mask to cut where one sequence is read at several places.
    """
    rows, num_tokens = np.unique(batch.rows), len(batch.token_ids)
    few = 2 * len(rows) <= num_tokens
    return few and (not batch.is_causal or rows.tolist() in ([], [num_tokens - 1]))


def whole_last(model: PreTrainedModel) -> str | None:
    """Why a model's last layer runs for all tokens; None: for the rows that are read alone."""
    if torch.is_autocast_enabled(device_of(model).type):
        return "autocast"
    return whole_reason(model.get_decoder())  # type: ignore[no-untyped-call]


def on_rows(model: PreTrainedModel, batch: PackedBatch, **instead: Any) -> OnRows:
    """A model's last layer, for the rows that a batch reads."""
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    rows = np.unique(batch.rows)
    return OnRows(decoder.layers[-1], torch.from_numpy(rows), **instead)


def whole_rows(model: nn.Module, batch: PackedBatch, readout: Readout) -> ScoredRows:
    """Every item alone, through the model's own whole forward: what one by one means.

    Raises:
      UnsupportedModelError: the forward takes no token ids, gives no logits of its tokens, or
        hidden states are asked for, which it does not give.
      StalePrefixError: the batch only puts a prefix into pages, which nothing reads any more.
    """
    if readout.hidden:
        raise UnsupportedModelError(
            "readout=Hidden(...): this model runs as its own forward, which gives logits and no "
            "hidden states; take away what is foreign in it (hooks, replaced modules)"
        )
    base = base_model(model)
    num_classes = class_count(base)
    rows: list[torch.Tensor] = []
    if not all(share.items for share in batch.shares):
        raise StalePrefixError(CHANGED)
    with torch.inference_mode():
        for share in batch.shares:
            for ids in _sequences(share):
                output = _call(model, ids.to(device_of(base)))
                logits: Any = output[0] if isinstance(output, tuple) else output.logits
                expected = (1, num_classes) if num_classes else (1, ids.shape[1])
                if tuple(logits.shape[:2]) != expected or logits.ndim != 3 - bool(num_classes):
                    raise UnsupportedModelError(
                        f"{type(base).__name__}.forward gives logits of shape "
                        f"{list(logits.shape)} for {ids.shape[1]} tokens; packscore reads one row "
                        "of the vocabulary for each token, or one of the classes"
                    )
                rows.append(logits if num_classes else logits[0, -1:])
        values = torch.cat(rows)
        return ScoredRows(values, readout, are_logits=True, done=event_behind(values))


def _sequences(share: Share) -> Iterator[torch.Tensor]:
    """i64[1, num_tokens] up to every token that is read, which nothing behind it may change."""
    for i, item in enumerate(share.items):
        whole = np.concatenate([share.prefix, item])
        ends = [len(whole)] if share.rows is None else len(share.prefix) + share.rows[i] + 1
        yield from (torch.from_numpy(whole[:end])[None] for end in ends)


def _call(model: nn.Module, ids: torch.Tensor) -> Any:
    try:
        # in a cache, layers that bear one number would attend to each other's keys
        return model(input_ids=ids, use_cache=False)
    except TypeError:  # a forward of its own, which may know no such argument
        pass
    try:
        return model(input_ids=ids)
    except TypeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}.forward(input_ids=...) fails ({error}), and nothing else is "
            "known of it; score it with the code it came with"
        ) from error


def read_rows(head: LinearHead, launched: Sequence[ScoredRows]) -> RowValues:
    """The head on the rows of several launches at once, so that its weight is read once.

    Raises:
      StalePrefixError: some rows are of another kind of forward than others.
    """
    if len({one.are_logits for one in launched}) > 1:
        raise StalePrefixError(CHANGED)
    (readout,) = {one.readout for one in launched}
    label_ids = list(readout.label_ids)
    with torch.inference_mode():
        values = torch.cat([one.values for one in launched])
        if launched[0].are_logits:
            logits = values.float()
            chosen = logits[:, label_ids]
            if readout.over_vocabulary:
                return RowValues(chosen, logits.logsumexp(-1), logits.amax(-1))
            return RowValues(chosen)
        chosen = (
            head.label_logits(values, label_ids)
            if label_ids
            else values.new_zeros(len(values), 0).float()
        )
        hidden = values.float() if readout.hidden else None
        if readout.over_vocabulary:
            return RowValues(chosen, *head.normalizer(values), hidden)
        return RowValues(chosen, hidden=hidden)
