"""Numbers of labels become typed answers, by TypeSafe's formulas, in both wire shapes."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packscore import InputError
from packscore.decisions.answers import (
    ChoiceAnswer,
    Decision,
    NoulAnswer,
    Rotation,
    ScoreAnswer,
    answer_of,
)
from packscore.decisions.confidence import choice_confidence, score_confidence
from packscore.decisions.questions import Choice, Level, Noul, Question, Score
from packscore.errors import InputTypeError
from packscore.results import Usage

USAGE = Usage(
    prompt_tokens=230,
    computed_tokens=130,
    computed_prefix_tokens=100,
    prefix_tokens_saved=100,
    padding_tokens=6,
    truncated_items=(),
    special_token_items=(),
    flow="packed",
    mask_impl="segment",
)


def logs(*probabilities: float) -> tuple[float, ...]:
    return tuple(math.log(p) if p else -math.inf for p in probabilities)


@pytest.mark.parametrize(
    ("probabilities", "choice", "score"),
    [
        ([1.0], 1, 1),
        ([0.5, 0.5], 0, 0),
        ([1.0, 0.0], 1, 1),
        # (2 * .75 - 1) / 1; 1 - .25 / .5
        ([0.75, 0.25], 0.5, 0.5),
        # (3 * .95 - 1) / 2; mean|i - 1| = 2/3, 1 - .05 * 3/2
        ([0.0, 0.95, 0.05], 0.925, 0.925),
        # (3 * .5 - 1) / 2; the mode is 0: E|i| = .2 + .6 = .8 > 2/3
        ([0.5, 0.2, 0.3], 0.25, 0),
        # (4 * .4 - 1) / 3; the mode is 1: E = .1 + .3 + .4 = .8, mean|i - 1.5| = 1
        ([0.1, 0.4, 0.3, 0.2], 0.2, 0.2),
        # of two modes the first: E|i - 0| = 2 * .5, mean = 2/3
        ([0.5, 0.0, 0.5], 0.25, 0),
    ],
)
def test_confidence_is_typesafes(probabilities: list[float], choice: float, score: float) -> None:
    assert choice_confidence(probabilities) == pytest.approx(choice, abs=1e-12)
    assert score_confidence(probabilities) == pytest.approx(score, abs=1e-12)


def test_a_noul_is_the_share_of_yes() -> None:
    # yes .6 and no .2 of the vocabulary: .75 of what they have together
    found = answer_of(Noul("?"), [Rotation(logs(0.6, 0.2), 0.8, True)])
    assert found == NoulAnswer(noul=pytest.approx(0.75), label_mass=0.8, argmax_is_label=True)
    assert found.order_spread is None
    assert repr(found) == "NoulAnswer(noul=0.75, label_mass=0.8, argmax_is_label=True)"


def test_a_choice_averages_each_option_over_the_orders() -> None:
    question = Choice("?", {"x": None, True: None})
    found = answer_of(
        question,
        [Rotation(logs(0.9, 0.1), 1.0, True), Rotation(logs(0.25, 0.25), 0.5, False)],
    )
    assert isinstance(found, ChoiceAnswer)
    assert found.choice == "x"
    # (.9 + .5) / 2 and (.1 + .5) / 2; the spread is .9 - .5
    assert found.probabilities == {"x": pytest.approx(0.7), True: pytest.approx(0.3)}
    assert found.confidence == pytest.approx(0.4)
    assert found.order_spread == pytest.approx(0.4)
    assert (found.label_mass, found.argmax_is_label) == (0.75, False)
    assert repr(found) == (
        "ChoiceAnswer(choice='x' of 2, probability=0.7, confidence=0.4, label_mass=0.75, "
        "argmax_is_label=False, order_spread=0.4)"
    )


def test_a_score_is_the_mean_of_the_levels_numbers() -> None:
    question = Score("?", ["low", ["mid"], Level("high", "very")])
    found = answer_of(question, [Rotation(logs(0.0, 0.95, 0.05))])
    assert found == ScoreAnswer(
        score=pytest.approx(1.05),
        probabilities={"0": 0.0, "1": pytest.approx(0.95), "2": pytest.approx(0.05)},
        confidence=pytest.approx(0.925),
        legend={"0": "low", "1": ["mid"], "2": Level("high", "very")},
    )
    assert (found.label_mass, found.argmax_is_label, found.order_spread) == (None, None, None)
    assert repr(found) == "ScoreAnswer(score=1.05 of 0 to 2, confidence=0.925)"


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 12).flatmap(
        lambda n: st.lists(
            st.lists(st.floats(-800, 0), min_size=n, max_size=n), min_size=1, max_size=4
        )
    )
)
def test_probabilities_sum_to_one_and_agree_with_the_answer(rows: list[list[float]]) -> None:
    question = Choice("?", {f"option {i}": None for i in range(len(rows[0]))})
    found = answer_of(question, [Rotation(row) for row in rows])
    assert isinstance(found, ChoiceAnswer)
    assert math.fsum(found.probabilities.values()) == pytest.approx(1, abs=1e-14)
    assert found.probabilities[found.choice] == max(found.probabilities.values())
    assert 0 <= found.confidence <= 1
    # only differences count
    shifted = [Rotation([x - 5 for x in row]) for row in rows]
    assert answer_of(question, shifted).probabilities == pytest.approx(found.probabilities)


@pytest.mark.parametrize("question", [Noul("?"), Choice("?", {"a": None, "b": None})])
@pytest.mark.parametrize(
    "log_probs", [(math.nan, 0.0), (math.inf, 0.0), (-math.inf, -math.inf), (0.0,), (0.0, 0, 0)]
)
def test_numbers_that_are_no_log_probabilities_are_refused(
    question: Question, log_probs: Any
) -> None:
    with pytest.raises(InputError, match="log_probs"):
        answer_of(question, [Rotation(log_probs)])


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [
        (NoulAnswer(noul=0.2), "answer.noul > 0.5"),
        (ChoiceAnswer(choice="a", probabilities={"a": 1}, confidence=1), "answer.choice == 'a'"),
        (ScoreAnswer(score=0, probabilities={}, confidence=1, legend={}), "answer.score > 1"),
    ],
)
def test_an_answer_has_no_truth_value(answer: Any, remedy: str) -> None:
    """`if decision.nouls["spam"]:` would always hold."""
    with pytest.raises(InputTypeError, match=rf"has no truth value, .*, as in {remedy}"):
        bool(answer)
    assert pickle.loads(pickle.dumps(answer)) == answer


def test_a_decision_in_both_shapes() -> None:
    decision = Decision(
        answers={
            "urgent": answer_of(Noul("?"), [Rotation(logs(0.6, 0.2), 0.8, True)]),
            1: answer_of(Choice("?", {"x": None, True: None}), [Rotation(logs(0.5, 0.5))]),
            "how": answer_of(Score("?", ["a", Level("b", "c")]), [Rotation(logs(0.0, 1.0))]),
        },
        usage=USAGE,
        model="tiny",
    )
    assert list(decision.nouls) == ["urgent"]
    assert list(decision.choices) == [1]
    assert list(decision.scores) == ["how"]
    assert (USAGE.input_tokens, USAGE.output_tokens) == (130, 0)
    noul = decision.nouls["urgent"].noul
    assert decision.to_systemone() == {
        "model": "tiny",
        "answers": {
            "urgent": {"type": "noul", "noul": noul},
            "1": {
                "type": "choice",
                "choice": "x",
                "confidence": 0,
                "probabilities": {"x": 0.5, "true": 0.5},
            },
            "how": {
                "type": "score",
                "score": 1,
                "confidence": 1,
                "legend": {"0": "a", "1": {"label": "b", "description": "c"}},
                "probabilities": {"0": 0, "1": 1},
            },
        },
        "usage": {"input_tokens": 130, "output_tokens": 0},
        "diagnostics": {
            "urgent": {"label_mass": 0.8, "argmax_is_label": True, "order_spread": None},
            "1": {"label_mass": None, "argmax_is_label": None, "order_spread": None},
            "how": {"label_mass": None, "argmax_is_label": None, "order_spread": None},
        },
    }
    assert decision.to_decisions() == {
        "model": "tiny",
        "answers": [
            {"type": "predicate", "name": "urgent", "probability": noul},
            {
                "type": "choice",
                "name": None,
                "choice": "x",
                "confidence": 0,
                "probabilities": [
                    {"value": "x", "probability": 0.5},
                    {"value": True, "probability": 0.5},
                ],
            },
            {
                "type": "score",
                "name": "how",
                "score": 1,
                "confidence": 1,
                "probabilities": [
                    {"value": 0, "label": "a", "probability": 0},
                    {"value": 1, "label": "b", "probability": 1},
                ],
            },
        ],
        "usage": {
            "input_tokens": 130,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 130,
        },
    }
    for body in (decision.to_systemone(), decision.to_decisions()):
        assert json.loads(json.dumps(body, allow_nan=False)) == body
    assert repr(decision).startswith("Decision(3 answers of 'tiny', usage=Usage(130 of 230 tokens")


def test_what_system_one_cannot_say_is_refused() -> None:
    both = answer_of(Choice("?", {True: None, "true": None}), [Rotation(logs(0.9, 0.1))])
    decision = Decision({"q": both}, USAGE, "tiny")
    with pytest.raises(InputError, match=r"which System One cannot say; use to_decisions\(\)"):
        decision.to_systemone()
    assert decision.to_decisions()["answers"][0]["choice"] is True
    noul = NoulAnswer(noul=0.5)
    with pytest.raises(InputError, match="an id is the place of an unnamed question"):
        Decision({"0": noul, 0: noul}, USAGE, "tiny").to_systemone()
