"""What an exchange says, in one form for all endpoints, and what the scorer says by itself."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from packscore import MultiItemScorer
from packscore.decisions.answers import Answer, ChoiceAnswer, NoulAnswer
from packscore.decisions.reading import read_decisions

# (place of the document, score), best first
Ranks = list[tuple[int, float]]
# by the question's name: the probability of each option, and the confidence where there is one
Answers = dict[str, tuple[dict[str, float], float | None]]


def packed(headers: dict[str, str], body: Any) -> bytes:
    """A body as it travels under these headers."""
    text = json.dumps(body).encode()
    return zstd.compress(text) if headers.get("content-encoding") == "zstd" else text


def unpacked(headers: dict[str, str], body: bytes) -> Any:
    """And back; None of an empty one."""
    text = zstd.decompress(body) if headers.get("content-encoding") == "zstd" else body
    return json.loads(text) if text else None


def in_process(scorer: MultiItemScorer, path: str, body: dict[str, Any], state: Any) -> Any:
    """What a request asks for, without a server.

    Args:
      scorer: of the model that it names.
      path: that it went to.
      body: that it had.
      state: of a decision, as the call's author says that its input is to be read.
    """
    if path.endswith("rerank"):
        given = body["texts"] if "texts" in body else body["documents"]
        texts = [one if isinstance(one, str) else one["text"] for one in given]
        ranked = scorer.rank(body["query"], texts, top_k=body.get("top_n"))
        return [(one["corpus_id"], one["score"]) for one in ranked]
    named: Any = body["questions"]
    decision = scorer.decide(state, read_decisions(named) if isinstance(named, list) else named)
    return {str(name): _answer(answer) for name, answer in decision.answers.items()}


def _answer(answer: Answer) -> tuple[dict[str, float], float | None]:
    if isinstance(answer, NoulAnswer):
        return {"yes": answer.noul, "no": 1 - answer.noul}, None
    if isinstance(answer, ChoiceAnswer):
        return {str(option): p for option, p in answer.probabilities.items()}, answer.confidence
    return dict(answer.probabilities), answer.confidence


def read(path: str, answer: Any) -> Any:
    """What a response says, by the keys that clients read."""
    if path == "/v1/systemone":
        return {name: _systemone(one) for name, one in answer["answers"].items()}
    if path == "/v1/decisions":
        return {one["name"]: _decision(one) for one in answer["answers"]}
    if isinstance(answer, list):
        return [(one["index"], one["score"]) for one in answer]
    return [(one["index"], one["relevance_score"]) for one in answer["results"]]


def _systemone(one: dict[str, Any]) -> tuple[dict[str, float], float | None]:
    if one["type"] == "noul":
        return {"yes": one["noul"], "no": 1 - one["noul"]}, None
    return one["probabilities"], one["confidence"]


def _decision(one: dict[str, Any]) -> tuple[dict[str, float], float | None]:
    if one["type"] == "predicate":
        return {"yes": one["probability"], "no": 1 - one["probability"]}, None
    return {str(x["value"]): x["probability"] for x in one["probabilities"]}, one["confidence"]


def furthest(found: Any, expected: Any) -> float:
    """How far two forms are apart at most; infinitely where one has what the other lacks."""
    if isinstance(expected, list):
        if [place for place, _ in found] != [place for place, _ in expected]:
            return math.inf
        return max(abs(x - y) for (_, x), (_, y) in zip(found, expected, strict=True))
    if found.keys() != expected.keys():
        return math.inf
    apart = [0.0]
    for name, (probabilities, confidence) in expected.items():
        here, sure = found[name]
        if here.keys() != probabilities.keys() or (sure is None) != (confidence is None):
            return math.inf
        apart += [abs(here[option] - p) for option, p in probabilities.items()]
        apart.append(abs((sure or 0.0) - (confidence or 0.0)))
    return max(apart)
