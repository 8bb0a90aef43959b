"""What is read of a request's items: labels of one token or of several, or hidden states.

A label's tokens but the last run behind the item, as a *leaf*: all that several labels begin with
runs once, and each of its tokens is a row that is read. Nothing of this is new to attention.
*Nested*, every item continues the query that lies in pages, as the prefix of a group whose items
are its leaves: query, items and leaves are computed once. *Copied*, every leaf has a copy of its
item before it, and all are items of the query: where pages cannot hold the query, or few groups
fit into a launch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from packscore.encoded import EncodedRequest, Rows
from packscore.flows.engine import Readout, RowValues
from packscore.flows.jobs import RequestValues
from packscore.flows.packing import first_equal
from packscore.flows.page_pool import PrefixLease
from packscore.flows.planner import flow_taken
from packscore.flows.runner import Runner
from packscore.results import Flow, Usage, merge_usages
from packscore.text.labels import Labels
from packscore_kernels.hardware import cdiv


@dataclass(frozen=True)
class LabelRead:
    """The log-probability of labels behind every item.

    Args:
      labels: of all items, or one for each.
      over_vocabulary: normalise over the whole vocabulary instead of over an item's labels.
      is_mean: a label's tokens count by the mean of their log-probabilities, not by the sum.
    """

    labels: tuple[Labels, ...]
    over_vocabulary: bool
    is_mean: bool = False

    def of(self, item: int) -> Labels:
        """The labels of one item."""
        return self.labels[item if len(self.labels) > 1 else 0]

    @property
    def are_single(self) -> bool:
        """Whether every label is one token, read where its item ends."""
        return all(labels.are_single for labels in dict.fromkeys(self.labels))


@dataclass(frozen=True)
class HiddenRead:
    """Hidden states after the final norm.

    Args:
      rows: the tokens of each item whose states are read; None: its last one.
    """

    rows: tuple[Rows, ...] | None = None


Read = LabelRead | HiddenRead


@dataclass(frozen=True, eq=False)
class LabelLogits:
    """What scores are made of, in float32 and in the order of the items.

    Args:
      logits: [num_items, num_labels], -inf behind the labels of an item that has fewer.
      normalizer: [num_items]: log-sum-exp over the vocabulary or over the labels.
      usage: what it took.
      counts: how many labels each item has, where they differ.
      largest: [num_items]: the vocabulary's largest logit where items end; None where nobody looked
        over the vocabulary.
    """

    logits: torch.Tensor
    normalizer: torch.Tensor
    usage: Usage
    counts: tuple[int, ...] | None = None
    largest: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class HiddenRows:
    """Hidden states of every item, float32[num_rows, hidden_size] each."""

    hidden: tuple[torch.Tensor, ...]
    usage: Usage


class Head(Protocol):
    """What the model's head says of labels."""

    def to_compute(self, label_ids: list[int], over_vocabulary: bool) -> tuple[list[int], bool]:
        """Rows of the head to compute for these, and whether with the vocabulary's log-sum-exp."""
        ...

    def normalizer_of(
        self,
        chosen: torch.Tensor,
        computed: torch.Tensor,
        normalizer: torch.Tensor | None,
        over_vocabulary: bool,
    ) -> torch.Tensor:
        """What the logits of labels, `chosen` of those that were computed, are normalised by."""
        ...


def run_reads(
    runner: Runner,
    head: Head,
    requests: Sequence[EncodedRequest],
    reads: Sequence[Read],
    *,
    flow: Flow | None = None,
    lease: PrefixLease | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> list[LabelLogits | HiddenRows | Exception]:
    """`Runner.run` for requests that may each be read in another way, and what that gives.

    Labels of several tokens are nested or copied, whichever is predicted to cost less; a flow by
    name takes copies, which it can run.

    Args:
      runner: of the engine.
      head: of its model.
      requests: encoded queries and items.
      reads: of each request.
      flow: as in `Runner.run`.
      lease: as in `Runner.run`.
      progress: called with the number of items that were scored since.
    """
    readout = _readout_of(reads, head)
    results: dict[int, LabelLogits | HiddenRows | Exception] = {}
    waiting: dict[int, EncodedRequest] = {}
    for number, (request, read) in enumerate(zip(requests, reads, strict=True)):
        waiting[number] = _copied(request, read)
        if flow is None and _nesting_pays(runner, request, waiting[number], read, lease):
            found = _run_nested(runner, request, read, readout, lease)
            if found is not None:
                results[number] = _result(found, request, read, readout, head)
                del waiting[number]
                progress(len(request.items))
    if waiting:
        counts = (len(requests[number].items) for number in waiting)

        def requests_done(count: int) -> None:
            progress(sum(itertools.islice(counts, count)))

        ran = runner.run(
            list(waiting.values()), readout, flow=flow, lease=lease, progress=requests_done
        )
        for number, one in zip(waiting, ran, strict=True):
            results[number] = _result(one, requests[number], reads[number], readout, head)
    return [results[number] for number in range(len(requests))]


def _readout_of(reads: Sequence[Read], head: Head) -> Readout:
    """What serves all of them."""
    of_labels = [read for read in reads if isinstance(read, LabelRead)]
    sets = dict.fromkeys(labels for read in of_labels for labels in read.labels)
    ids = list(dict.fromkeys(i for labels in sets for i in labels.token_ids))
    over_vocabulary = any(read.over_vocabulary or not read.are_single for read in of_labels)
    if ids:
        ids, over_vocabulary = head.to_compute(ids, over_vocabulary)
    return Readout(tuple(ids), over_vocabulary, hidden=len(of_labels) < len(reads))


def _copied(request: EncodedRequest, read: Read) -> EncodedRequest:
    """The request whose items are what is read of its items, each with a copy of its own."""
    if isinstance(read, HiddenRead):
        return replace(request, rows=None if read.rows is None else list(read.rows))
    if read.are_single:
        return request
    items, rows = [], []
    for i, item in enumerate(request.items):
        for leaf, own in _leaves(read.of(i)):
            items.append(np.concatenate([item, leaf]))
            rows.append(len(item) + own)
    return replace(request, items=items, rows=rows)


def _leaves(labels: Labels) -> list[tuple[Rows, Rows]]:
    """The tokens of every leaf, and which are read; -1 is where the item ends."""
    return [
        (np.array(leaf, np.int64), np.array(lens, np.int64) - 1) for leaf, lens in labels.leaves
    ]


def _nesting_pays(
    runner: Runner,
    request: EncodedRequest,
    copied: EncodedRequest,
    read: Read,
    lease: PrefixLease | None,
) -> bool:
    """Whether pages can hold the query, and groups are predicted to cost less than copies."""
    if isinstance(read, HiddenRead) or read.are_single:
        return False
    if len(request.prefix) and lease is None and not runner.can_hold(request.prefix):
        return False
    nested_ms = _groups_ms(runner, request, read)
    if len(request.prefix) and lease is None:
        missing = len(request.prefix) - runner.cached_len(request.prefix)
        pairs = missing * (len(request.prefix) - missing / 2)
        nested_ms += runner.copies.costs.launch(missing, pairs) if missing else 0.0
    return nested_ms < runner.predicted(copied).chosen.cost_ms


def _groups_ms(runner: Runner, request: EncodedRequest, read: LabelRead) -> float:
    """Predicted milliseconds of a group for every item, behind a query that is in pages."""
    limits, pool = runner.copies.limits, runner.copies.first.pool
    kept = _distinct(request, read)[0]
    prefix_len, count = len(request.prefix), len(kept)
    own = np.array([len(request.items[i]) for i in kept])
    behind = np.array([sum(len(leaf) for leaf, _ in read.of(i).leaves) for i in kept])
    tokens = int(own.sum() + behind.sum())
    pairs = tokens * prefix_len + float((own * (own / 2 + behind)).sum())
    pages = cdiv(prefix_len, pool.page_size) if pool else 0
    at_once = min(
        limits.max_groups,
        limits.max_pages // max(pages, 1),
        limits.target_tokens * count // max(tokens, 1),
    )
    launches = cdiv(count, max(at_once, 1))
    return launches * runner.copies.costs.launch(cdiv(tokens, launches), pairs / launches)


def _distinct(request: EncodedRequest, read: LabelRead) -> tuple[list[int], list[int]]:
    """Items that differ in their tokens or their labels, and which of these each item is."""
    same = first_equal(request.items).tolist()
    seen: dict[tuple[int, Labels], int] = {}
    kept: list[int] = []
    which = []
    for i, first in enumerate(same):
        key = first, read.of(i)
        if key not in seen:
            seen[key] = len(kept)
            kept.append(i)
        which.append(seen[key])
    return kept, which


def _run_nested(
    runner: Runner,
    request: EncodedRequest,
    read: Read,
    readout: Readout,
    lease: PrefixLease | None,
) -> RequestValues | Exception | None:
    """One request, its query in pages; None where another thread has taken them."""
    assert isinstance(read, LabelRead)
    prefix, held, missing = request.prefix, lease, 0
    kept, which = _distinct(request, read)
    try:
        if len(prefix) and held is None:
            missing = len(prefix) - runner.cached_len(prefix)
            held = runner.hold(prefix, readout)
            if held is None:
                return None
        groups = []
        for i in kept:
            leaves, rows = zip(*_leaves(read.of(i)), strict=True)
            start = np.concatenate([prefix, request.items[i]])
            groups.append(EncodedRequest(start, list(leaves), rows=list(rows)))
        # without a query there is nothing to keep: items do not come again
        flow: Flow | None = None if len(prefix) else "packed"
        found = runner.run(groups, readout, flow=flow, lease=held)
    except Exception as error:
        return error
    finally:
        if held is not None and held is not lease:
            held.release()
    scored: list[RequestValues] = []
    for result in found:
        if isinstance(result, Exception):
            return result
        scored.append(result)
    whole = missing if runner.copies.whole_last else 0
    return _joined(request, read, groups, scored, which, missing, whole)


def _joined(
    request: EncodedRequest,
    read: LabelRead,
    groups: Sequence[EncodedRequest],
    scored: Sequence[RequestValues],
    which: Sequence[int],
    missing: int,
    whole: int,
) -> RequestValues:
    """The rows of all groups, and what they and the launch of `missing` query tokens computed.

    Of those `whole` ran through all of the last layer.
    """
    own = sum(
        len(group.prefix) - len(request.prefix) + sum(map(len, group.items)) for group in groups
    )
    usage = merge_usages([one.usage for one in scored], [() for _ in scored])
    computed = usage.computed_tokens + missing
    prompt_tokens = _copied(request, read).prompt_tokens
    was_whole = len(request.prefix) > 0 and not missing
    usage = replace(
        usage,
        prompt_tokens=prompt_tokens,
        computed_tokens=computed,
        computed_prefix_tokens=computed - own,
        prefix_tokens_saved=prompt_tokens - computed,
        last_layer_tokens=usage.last_layer_tokens + whole,
        truncated_items=tuple(request.truncated_items),
        special_token_items=tuple(request.special_token_items),
        cached_tokens=len(request.prefix) - missing,
        flow=flow_taken(
            "packed", num_launches=1 + bool(missing), was_whole=was_whole, is_shared=True
        ),
    )
    return RequestValues(RowValues.joined([scored[group].values for group in which]), usage)


def _result(
    found: RequestValues | Exception,
    request: EncodedRequest,
    read: Read,
    readout: Readout,
    head: Head,
) -> LabelLogits | HiddenRows | Exception:
    if isinstance(found, Exception):
        return found
    with torch.inference_mode():
        if isinstance(read, HiddenRead):
            return _hidden_rows(found, request, read)
        return _label_logits(found, read, readout, head)


def _hidden_rows(found: RequestValues, request: EncodedRequest, read: HiddenRead) -> HiddenRows:
    hidden = found.values.hidden
    assert hidden is not None  # it was asked for
    counts = [1] * len(request.items) if read.rows is None else [len(rows) for rows in read.rows]
    return HiddenRows(torch.split(hidden, counts), found.usage)


def _label_logits(
    found: RequestValues, read: LabelRead, readout: Readout, head: Head
) -> LabelLogits:
    column = {token: i for i, token in enumerate(readout.label_ids)}
    if len(set(read.labels)) == 1:
        (labels,) = set(read.labels)
        chosen, normalizer, largest = _of_labels(found.values, labels, read, column, head)
        return LabelLogits(chosen, normalizer, found.usage, None, largest)
    # items of one set of labels at a time
    counts = tuple(len(labels) for labels in read.labels)
    each = np.array([len(labels.contexts) for labels in read.labels], np.int64)
    ends = np.cumsum(each)
    values = found.values
    logits = values.logits.new_full((len(counts), max(counts)), -torch.inf)
    normalizer = values.logits.new_empty(len(counts))
    largest = None if values.largest is None else values.at(ends - each).largest
    of_labels: dict[Labels, list[int]] = {}
    for i, labels in enumerate(read.labels):
        of_labels.setdefault(labels, []).append(i)
    for labels, items in of_labels.items():
        rows = np.concatenate([np.arange(ends[i] - each[i], ends[i]) for i in items])
        own, normal, _ = _of_labels(values.at(rows), labels, read, column, head)
        logits[items, : len(labels)] = own
        normalizer[items] = normal
    return LabelLogits(logits, normalizer, found.usage, counts, largest)


def _of_labels(
    values: RowValues, labels: Labels, read: LabelRead, column: dict[int, int], head: Head
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Logits of labels, a row an item, what normalises them, and the vocabulary's largest."""
    columns = [column[token] for token in labels.token_ids]
    chosen = values.logits
    if columns != [*range(chosen.shape[1])]:
        chosen = chosen[:, columns]
    if labels.are_single:
        over = read.over_vocabulary
        normalizer = head.normalizer_of(chosen, values.logits, values.normalizer, over)
        return chosen, normalizer, values.largest
    assert values.normalizer is not None  # several tokens are read over the vocabulary
    each = len(labels.contexts)
    logits = chosen.view(-1, each, chosen.shape[-1])
    log_probs = labels.log_probs(logits, values.normalizer.view(-1, each), is_mean=read.is_mean)
    zero = torch.zeros_like(log_probs[:, 0])
    normalizer = zero if read.over_vocabulary else log_probs.logsumexp(-1)
    largest = None if values.largest is None else values.largest.view(-1, each)[:, 0]
    return log_probs, normalizer, largest
