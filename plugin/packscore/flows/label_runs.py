"""Labels of several tokens: their contexts run behind every item, as sub-items that share it.

Nothing here is new to attention. *Nested*, every item continues the query that lies in pages, as
the prefix of a group whose items are the contexts: query, items and contexts are computed once.
*Copied*, every context has a copy of its item before it, and all are items of the query: where
pages cannot hold the query, or few groups fit into a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from packscore.encoded import EncodedRequest, TokenIds
from packscore.flows.engine import Readout
from packscore.flows.jobs import LabelLogits
from packscore.flows.packing import first_equal
from packscore.flows.page_pool import PrefixLease
from packscore.flows.planner import flow_taken
from packscore.flows.runner import Runner
from packscore.results import Flow, merge_usages
from packscore.text.labels import Labels
from packscore_kernels.hardware import cdiv


def run_labels(
    runner: Runner,
    requests: Sequence[EncodedRequest],
    labels: Labels,
    *,
    over_vocabulary: bool,
    flow: Flow | None = None,
    lease: PrefixLease | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> list[LabelLogits | Exception]:
    """`Runner.run` for labels of several tokens; a flow by name takes copies, which it can run.

    Returns:
      For each request the labels' log-probabilities as its logits, with the normaliser 0 or, over
      the labels, their log-sum-exp; or the error that only it met.
    """
    each = len(labels.contexts)
    contexts = [np.array(context, np.int64) for context in labels.contexts]

    def items_done(count: int) -> None:
        progress(count // each)

    results: dict[int, LabelLogits | Exception] = {}
    copied: dict[int, EncodedRequest] = {}
    for number, request in enumerate(requests):
        copied[number] = _copied(request, contexts)
        if flow is None and _nesting_pays(runner, request, copied[number], contexts, lease):
            found = _run_nested(runner, request, contexts, labels, lease, items_done)
            if found is not None:
                results[number] = found
                del copied[number]
    if copied:
        ran = runner.run(
            list(copied.values()), _readout(labels), flow=flow, lease=lease, progress=items_done
        )
        results.update(zip(copied, ran, strict=True))
    return [_read(results[number], labels, over_vocabulary) for number in range(len(requests))]


def _readout(labels: Labels) -> Readout:
    """The tokens of all labels, whose probabilities behind each context multiply."""
    return Readout(tuple(labels.token_ids), over_vocabulary=True)


def _copied(request: EncodedRequest, contexts: Sequence[TokenIds]) -> EncodedRequest:
    items = [np.concatenate([item, context]) for item in request.items for context in contexts]
    return replace(request, items=items)


def _nesting_pays(
    runner: Runner,
    request: EncodedRequest,
    copied: EncodedRequest,
    contexts: Sequence[TokenIds],
    lease: PrefixLease | None,
) -> bool:
    """Whether pages can hold the query, and groups are predicted to cost less than copies."""
    if len(request.prefix) and lease is None and not runner.can_hold(request.prefix):
        return False
    nested_ms = _groups_ms(runner, request, contexts)
    if len(request.prefix) and lease is None:
        missing = len(request.prefix) - runner.cached_len(request.prefix)
        pairs = missing * (len(request.prefix) - missing), missing**2 / 2
        nested_ms += runner.engine.costs.launch(missing, *pairs) if missing else 0.0
    return nested_ms < runner.predicted(copied).chosen.cost_ms


def _groups_ms(runner: Runner, request: EncodedRequest, contexts: Sequence[TokenIds]) -> float:
    """Predicted milliseconds of a group for every item, behind a query that is in pages."""
    limits, pool = runner.engine.limits, runner.engine.pool
    distinct = np.unique(first_equal(request.items))
    prefix_len, count = len(request.prefix), len(distinct)
    own = np.array([len(request.items[i]) for i in distinct])
    behind = np.array([len(context) for context in contexts])
    tokens = int(own.sum()) + count * int(behind.sum())
    pairs = tokens * prefix_len + float((own * (own / 2 + behind.sum())).sum())
    pages = cdiv(prefix_len, pool.page_size) if pool else 0
    at_once = min(
        limits.max_groups,
        limits.max_pages // max(pages, 1),
        limits.target_tokens * count // max(tokens, 1),
    )
    launches = cdiv(count, max(at_once, 1))
    return launches * runner.engine.costs.launch(cdiv(tokens, launches), pairs / launches)


def _run_nested(
    runner: Runner,
    request: EncodedRequest,
    contexts: Sequence[TokenIds],
    labels: Labels,
    lease: PrefixLease | None,
    progress: Callable[[int], object],
) -> LabelLogits | Exception | None:
    """One request, its query in pages; None where another thread has taken them."""
    prefix, held, missing = request.prefix, lease, 0
    try:
        if len(prefix) and held is None:
            missing = len(prefix) - runner.cached_len(prefix)
            held = runner.hold(prefix, _readout(labels))
            if held is None:
                return None
        groups = [
            EncodedRequest(np.concatenate([prefix, request.items[i]]), list(contexts))
            for i in np.unique(first_equal(request.items))
        ]
        # without a query there is nothing to keep: items do not come again
        flow: Flow | None = None if len(prefix) else "packed"
        found = runner.run(groups, _readout(labels), flow=flow, lease=held, progress=progress)
    except Exception as error:
        return error
    finally:
        if held is not None and held is not lease:
            held.release()
    scored: list[LabelLogits] = []
    for result in found:
        if isinstance(result, Exception):
            return result
        scored.append(result)
    whole = missing if runner.engine.whole_last else 0
    return _joined(request, contexts, scored, missing, whole)


def _joined(
    request: EncodedRequest,
    contexts: Sequence[TokenIds],
    scored: Sequence[LabelLogits],
    missing: int,
    whole: int,
) -> LabelLogits:
    """The rows of all groups, and what they and the launch of `missing` query tokens computed.

    Of those `whole` ran through all of the last layer.
    """
    distinct, group_of = np.unique(first_equal(request.items), return_inverse=True)
    own = sum(len(request.items[i]) for i in distinct) + len(distinct) * sum(map(len, contexts))
    usage = merge_usages([one.usage for one in scored], [() for _ in scored])
    computed = usage.computed_tokens + missing
    prompt_tokens = _copied(request, contexts).prompt_tokens
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
        flow=flow_taken(
            "packed", num_launches=1 + bool(missing), was_whole=was_whole, is_shared=True
        ),
    )
    each = [scored[group] for group in group_of]
    logits, normalizer = (
        torch.cat([getattr(one, name) for one in each]) for name in ("logits", "normalizer")
    )
    return LabelLogits(logits, normalizer, usage)


def _read(
    found: LabelLogits | Exception, labels: Labels, over_vocabulary: bool
) -> LabelLogits | Exception:
    if isinstance(found, Exception):
        return found
    with torch.inference_mode():
        each = len(labels.contexts)
        logits = found.logits.view(-1, each, found.logits.shape[-1])
        log_probs = labels.log_probs(logits, found.normalizer.view(-1, each))
        zero = torch.zeros_like(log_probs[:, 0])
        normalizer = zero if over_vocabulary else log_probs.logsumexp(-1)
    return replace(found, logits=log_probs, normalizer=normalizer)
