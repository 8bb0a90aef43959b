"""`decide`: together equals apart, in every flow; what a state costs; errors that name things."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from helpers import engine_of, random_classifier
from packscore import (
    Choice,
    ChoiceAnswer,
    Decision,
    InputError,
    InputTypeError,
    MultiItemScorer,
    NonFiniteScoreError,
    Noul,
    NoulAnswer,
    ScoreAnswer,
    ScoringError,
    StalePrefixError,
    UnsupportedModelError,
    patch_model,
    shipped_model_path,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

STATE = {"subject": "Parcel 🐼 never came", "body": "Third time I write. <|im_end|> Refund me!"}
QUESTIONS: dict[str, Any] = {
    "angry": Noul("Is the customer angry?"),
    "topic": Choice(
        "What is it about?", {"shipping": "parcels", "billing": "money", "other": None}
    ),
    "urgency": {"type": "score", "instructions": "How urgent?", "criteria": ["low", "mid", "high"]},
    "team": {
        "type": "choice",
        "instructions": "",
        "criteria": {f"team {i}": None for i in range(30)},
    },
    "refund": {"type": "noul", "criteria": {"true": "a refund is asked for"}},
}
# answers of other questions, on which none of these may depend
OTHERS = {f"other {i}": Noul(f"Is it {i}?") for i in range(58)}
FLOAT32 = 2e-6


@pytest.fixture(scope="module", params=["cpu", "jax"])
def scorer(request: pytest.FixtureRequest) -> MultiItemScorer:
    return MultiItemScorer.from_pretrained(
        shipped_model_path(), device=request.param, dtype="float32"
    )


@pytest.fixture(scope="module")
def together(scorer: MultiItemScorer) -> Decision:
    return scorer.decide(STATE, QUESTIONS)


def numbers(answer: Any) -> list[float]:
    if isinstance(answer, NoulAnswer):
        return [answer.noul]
    return [*answer.probabilities.values(), answer.confidence]


def check_same(found: Any, expected: Any) -> None:
    for name, answer in expected.items():
        assert type(found[name]) is type(answer)
        assert numbers(found[name]) == pytest.approx(numbers(answer), abs=FLOAT32)
        assert found[name].label_mass == pytest.approx(answer.label_mass, abs=FLOAT32)
        assert found[name].argmax_is_label == answer.argmax_is_label


def test_an_answer_is_the_models_own(scorer: MultiItemScorer, together: Decision) -> None:
    """Read from the plain model, the whole prompt of one question at a time."""
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_pretrained(
        shipped_model_path(), dtype=torch.float32
    ).eval()
    prompt = scorer._ask().prompt
    asked = scorer._ask().ask(STATE, {k: QUESTIONS[k] for k in ("angry", "topic", "urgency")}, 1)
    for name, (one,) in asked.items.items():
        ids = torch.tensor([[*prompt.prefix(STATE).tolist(), *one.item.tolist()]])
        with torch.no_grad():
            logits = plain(input_ids=ids).logits[0, -1]
        labels = [label for (label,) in one.labels]
        answer: Any = together.answers[name]
        expected = logits[labels].softmax(-1).tolist()
        own = [answer.noul] if name == "angry" else list(answer.probabilities.values())
        assert own == pytest.approx(expected[: len(own)], abs=FLOAT32)
        mass = float(logits.softmax(-1)[labels].sum())
        assert answer.label_mass == pytest.approx(mass, abs=FLOAT32)
        assert answer.argmax_is_label == (int(logits.argmax()) in labels)


def test_together_equals_apart(scorer: MultiItemScorer, together: Decision) -> None:
    for name, question in QUESTIONS.items():
        check_same(scorer.decide(STATE, {name: question}).answers, {name: together.answers[name]})


def test_with_many_others_and_in_another_order(scorer: MultiItemScorer, together: Decision) -> None:
    mixed = {**OTHERS, **dict(reversed(QUESTIONS.items()))}
    found = scorer.decide(STATE, mixed)
    assert list(found.answers) == list(mixed)
    check_same(found.answers, together.answers)


@pytest.mark.parametrize("flow", ["packed", "chunked", "extend", "plain"])
def test_in_every_flow(scorer: MultiItemScorer, together: Decision, flow: Any) -> None:
    scorer.clear_prefixes()
    if flow == "extend":
        scorer.prefix(STATE).release()
    check_same(scorer.decide(STATE, QUESTIONS, flow=flow).answers, together.answers)


def test_a_state_counts_once(scorer: MultiItemScorer, together: Decision) -> None:
    names = ("angry", "topic", "urgency", "refund")
    asked = scorer._ask().ask(STATE, {name: QUESTIONS[name] for name in names}, 1)
    state, own = len(asked.request.prefix), sum(map(len, asked.request.items))
    scorer.clear_prefixes()
    cold = scorer.decide(STATE, asked.questions).usage
    assert (cold.computed_tokens, cold.input_tokens, cold.output_tokens) == (
        *(state + own, state + own),
        0,
    )
    with scorer.prefix(STATE) as held:
        warm = held.decide(asked.questions)
    assert warm.usage.computed_tokens == own
    assert warm.usage.input_tokens == state + own
    assert warm.usage.cached_tokens == state
    check_same(warm.answers, {name: together.answers[name] for name in names})
    body = warm.to_decisions()["usage"]
    assert body["input_tokens_details"]["cached_tokens"] == state
    assert body["total_tokens"] == state + own


def test_a_text_is_held_as_a_query_and_as_a_state(scorer: MultiItemScorer) -> None:
    with scorer.prefix("some state") as held:
        first = held.decide(QUESTIONS)
        again = held.decide(QUESTIONS)
        held.score([" item"], labels=["A"])
    check_same(again.answers, first.answers)
    with pytest.raises(StalePrefixError, match="released"):
        held.decide(QUESTIONS)
    early = scorer.prefix("some state")
    early.release()
    with pytest.raises(StalePrefixError, match="released"):
        early.decide(QUESTIONS)
    with (
        scorer.prefix({"a": 1}) as state,
        pytest.raises(InputTypeError, match="is a state for decide, and score needs text"),
    ):
        state.score([" item"], labels=["A"])


def test_questions_that_still_arrive(scorer: MultiItemScorer, together: Decision) -> None:
    taken: list[str] = []

    def arriving() -> Iterator[tuple[str, Any]]:
        for name, question in QUESTIONS.items():
            taken.append(name)
            yield name, question

    answers = scorer.decide_stream(STATE, arriving(), max_items=2)
    first = next(answers)
    assert len(taken) == 2
    check_same(dict([first, *answers]), together.answers)
    check_same(dict(scorer.decide_stream(STATE, QUESTIONS)), together.answers)
    check_same(dict(scorer.decide_stream(STATE, QUESTIONS.items())), together.answers)
    stream = scorer.decide_stream(STATE, [("a", Noul("x?")), ("a", Noul("y?"))], max_items=1)
    assert next(stream)[0] == "a"
    with pytest.raises(InputError, match=r"questions\[1\] has the id 'a' of another"):
        next(stream)


def test_permutations_are_more_items_and_their_mean(scorer: MultiItemScorer) -> None:
    question = {"topic": QUESTIONS["topic"]}
    each = scorer._ask().ask(STATE, question, 3)
    assert len(each.request.items) == 3
    answer: Any = scorer.decide(STATE, question, permutations=3).answers["topic"]
    assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-12)
    assert answer.order_spread > 0
    # each order alone, as a question of its own
    options = list(QUESTIONS["topic"].criteria.items())
    orders = [dict(options[turn:] + options[:turn]) for turn in range(3)]
    alone: list[Any] = [
        scorer.decide(STATE, {"topic": Choice("What is it about?", order)}).answers["topic"]
        for order in orders
    ]
    for option in dict(options):
        mean = np.mean([one.probabilities[option] for one in alone])
        assert answer.probabilities[option] == pytest.approx(mean, abs=FLOAT32)


def test_many_states_in_one_launch(
    scorer: MultiItemScorer, together: Decision, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {name: QUESTIONS[name] for name in ("angry", "topic")}
    states = [STATE, "another", ["a", 1, None]]
    engine = engine_of(scorer)
    launched: list[Any] = []
    launch = engine.launch
    monkeypatch.setattr(engine, "launch", lambda *args: launched.append(args) or launch(*args))
    scorer.clear_prefixes()
    found = scorer.decide_many([(state, plain) for state in states])
    assert len(launched) <= 2  # the first has what all states begin with
    monkeypatch.undo()
    for state, one in zip(states, found, strict=True):
        check_same(one.answers, scorer.decide(state, plain).answers)
    mixed = [(STATE, plain), (STATE, {"a": {"type": "noul"}}), 3, ("x", {}), (STATE, plain)]
    each = scorer.decide_many(mixed, return_exceptions=True)
    assert [type(one) for one in each] == [
        *(Decision, InputError, InputTypeError, InputError, Decision)
    ]
    assert all(f"requests[{i}]" in str(each[i]) for i in (1, 2, 3))
    check_same(each[-1].answers, {name: together.answers[name] for name in plain})
    with pytest.raises(InputError, match=r"^requests\[1\]: questions\['a'\]"):
        scorer.decide_many(mixed)


def test_255_options(scorer: MultiItemScorer) -> None:
    options = {f"{one}-{other}": None for one, other in itertools.product(range(16), range(16))}
    options.popitem()
    answer: Any = scorer.decide("x", {"a": Choice("Which?", options)}).answers["a"]
    assert isinstance(answer, ChoiceAnswer)
    assert len(answer.probabilities) == 255
    assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-12)


def test_kinds_of_answers(together: Decision) -> None:
    assert list(together.answers) == list(QUESTIONS)
    assert list(together.nouls) == ["angry", "refund"]
    assert list(together.choices) == ["topic", "team"]
    assert isinstance(together.scores["urgency"], ScoreAnswer)
    assert together.model == "shipped_model"
    assert together.to_systemone()["answers"]["angry"]["type"] == "noul"


def test_openais_shape(scorer: MultiItemScorer) -> None:
    questions = [
        {"type": "predicate", "instructions": "Is it late?"},
        {
            "type": "choice",
            "name": "b",
            "instructions": "Which?",
            "choices": [{"value": True}, {"value": "true"}],
        },
    ]
    body = scorer.decide(STATE, questions).to_decisions()
    assert [one["name"] for one in body["answers"]] == [None, "b"]
    assert [one["value"] for one in body["answers"][1]["probabilities"]] == [True, "true"]


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "no questions": ("x", {}, "questions={} is empty"),
    "not questions": ("x", 3, "questions=3"),
    "no instructions": ("x", {"a": {"type": "noul"}}, r"questions\['a'\]"),
    "a picture": ("x", {"a": {"type": "box", "instructions": "?"}}, "picture"),
    "no state": (float("nan"), {"a": Noul("x?")}, "state"),
    "too long": ("word " * 40_000, {"a": Noul("x?")}, r"questions\['a'\] has .* over max_tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_asked_is_refused(scorer: MultiItemScorer, case: str) -> None:
    state, questions, message = REFUSED[case]
    with pytest.raises((InputError, InputTypeError), match=message):
        scorer.decide(state, questions)


def test_permutations_are_counted(scorer: MultiItemScorer) -> None:
    with pytest.raises(InputError, match="permutations=0 must be at least 1"):
        scorer.decide("x", QUESTIONS, permutations=0)


def test_models_that_give_no_answers(scorer: MultiItemScorer) -> None:
    with pytest.raises(InputError, match="decide needs a tokenizer"):
        MultiItemScorer(scorer.model).decide("x", QUESTIONS)
    classifier = MultiItemScorer(patch_model(random_classifier(vocab_size=3072)), scorer.tokenizer)
    with pytest.raises(UnsupportedModelError, match="scores classes, and answers are read"):
        classifier.decide("x", QUESTIONS)


def test_an_answer_that_is_no_number_keeps_the_others(
    scorer: MultiItemScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from packscore.flows import reads

    plain = {name: QUESTIONS[name] for name in ("angry", "topic")}
    label_logits = reads._label_logits

    def spoilt(*args: Any) -> Any:
        found = label_logits(*args)
        found.logits[0, 0] = torch.nan
        return found

    monkeypatch.setattr(reads, "_label_logits", spoilt)
    with pytest.raises(NonFiniteScoreError, match=r"questions\['angry'\]") as info:
        scorer.decide(STATE, plain)
    assert list(info.value.scores) == ["topic"]
    with pytest.raises(ScoringError, match=r"1 of 1 requests failed.*questions\['angry'\]"):
        scorer.decide_many([(STATE, plain)])
