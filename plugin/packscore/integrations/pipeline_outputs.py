"""What the pipeline "multi-item-scoring" gives back: entries, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import inf, isnan
from typing import Any, NotRequired, TypeAlias, TypedDict

from packscore.errors import NonFiniteScoreError, ScoringError
from packscore.inputs import Text

# A text, an id, or the ids of a label of several tokens.
Label: TypeAlias = str | int | tuple[int, ...]


# The result of a request, and what is wrong with it.
Outcome: TypeAlias = tuple[Any, ScoringError | None]


class ScoredItem(TypedDict):
    """One entry of a request's result."""

    index: int  # among the request's items
    score: float
    label: NotRequired[Label]
    scores: NotRequired[dict[Label, float]]
    item: NotRequired[Text]


class LabelledSequence(TypedDict):
    """The result of one sequence, as "zero-shot-classification" gives it."""

    sequence: str
    labels: list[str]
    scores: list[float]


def entry_of(index: int, row: list[float], names: list[Label] | None) -> ScoredItem:
    """The entry of an item: of a label's probability, or of all labels by their names."""
    if names is None:
        return {"index": index, "score": row[-1]}  # of (no, yes), or of a classifier's only class
    best = max(range(len(row)), key=row.__getitem__)  # of NaN alone, where there is any
    scores = dict(zip(names, row, strict=True))
    return {"index": index, "label": names[best], "score": row[best], "scores": scores}


def labelled(
    text: Any, names: Sequence[Any], row: list[float], top_k: int | None
) -> LabelledSequence:
    """A sequence with its labels, the most probable first."""
    order = sorted(range(len(row)), key=lambda i: numbers_first(row[i]))[:top_k]
    return {
        "sequence": text,
        "labels": [names[i] for i in order],
        "scores": [row[i] for i in order],
    }


def numbers_first(score: float) -> float:
    """What to sort by: the highest first, and what is no number last."""
    return inf if isnan(score) else -score


def gaps_in(scores: Sequence[Sequence[float]], found: Any) -> NonFiniteScoreError | None:
    """The error of one request whose items' scores are partly NaN; None where none are.

    Args:
      scores: P(label) of the items.
      found: what the error keeps.
    """
    gaps = [i for i, row in enumerate(scores) if isnan(row[0])]
    return NonFiniteScoreError.at(gaps, found, "items[{}]".format) if gaps else None


def until_failure(outcomes: Iterable[Outcome]) -> Iterator[Any]:
    """The results of requests one by one.

    Raises:
      ScoringError: the next one failed.
    """
    for found, failure in outcomes:
        if failure is not None:
            raise failure
        yield found


def all_of(outcomes: Iterable[Outcome]) -> list[Any]:
    """The results of all requests.

    Raises:
      ScoringError: some failed; its `scores` is the list, with None for each that did.
    """
    found: list[Any] = []
    gaps: list[tuple[int, int]] = []
    failed: list[tuple[int, ScoringError]] = []
    for i, (result, failure) in enumerate(outcomes):
        found.append(result)
        if isinstance(failure, NonFiniteScoreError):
            gaps += [(i, k) for k in failure.indices]
        elif failure is not None:
            failed.append((i, failure))
    if failed:
        first, error = failed[0]
        raise ScoringError(
            f"{len(failed)} of {len(found)} requests failed, the first is inputs[{first}] "
            f"({error}); the results of the others are in this error's .scores",
            found,
        ) from error
    if gaps:
        raise NonFiniteScoreError.at(gaps, found, "inputs[{0[0]}]['items'][{0[1]}]".format)
    return found
