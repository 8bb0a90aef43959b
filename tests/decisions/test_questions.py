"""Questions are read from two wire shapes into the same objects, and nothing malformed passes."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest

from packscore import InputError
from packscore.decisions.questions import Choice, Level, Noul, Score
from packscore.decisions.reading import read_decisions, read_questions
from packscore.decisions.texts import MAX_DEPTH
from packscore.errors import InputTypeError

HALF = "\ud83d"
DEEP: Any = "bottom"
for _ in range(MAX_DEPTH + 1):
    DEEP = [DEEP]
LOOP: list[Any] = []
LOOP.append(LOOP)


def noul(**fields: Any) -> dict[str, Any]:
    return {"type": "noul", "instructions": "Urgent?", **fields}


def choice(criteria: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "choice", "instructions": "Which?", "criteria": criteria, **fields}


def score(criteria: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "score", "instructions": "How?", "criteria": criteria, **fields}


def test_dicts_and_objects_are_the_same_questions() -> None:
    described = {"true": {"a": [1, None]}, "false": None}
    found = read_questions(
        {
            "a": noul(criteria=described),
            "b": choice({"x": "one", "y": None}),
            "c": score(["low", ["mid"], {"high": 1.5}]),
            "d": Noul("Urgent?"),
            "e": {"type": "noul", "criteria": {"true": "spam"}},
            "f": {"type": "choice", "criteria": {"only": None}},
            "": noul(),
        }
    )
    assert found == {
        "a": Noul("Urgent?", described),
        "b": Choice("Which?", {"x": "one", "y": None}),
        "c": Score("How?", ["low", ["mid"], {"high": 1.5}]),
        "d": Noul("Urgent?"),
        "e": Noul(None, {"true": "spam"}),
        "f": Choice(None, {"only": None}),
        "": Noul("Urgent?"),
    }
    assert list(found) == ["a", "b", "c", "d", "e", "f", ""]
    assert found["a"].options == [("yes", {"a": [1, None]}), ("no", None)]
    assert found["c"].options == [("low", None), (["mid"], None), ({"high": 1.5}, None)]


def test_a_question_is_its_own() -> None:
    criteria: dict[str | bool, Any] = {"x": ["one"]}
    question = Choice("Which?", criteria)
    criteria["x"].append("two")
    criteria["y"] = None
    assert question == Choice("Which?", {"x": ["one"]})
    assert question == pickle.loads(pickle.dumps(question)) == copy.deepcopy(question)
    with pytest.raises(AttributeError):
        question.instructions = "other"  # type: ignore[misc]
    assert repr(question) == "Choice('Which?', 1 option)"
    assert repr(Score(None, ["a", "b"])) == "Score(['a', 'b'], 2 levels)"
    assert repr(Noul("x" * 500)) == f"Noul({'x' * 40!r}... of 500 characters)"


def test_openais_shape_gives_the_same_objects() -> None:
    text = {"type": "input_text", "text": "It is"}
    found = read_decisions(
        [
            {"type": "predicate", "name": "p", "instructions": "It is urgent."},
            {"type": "predicate", "instructions": [text, {"type": "input_json", "data": {"a": 1}}]},
            {"type": "predicate", "instructions": [{"type": "input_json", "data": {"a": 1}}]},
            {
                "type": "choice",
                "name": "1",
                "instructions": "Which?",
                "choices": [{"value": True}, {"value": "true", "description": "the word"}],
            },
            {
                "type": "score",
                "instructions": "How?",
                "levels": [{"label": "low"}, {"label": "high", "description": "very"}],
            },
        ]
    )
    assert found == {
        "p": Noul("It is urgent."),
        1: Noul('It is\n{"a": 1}'),
        2: Noul({"a": 1}),
        "1": Choice("Which?", {True: None, "true": "the word"}),
        4: Score("How?", ["low", Level("high", "very")]),
    }
    assert found["1"].options == [(True, None), ("true", "the word")]
    assert found[4].options == [("low", None), ("high", "very")]


def test_limits_are_met_and_not_passed() -> None:
    most = {f"option {i}": None for i in range(255)}
    assert len(Choice(None, dict(most)).options) == 255
    assert len(Score(None, [*range(10)]).options) == 10
    assert len(Choice(None, {"one": None}).options) == len(Score(None, ["one"]).options) == 1


MALFORMED: dict[str, tuple[Any, str]] = {
    "no-map": ([noul()], r"questions=\[.* is a list; it must be a dict of id to question"),
    "none": ({}, r"questions=\{\} is empty; ask at least one"),
    "id": ({3: noul()}, r"questions has the id 3, which must be a string"),
    "id-half": ({HALF: noul()}, "half of a surrogate pair"),
    "text": ({"q": "Urgent?"}, r"questions\['q'\].type is missing: 'Urgent\?' is a str; pass Noul"),
    "no-type": ({"q": {"instructions": "x"}}, r"questions\['q'\].type=None must be one of 'noul'"),
    "type": ({"q": {"type": "bool"}}, r"\['q'\].type='bool' must be one of 'noul', 'choice', 's"),
    "type-list": ({"q": {"type": ["noul"]}}, r"type=\['noul'\] must be one of"),
    "box": ({"q": {"type": "box"}}, r"questions\['q'\].type='box' asks about a picture, and only"),
    "key": (
        {"q": noul(criterias={})},
        r"questions\['q'\].criterias={} is unknown; a noul has type",
    ),
    "key-int": ({"q": {**noul(), 3: 4}}, r"questions\['q'\].3=4 is unknown"),
    "assets": ({"q": noul(assets={})}, r"questions\['q'\].assets holds pictures, and only text"),
    "images": ({"q": noul(images=[])}, r"questions\['q'\].images holds pictures"),
    "asks-nothing": ({"q": {"type": "noul"}}, r"\['q'\].instructions=None and criteria=None ask n"),
    "asks-blanks": (
        {"q": noul(instructions=" \n")},
        r"instructions=' \\n' and criteria=None ask no",
    ),
    "asks-empty": (
        {"q": noul(instructions={}, criteria={"true": "", "false": None})},
        r"instructions=\{\} and criteria=.* ask nothing; a noul needs instructions, or",
    ),
    "noul-list": ({"q": noul(criteria=["x"])}, r"criteria=\['x'\] is a list; it must be a dict"),
    "noul-key": ({"q": noul(criteria={"yes": "x"})}, r"criteria has the key 'yes'; a noul has the"),
    "noul-bool": ({"q": noul(criteria={True: "x"})}, r"criteria has the key True; .* as strings"),
    "no-criteria": ({"q": {"type": "choice"}}, r"questions\['q'\].criteria is missing; a choice"),
    "null-criteria": ({"q": choice(None)}, r"criteria=None is a NoneType; it must be a dict such"),
    "list-criteria": (
        {"q": choice(["a", "b"])},
        r"criteria=\['a', 'b'\] is a list; it must be a d",
    ),
    "no-options": ({"q": choice({})}, r"questions\['q'\].criteria is empty; give at least one opt"),
    "256": (
        {"q": choice(dict.fromkeys(map(str, range(256))))},
        r"has 256 options and may have 255",
    ),
    "option-blank": ({"q": choice({" ": None})}, r"criteria has the option ' ', which is empty"),
    "option-int": ({"q": choice({1: None})}, r"criteria has the key 1; keys must be strings"),
    "option-half": ({"q": choice({HALF: None})}, r"criteria: the key .* half of a surrogate pair"),
    "option-composed": (
        {"q": choice({"caf\u00e9": None, "cafe\u0301": None})},
        r"criteria has the option .* twice \(also written 'caf\\xe9'\); each option must",
    ),
    "described-half": ({"q": choice({"a": HALF})}, r"\['q'\].criteria\['a'\] has half of a surro"),
    "described-set": (
        {"q": choice({"a": {1}})},
        r"criteria\['a'\]=\{1\} is a set; it must be text",
    ),
    "levels-map": (
        {"q": score({"a": None})},
        r"criteria={'a': None} is a dict; a score has a list",
    ),
    "levels-text": ({"q": score("ab")}, r"criteria='ab' is a str; a score has a list of levels"),
    "no-levels": ({"q": score([])}, r"criteria is empty; give at least one level"),
    "11-levels": ({"q": score([*"abcdefghijk"])}, r"has 11 levels and may have 10; split the que"),
    "level-null": (
        {"q": score(["a", None])},
        r"criteria\[1\]=None is empty; say what the level is",
    ),
    "level-twice": ({"q": score(["a", "b", "a"])}, r"criteria has the level 'a' twice; each level"),
    "nan": (
        {"q": noul(instructions={"x": math.nan})},
        r"instructions\['x'\]=nan is no JSON number",
    ),
    "infinity": ({"q": score([1.0, math.inf])}, r"criteria\[1\]=inf is no JSON number"),
    "huge": ({"q": noul(instructions=10**5000)}, r"instructions is an int of too many digits"),
    "bytes": ({"q": noul(instructions=b"x")}, r"instructions=b'x' is a bytes; it must be text or"),
    "half": ({"q": noul(instructions=["a", HALF])}, r"instructions\[1\] has half of a surrogate"),
    "key-1": ({"q": noul(instructions={1: "a"})}, r"instructions has the key 1; keys must be str"),
    "deep": ({"q": noul(instructions=DEEP)}, r"is nested more than 64 deep"),
    "loop": ({"q": noul(instructions=LOOP)}, r"is nested more than 64 deep \(does it hold itself"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_question_is_refused_by_name(case: str) -> None:
    questions, message = MALFORMED[case]
    with pytest.raises((InputError, InputTypeError), match=message):
        read_questions(questions)


def decision(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "instructions": "Which?", **fields}


BAD_DECISIONS: dict[str, tuple[Any, str]] = {
    "map": ({"q": decision("predicate")}, r"questions=.* is a dict, which has keys"),
    "none": ([], r"questions=\[\] is empty"),
    "text": (["x"], r"questions\[0\].type is missing: 'x' is a str"),
    "noul": (
        [decision("noul")],
        r"\[0\].type='noul' must be one of 'predicate', 'choice', 'score'",
    ),
    "key": ([decision("predicate", criteria={})], r"questions\[0\].criteria={} is unknown"),
    "name": ([decision("predicate", name=3)], r"questions\[0\].name=3 must be a string, or be lef"),
    "names": ([decision("predicate", name="a")] * 2, r"questions\[1\].name='a' is another questio"),
    "unasked": ([{"type": "predicate"}], r"questions\[0\].instructions is missing; a predicate"),
    "unsaid": (
        [decision("predicate", instructions="")],
        r"\[0\].instructions='' and .* ask nothing",
    ),
    "no-choices": ([decision("choice")], r"questions\[0\].choices is missing; a choice needs it"),
    "empty": (
        [decision("choice", choices=[])],
        r"\[0\].choices is empty; give at least one option",
    ),
    "value": (
        [decision("choice", choices=[{"value": 1}])],
        r"choices\[0\].value=1 must be a strin",
    ),
    "no-value": (
        [decision("choice", choices=[{}])],
        r"choices\[0\]=\{\} must be a dict that has 'va",
    ),
    "twice": (
        [decision("choice", choices=[{"value": "a"}] * 2)],
        r"choices has the option 'a' twi",
    ),
    "trues": ([decision("choice", choices=[{"value": True}] * 2)], r"the option True twice"),
    "more": (
        [decision("choice", choices=[{"value": "a", "id": 1}])],
        r"choices\[0\] has the key 'i",
    ),
    "said": (
        [decision("choice", choices=[{"value": "a", "description": 3}])],
        r"choices\[0\].description=3 must be a string",
    ),
    "many": (
        [decision("choice", choices=[{"value": str(i)} for i in range(256)])],
        r"questions\[0\].choices has 256 options and may have 255",
    ),
    "levels": (
        [decision("score", levels=[{"label": True}])],
        r"levels\[0\].label=True must be a s",
    ),
    "blank": ([decision("score", levels=[{"label": ""}])], r"levels\[0\]='' is empty; say what"),
    "11": ([decision("score", levels=[{"label": x} for x in "abcdefghijk"])], r"has 11 levels"),
    "image": (
        [decision("predicate", instructions=[{"type": "input_image", "image_url": "x"}])],
        r"questions\[0\].instructions\[0\] is a picture, and only text can be read; describe it",
    ),
    "part": ([decision("predicate", instructions=["x"])], r"instructions\[0\]='x' must be {'type'"),
    "part-type": (
        [decision("predicate", instructions=[{"type": []}])],
        r"instructions\[0\]={'type'",
    ),
    "part-text": (
        [decision("predicate", instructions=[{"type": "input_text", "text": 3}])],
        r"instructions\[0\].text=3 must be a string",
    ),
    "part-nan": (
        [decision("predicate", instructions=[{"type": "input_json", "data": [math.nan]}])],
        r"instructions\[0\].data\[0\]=nan is no JSON number",
    ),
}


@pytest.mark.parametrize("case", BAD_DECISIONS)
def test_a_malformed_decision_is_refused_by_name(case: str) -> None:
    questions, message = BAD_DECISIONS[case]
    with pytest.raises((InputError, InputTypeError), match=message):
        read_decisions(questions)
