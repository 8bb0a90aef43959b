"""A request in parts, so that others run between them, and what was read put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from packscore.encoded import EncodedRequest
from packscore.flows.packing import first_equal
from packscore.flows.reads import HiddenRead, HiddenRows, LabelLogits, Read
from packscore.results import Usage, merge_usages

Items = npt.NDArray[np.int64]


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
    where = {item: i for i, item in enumerate(chosen)}

    def listed(indices: Sequence[int]) -> list[int]:
        return [where[i] for i in indices if i in where]

    part = replace(
        request,
        items=[request.items[i] for i in chosen],
        truncated_items=listed(request.truncated_items),
        special_token_items=listed(request.special_token_items),
        rows=None if request.rows is None else [request.rows[i] for i in chosen],
    )
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
    usage = _usage(request, parts, [one.usage for one in found])
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


def _usage(request: EncodedRequest, parts: Sequence[Items], usages: Sequence[Usage]) -> Usage:
    """What all parts took; prefix tokens that were in pages count once, as if none ran between."""
    merged = merge_usages(usages, [part.tolist() for part in parts])
    is_read = merged.cached_tokens > 0
    missing = len(request.prefix) - merged.computed_prefix_tokens
    first = usages[0].flow
    flow = merged.flow if first in ("extend", "plain") else "chunked"
    return replace(merged, cached_tokens=max(missing, 0) if is_read else 0, flow=flow)
