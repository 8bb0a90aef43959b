"""From the options of a call to what is read of each request, and from that to scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from packscore.core import ScoringCore
from packscore.encoded import EncodedRequest
from packscore.errors import InputError, InputTypeError, ScoringError
from packscore.flows.reads import HiddenRead, HiddenRows, LabelLogits, LabelRead, Read
from packscore.inputs import as_list, as_requests, short
from packscore.reading.readouts import Content, Hidden, Label, Readout, ScoreRequest, check_readout
from packscore.results import Flow, ScoreResult, Usage
from packscore.text.encoding import ArgumentNames
from packscore.text.labels import LabelIds, Labels


@dataclass(frozen=True)
class Reading:
    """What is read of one request.

    Args:
      readout: how.
      labels: of all items, or one for each; none where hidden states are read.
      over_vocabulary: what labels are normalised over.
    """

    readout: Readout
    labels: tuple[Labels, ...]
    over_vocabulary: bool

    @property
    def extra(self) -> int:
        """Tokens that run behind an item."""
        return max((labels.num_extra_tokens for labels in self.labels), default=0)

    def of(self, request: EncodedRequest, names: ArgumentNames) -> Read:
        """What the engine reads of the request.

        Raises:
          InputError, InputTypeError: the readout's rows are none of an item's.
        """
        if isinstance(self.readout, Hidden):
            return HiddenRead(self.readout.rows_of(request, names.item))
        is_mean = isinstance(self.readout, Content) and self.readout.reduce == "mean"
        return LabelRead(self.labels, self.over_vocabulary, is_mean)

    def scores(self, core: ScoringCore, found: Any) -> tuple[list[list[float]], Usage]:
        """Numbers of every item, NaN where they are not finite, which the usage then lists."""
        if isinstance(found, LabelLogits):
            return core.probabilities(found), found.usage
        assert isinstance(found, HiddenRows)
        assert isinstance(self.readout, Hidden)
        scores = self.readout.scores(found.hidden)
        gaps = tuple(
            i for i, row in enumerate(scores) if not bool(torch.isfinite(torch.tensor(row)).all())
        )
        for i in gaps:
            scores[i] = [float("nan")] * len(scores[i])
        return scores, replace(found.usage, non_finite_items=gaps)

    def scored(
        self, core: ScoringCore, found: Any, return_usage: bool
    ) -> list[list[float]] | ScoreResult[list[list[float]]]:
        """The scores, with their usage where it is asked for.

        Raises:
          NonFiniteScoreError: some are not finite, and the scorer does not report them.
        """
        scores, usage = self.scores(core, found)
        core.check_finite(usage.non_finite_items, scores, "items[{}]".format)
        return ScoreResult(scores, usage) if return_usage else scores


def reading_of(
    core: ScoringCore,
    num_items: int,
    *,
    labels: Sequence[str] | None,
    label_token_ids: LabelIds | None,
    item_labels: Sequence[Sequence[str]] | None = None,
    item_label_token_ids: Sequence[LabelIds] | None = None,
    apply_softmax: bool = False,
    readout: Readout | None = None,
) -> Reading:
    """What the options of `score` say.

    Raises:
      InputError, InputTypeError: they contradict each other, or labels cannot be scored.
    """
    readout = Label() if readout is None else readout
    check_readout("readout", readout)
    given = {
        "labels": labels,
        "label_token_ids": label_token_ids,
        "item_labels": item_labels,
        "item_label_token_ids": item_label_token_ids,
    }
    named = [name for name, value in given.items() if value is not None]
    if isinstance(readout, Hidden):
        if named or apply_softmax:
            raise InputError(
                f"{(named or ['apply_softmax'])[0]} has no meaning beside readout=Hidden(...), "
                "whose head gives the scores; pass one of them"
            )
        return Reading(readout, (), over_vocabulary=False)
    if len(named) > 1:
        raise InputError(f"{named[0]} and {named[1]} are two ways to say one thing; pass one")
    is_mean = isinstance(readout, Content) and readout.reduce == "mean"
    options = {"over_vocabulary": not apply_softmax or is_mean}
    if item_labels is None and item_label_token_ids is None:
        sets = (core.labels(labels, label_token_ids, **options),)
        return Reading(readout, sets, not apply_softmax)
    (name,) = named
    given_each: Any = given[name]
    each = as_list(name, given_each, may_be_empty=True)
    if len(each) != num_items:
        raise InputError(
            f"{name} has {len(each)} entries for {num_items} items; it must have one for each"
        )
    known: dict[str, Labels] = {}
    found = []
    for i, own in enumerate(each):
        key = repr(own)
        if key not in known:
            try:
                texts, ids = (own, None) if name == "item_labels" else (None, own)
                if own is None:
                    raise InputTypeError("None must be a list of labels")
                known[key] = core.labels(texts, ids, **options)
            except (InputError, InputTypeError) as error:
                raise type(error)(f"{name}[{i}]: {error}") from None
        found.append(known[key])
    return Reading(readout, tuple(found), not apply_softmax)


@dataclass(frozen=True)
class Prepared:
    """A request that is ready to run."""

    request: EncodedRequest
    reading: Reading
    read: Read


def score_requests(
    core: ScoringCore,
    requests: Iterable[Any],
    defaults: ScoreRequest,
    *,
    flow: Flow | None,
    return_usage: bool,
    return_exceptions: bool,
    progress: Callable[[int], Callable[[int], object]],
) -> list[Any]:
    """`MultiItemScorer.score_many`; see there.

    Args:
      core: of the scorer.
      requests: as they were given.
      defaults: options of those that have none of their own.
      flow: of all.
      return_usage: give a `ScoreResult` each.
      return_exceptions: give errors in the place of results.
      progress: from the number of items to what is called with those that were scored since.
    """
    found = _as_score_requests("requests", requests)
    prepared: list[Prepared | Exception] = []
    for number, one in enumerate(found):
        try:
            prepared.append(_prepared(core, number, one, defaults))
        except (InputError, InputTypeError) as error:
            if not return_exceptions:
                raise
            prepared.append(error)
    ready = [one for one in prepared if isinstance(one, Prepared)]
    total = sum(len(one.request.items) for one in ready)
    ran = iter(
        core.run(
            [one.request for one in ready],
            [one.read for one in ready],
            flow=flow,
            progress=progress(total),
        )
    )
    results: list[Any] = []
    gaps: list[tuple[int, int]] = []
    for number, entry in enumerate(prepared):
        result = entry if isinstance(entry, Exception) else next(ran)
        if isinstance(entry, Prepared) and not isinstance(result, Exception):
            try:
                scores, usage = entry.reading.scores(core, result)
                own = [(number, k) for k in usage.non_finite_items]
                result = ScoreResult(scores, usage) if return_usage else scores
                if return_exceptions:
                    core.check_finite(own, result, "requests[{0[0]}][1][{0[1]}]".format)
                gaps += own
            except Exception as failure:  # whatever a head of the user's raises
                result = failure
        results.append(result)
    if return_exceptions:
        return results
    failed = [(i, e) for i, e in enumerate(results) if isinstance(e, Exception)]
    results = [None if isinstance(result, Exception) else result for result in results]
    if failed:
        first, cause = failed[0]
        raise ScoringError(
            f"{len(failed)} of {len(found)} requests failed, the first is requests[{first}] "
            f"({cause}); the results of the others are in this error's .scores",
            results,
        ) from cause
    core.check_finite(gaps, results, "requests[{0[0]}][1][{0[1]}]".format)
    return results


def _as_score_requests(name: str, values: Iterable[Any]) -> list[ScoreRequest]:
    found = as_list(name, values, may_be_empty=True)
    pairs = [one for one in found if not isinstance(one, ScoreRequest)]
    if len(pairs) == len(found):
        return [ScoreRequest(*pair) for pair in as_requests(name, found)]
    each = []
    for i, one in enumerate(found):
        if not isinstance(one, ScoreRequest):
            try:
                (pair,) = as_requests(name, [one])
            except InputTypeError:
                told = f"{name}[{i}]={short(one)} must be (query, items) or a ScoreRequest"
                raise InputTypeError(told) from None
            one = ScoreRequest(*pair)
        each.append(one)
    return each


def _prepared(
    core: ScoringCore, number: int, given: ScoreRequest, defaults: ScoreRequest
) -> Prepared:
    items = as_list(f"requests[{number}][1]", given.items, may_be_empty=True)
    has_labels = any(
        getattr(given, name) is not None
        for name in ("labels", "label_token_ids", "item_labels", "item_label_token_ids")
    )
    readout = given.readout or defaults.readout
    # a head of one's own reads no labels, those of the call neither
    labelled = given if has_labels or isinstance(given.readout, Hidden) else defaults
    softmax = defaults.apply_softmax if given.apply_softmax is None else given.apply_softmax
    names = ArgumentNames(f"requests[{number}][0]", lambda i: f"requests[{number}][1][{i}]")
    try:
        reading = reading_of(
            core,
            len(items),
            labels=labelled.labels,
            label_token_ids=labelled.label_token_ids,
            item_labels=labelled.item_labels,
            item_label_token_ids=labelled.item_label_token_ids,
            apply_softmax=bool(softmax) and not isinstance(given.readout, Hidden),
            readout=readout,
        )
    except (InputError, InputTypeError) as error:
        if given is not labelled and given.readout is None:
            raise
        raise type(error)(f"requests[{number}]: {error}") from None
    request = core.encode(given.query, items, names, reading.extra)
    return Prepared(request, reading, reading.of(request, names))
