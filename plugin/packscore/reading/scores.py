"""From the options of a call to what is read of each request, and from that to scores."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from packscore.core import Activation, ScoringCore
from packscore.encoded import EncodedRequest
from packscore.errors import InputError, InputTypeError, NonFiniteScoreError
from packscore.flows.reads import HiddenRead, HiddenRows, LabelLogits, LabelRead, Read
from packscore.inputs import as_list, as_requests, short
from packscore.reading.prepared import Prepared, check_failed, run_all
from packscore.reading.readouts import Content, Hidden, Label, Readout, ScoreRequest, check_readout
from packscore.results import Flow, RankedDocument, ScoreResult, Usage
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
        gaps = tuple(i for i, row in enumerate(scores) if not all(map(math.isfinite, row)))
        for i in gaps:
            scores[i] = [float("nan")] * len(scores[i])
        return scores, replace(found.usage, non_finite_items=gaps)

    def scored(
        self,
        core: ScoringCore,
        found: Any,
        return_usage: bool,
        at: Callable[[int], Any] = lambda i: i,
        name: Callable[[Any], str] = "items[{}]".format,
    ) -> list[list[float]] | ScoreResult[list[list[float]]]:
        """The scores, with their usage where it is asked for.

        Args:
          core: of the scorer.
          found: what was read.
          return_usage: give a `ScoreResult`.
          at: from an item's number to its index for the caller.
          name: of such an index, for people.

        Raises:
          NonFiniteScoreError: some are not finite, and the scorer does not report them.
        """
        scores, usage = self.scores(core, found)
        result = ScoreResult(scores, usage) if return_usage else scores
        core.check_finite([at(i) for i in usage.non_finite_items], result, name)
        return result


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


def prepare_score(
    core: ScoringCore,
    query: Any,
    items: list[Any],
    *,
    item_first: bool = False,
    return_usage: bool = False,
    **options: Any,
) -> Prepared[Any]:
    """`score` of one query and its items, ready to run.

    Args:
      core: of the scorer.
      query: as it was given.
      items: as they were given, in a list.
      item_first: as in `score`.
      return_usage: as in `score`.
      options: of `reading_of`.

    Raises:
      InputError, InputTypeError: an argument cannot be scored.
    """
    names = ArgumentNames()
    reading = reading_of(core, len(items), **options)
    request = core.encode(query, items, names, reading.extra, item_first=item_first)
    return Prepared(
        request,
        reading.of(request, names),
        functools.partial(reading.scored, core, return_usage=return_usage),
    )


def prepare_rank(
    core: ScoringCore,
    query: Any,
    documents: list[Any],
    *,
    top_k: int | None = None,
    return_documents: bool = False,
    activation_fn: Activation | None = None,
    return_usage: bool = False,
) -> Prepared[Any]:
    """`rank` of one query and its documents, ready to run; see there.

    Raises:
      InputError, InputTypeError: an argument cannot be scored.
    """
    labels = core.head.for_ranking(core.default_labels, core.spec)
    names = ArgumentNames(item="documents[{}]".format)
    request = core.encode(query, documents, names, labels.num_extra_tokens)

    def finish(found: LabelLogits) -> list[RankedDocument] | ScoreResult[list[RankedDocument]]:
        scores, usage = core.activated(found, activation_fn), found.usage
        ranked: list[RankedDocument] = []
        for i in np.argsort(-scores, kind="stable")[:top_k].tolist():  # NaN comes last
            ranked.append({"corpus_id": i, "score": float(scores[i])})
            if return_documents:
                ranked[-1]["text"] = documents[i]
        gaps = usage.non_finite_items
        core.check_finite(gaps, ranked[: len(documents) - len(gaps)], "documents[{}]".format)
        return ScoreResult(ranked, usage) if return_usage else ranked

    return Prepared(request, LabelRead((labels,), False), finish)


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
    prepared: list[Prepared[Any] | Exception] = []
    for number, one in enumerate(_as_score_requests("requests", requests)):
        try:
            prepared.append(_prepared(core, number, one, defaults, return_usage))
        except (InputError, InputTypeError) as error:
            if not return_exceptions:
                raise
            prepared.append(error)
    total = sum(len(one.request.items) for one in prepared if isinstance(one, Prepared))
    results = run_all(core, prepared, flow=flow, progress=progress(total))
    if return_exceptions:
        return results
    gaps: list[tuple[int, int]] = []
    for number, result in enumerate(results):
        if isinstance(result, NonFiniteScoreError):
            gaps += result.indices
            results[number] = result.scores
    check_failed(results, "results")
    core.check_finite(gaps, results, _at)
    return results


def _at(index: tuple[int, int]) -> str:
    return f"requests[{index[0]}][1][{index[1]}]"


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
    core: ScoringCore,
    number: int,
    given: ScoreRequest,
    defaults: ScoreRequest,
    return_usage: bool,
) -> Prepared[Any]:
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
    finish = functools.partial(
        reading.scored, core, return_usage=return_usage, at=lambda i: (number, i), name=_at
    )
    return Prepared(request, reading.of(request, names), finish)
