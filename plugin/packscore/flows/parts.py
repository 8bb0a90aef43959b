"""A request in parts, so that others run between them, and what was read put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from packscore.encoded import EncodedRequest
from packscore.flows.cuts import Items, usage_of
from packscore.flows.packing import first_equal
from packscore.flows.reads import HiddenRead, HiddenRows, LabelLogits, Read
from packscore.results import Usage


def item_order(request: EncodedRequest) -> Items:
    """i64[num_items]: equal items behind one another, so that one part computes them once."""
    return np.argsort(first_equal(request.items, request.rows), kind="stable")


def item_tokens(request: EncodedRequest, read: Read) -> Items:
    """i64[num_items]: about what each item runs, what its labels need behind it with it."""
    lens = np.array([len(item) for item in request.items], np.int64)
    if isinstance(read, HiddenRead) or read.are_single:
        return np.maximum(lens, 1)
    extra = {x: sum(len(leaf) for leaf, _ in x.leaves) for x in dict.fromkeys(read.labels)}
    return np.maximum(lens + [extra[read.of(i)] for i in range(len(lens))], 1)


def part_of(request: EncodedRequest, read: Read, items: Items) -> tuple[EncodedRequest, Read]:
    """Some items of a request, and what is read of them."""
    chosen = items.tolist()
    part = request.part(chosen)
    if isinstance(read, HiddenRead):
        rows = None if read.rows is None else tuple(read.rows[i] for i in chosen)
        return part, HiddenRead(rows)
    if len(read.labels) > 1:
        return part, replace(read, labels=tuple(read.labels[i] for i in chosen))
    return part, read


def joined(
    request: EncodedRequest,
    parts: Sequence[Items],
    found: Sequence[LabelLogits | HiddenRows],
) -> LabelLogits | HiddenRows:
    """What was read of the parts, as if the request had run whole.

    Args:
      request: the whole one.
      parts: the items of each part; together all, each once.
      found: of each part.
    """
    usage = usage_of(request, parts, [one.usage for one in found])
    back = np.argsort(np.concatenate(parts), kind="stable")
    hidden = [one for one in found if isinstance(one, HiddenRows)]
    if hidden:
        rows = [row for one in hidden for row in one.hidden]
        return HiddenRows(tuple(rows[i] for i in back.tolist()), usage)
    logits = [one for one in found if isinstance(one, LabelLogits)]
    with torch.inference_mode():
        return _labels(logits, torch.from_numpy(back), usage)


def _labels(found: Sequence[LabelLogits], back: torch.Tensor, usage: Usage) -> LabelLogits:
    width = max(one.logits.shape[1] for one in found)
    padded = [
        torch.nn.functional.pad(one.logits, (0, width - one.logits.shape[1]), value=-torch.inf)
        for one in found
    ]
    back = back.to(padded[0].device)
    counts: list[int] = []
    for one in found:
        counts += one.counts or [one.logits.shape[1]] * len(one.logits)
    largest = [one.largest for one in found if one.largest is not None]
    return LabelLogits(
        torch.cat(padded)[back],
        torch.cat([one.normalizer for one in found])[back],
        usage,
        tuple(counts[i] for i in back.tolist()) if len(set(counts)) > 1 else None,
        torch.cat(largest)[back] if len(largest) == len(found) else None,
    )
