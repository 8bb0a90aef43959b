"""What the commands make of one record: its tokens, and the fields of its result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from packscore import Decision, EncodedRequest, MultiItemScorer, Usage
from packscore.files.records import Record
from packscore.files.states import StateRecord
from packscore.results import Flow

# By name, so that a record's scores do not depend on those scored before it: a resumed run writes
# the bytes of an unbroken one.
FLOW: Flow = "packed"


@dataclass(frozen=True)
class Task:
    """A command on one record of the kind that it reads.

    Args:
      run: to the fields of its result, and the tokens it took.
      encode: to the tokens that `run` would compute.
      counted, shared: what records have several of, and what they have once.
      at_once: records that run at the same time: one on each copy of the model.
    """

    run: Callable[[Any], tuple[dict[str, Any], Usage]]
    encode: Callable[[Any], EncodedRequest]
    counted: str = "items"
    shared: str = "queries"
    at_once: int = 1


def score_task(scorer: MultiItemScorer, *, apply_softmax: bool, return_items: bool) -> Task:
    """`scores`: P(label) for every item and label."""

    def run(record: Record) -> tuple[dict[str, Any], Usage]:
        found = scorer.score(
            record.query,
            record.items,
            apply_softmax=apply_softmax,
            flow=FLOW,
            return_usage=True,
        )
        result: dict[str, Any] = {"items": record.items} if return_items else {}
        if record.ids is not None:
            result["item_ids"] = record.ids
        return result | {"scores": [list(map(_or_null, row)) for row in found.scores]}, found.usage

    return Task(run, _encoder(scorer), at_once=scorer.num_copies)


def rank_task(scorer: MultiItemScorer, *, top_k: int | None, return_documents: bool) -> Task:
    """`ranking`: documents by their score, best first."""

    def run(record: Record) -> tuple[dict[str, Any], Usage]:
        found = scorer.rank(
            record.query,
            record.items,
            top_k=top_k,
            return_documents=return_documents,
            flow=FLOW,
            return_usage=True,
        )
        return {"ranking": [_entry(record, one) for one in found.scores]}, found.usage

    return Task(run, _encoder(scorer), at_once=scorer.num_copies)


def _entry(record: Record, one: Mapping[str, Any]) -> dict[str, Any]:
    i = one["corpus_id"]
    known = {"corpus_id": i} if record.ids is None else {"corpus_id": i, "id": record.ids[i]}
    return {**known, **one, "score": _or_null(one["score"])}


def _or_null(score: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(score) else score


def _encoder(scorer: MultiItemScorer) -> Callable[[Record], EncodedRequest]:
    return lambda record: scorer.encode(record.query, record.items)


def decide_task(scorer: MultiItemScorer, *, permutations: int, body: str) -> Task:
    """The body of a decision, in one of `BODIES`."""

    def run(record: StateRecord) -> tuple[dict[str, Any], Usage]:
        found = scorer.decide(record.state, record.questions, permutations=permutations, flow=FLOW)
        return BODIES[body](found), found.usage

    def encode(record: StateRecord) -> EncodedRequest:
        return scorer.encode_questions(record.state, record.questions, permutations=permutations)

    return Task(run, encode, "questions", "states", scorer.num_copies)


BODIES: dict[str, Callable[[Decision], dict[str, Any]]] = {
    "systemone": Decision.to_systemone,
    "decisions": Decision.to_decisions,
}
TASKS: dict[str, Callable[..., Task]] = {
    "score": score_task,
    "rank": rank_task,
    "decide": decide_task,
}
