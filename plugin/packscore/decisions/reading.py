"""Questions as clients send them: System One's map of questions, and OpenAI's list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from packscore.decisions.questions import (
    Choice,
    Level,
    Noul,
    Question,
    Score,
    check_levels,
    check_options,
)
from packscore.decisions.texts import Json, checked_json, text_of
from packscore.errors import InputError, InputTypeError
from packscore.inputs import as_list, is_text, short

TYPES: dict[str, Callable[[Any, Any], Question]] = {"noul": Noul, "choice": Choice, "score": Score}
PICTURES = frozenset({"assets", "images", "image", "input_image", "box"})
# An unnamed question goes by its place, an int, which no name is.
QuestionId = str | int


def read_questions(questions: Any) -> dict[str, Question]:
    """Questions by their ids: Noul, Choice, Score, or dicts with their fields and a "type".

    Raises:
      InputTypeError, InputError: one is malformed; the message names its id, the field, the value.
    """
    if not isinstance(questions, Mapping):
        raise InputTypeError(
            f"questions={short(questions)} is a {type(questions).__name__}; it must be a dict of "
            "id to question"
        )
    if not questions:
        raise InputError("questions={} is empty; ask at least one")
    found = {}
    for name, question in questions.items():
        if not isinstance(name, str):
            raise InputTypeError(f"questions has the id {short(name)}, which must be a string")
        is_text(f"questions: the id {short(name)}", name)
        found[name] = _inside(f"questions[{name!r}]", _question, question)
    return found


def read_decisions(questions: Any) -> dict[QuestionId, Question]:
    """Questions in the shape of OpenAI's decisions: a list of predicate, choice and score.

    Returns:
      The same objects as `read_questions` gives, by name; an unnamed one by its place in the list.

    Raises:
      InputTypeError, InputError: one is malformed; the message names its place, the field, the
        value.
    """
    found: dict[QuestionId, Question] = {}
    for i, question in enumerate(as_list("questions", questions)):
        name = _inside(f"questions[{i}]", _name, question)
        if name in found:
            raise InputError(f"questions[{i}].name={name!r} is another question's; name it else")
        found[i if name is None else name] = _inside(f"questions[{i}]", _decision, question)
    return found


def _inside(where: str, read: Callable[[Any], Any], value: Any) -> Any:
    """What `read` makes of a value; its errors begin with the field, and say where it is."""
    try:
        return read(value)
    except (InputError, InputTypeError) as error:
        raise type(error)(f"{where}.{error}") from None


def _question(value: Any) -> Question:
    if isinstance(value, Noul | Choice | Score):
        return value
    if not isinstance(value, Mapping):
        raise InputTypeError(
            f"type is missing: {short(value)} is a {type(value).__name__}; pass Noul, Choice, "
            'Score, or a dict such as {"type": "noul", "instructions": "Is it urgent?"}'
        )
    kind = _type_of(value, TYPES)
    _check_keys(value, kind, ("instructions", "criteria"))
    if "criteria" not in value and kind != "noul":
        raise InputError(f"criteria is missing; a {kind} needs it")
    return TYPES[kind](value.get("instructions"), value.get("criteria"))


def _name(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        raise InputTypeError(
            f"type is missing: {short(value)} is a {type(value).__name__}; pass a dict such as "
            '{"type": "predicate", "instructions": "It is urgent."}'
        )
    name = value.get("name")
    if name is not None and not isinstance(name, str):
        raise InputTypeError(f"name={short(name)} must be a string, or be left out")
    return None if name is None else str(checked_json("name", name))


def _decision(value: Mapping[str, Any]) -> Question:
    kind = _type_of(value, ("predicate", "choice", "score"))
    options = {"predicate": (), "choice": ("choices",), "score": ("levels",)}[kind]
    _check_keys(value, kind, ("name", "instructions", *options))
    for field in ("instructions", *options):
        if field not in value:
            raise InputError(f"{field} is missing; a {kind} needs it")
    instructions = _read_parts(value["instructions"])
    if kind == "predicate":
        return Noul(instructions)
    if kind == "choice":
        return Choice(instructions, _read_choices(value["choices"]))
    return Score(instructions, _read_levels(value["levels"]))


def _read_choices(choices: Any) -> dict[str | bool, Json]:
    found = _read_options("choices", choices, "value")
    for i, (option, _) in enumerate(found):
        if not isinstance(option, str | bool):
            raise InputTypeError(f"choices[{i}].value={short(option)} must be a string or a bool")
    check_options("choices", [option for option, _ in found])
    return dict(found)


def _read_levels(levels: Any) -> list[Json | Level]:
    found = _read_options("levels", levels, "label")
    for i, (label, _) in enumerate(found):
        if not isinstance(label, str):
            raise InputTypeError(f"levels[{i}].label={short(label)} must be a string")
    check_levels("levels", [label for label, _ in found])
    return [label if text is None else Level(label, text) for label, text in found]


def _read_options(field: str, options: Any, key: str) -> list[tuple[Any, str | None]]:
    """(what it is called, its description or None) of each entry."""
    found = []
    for i, option in enumerate(as_list(field, options, may_be_empty=True)):
        where = f"{field}[{i}]"
        if not isinstance(option, Mapping) or key not in option:
            raise InputTypeError(f"{where}={short(option)} must be a dict that has {key!r}")
        for other in option:
            if other not in (key, "description"):
                raise InputError(f"{where} has the key {short(other)}; only description may be too")
        description = option.get("description")
        if description is not None and not isinstance(description, str):
            raise InputTypeError(f"{where}.description={short(description)} must be a string")
        found.append((option[key], checked_json(f"{where}.description", description)))
    return found


def _read_parts(instructions: Any) -> Json:
    """Instructions as one value: a string, or parts of text and JSON, a line each."""
    if isinstance(instructions, str):
        return instructions
    values = []
    for i, part in enumerate(as_list("instructions", instructions)):
        where = f"instructions[{i}]"
        kind = str(part.get("type")) if isinstance(part, Mapping) else ""
        key = {"input_text": "text", "input_json": "data"}.get(kind)
        if kind in PICTURES:
            raise InputError(f"{where} is a picture, and only text can be read; describe it")
        if key is None or set(part) != {"type", key}:
            raise InputError(
                f"{where}={short(part)} must be {{'type': 'input_text', 'text': ...}} or "
                "{'type': 'input_json', 'data': ...}"
            )
        if key == "text" and not isinstance(part[key], str):
            raise InputTypeError(f"{where}.text={short(part[key])} must be a string")
        values.append(checked_json(f"{where}.{key}", part[key]))
    return values[0] if len(values) == 1 else "\n".join(map(text_of, values))


def _type_of(question: Mapping[str, Any], types: Any) -> str:
    kind = question.get("type")
    if isinstance(kind, str) and kind in PICTURES:
        raise InputError(f"type={kind!r} asks about a picture, and only text can be read")
    if not isinstance(kind, str) or kind not in types:
        raise InputError(f"type={short(kind)} must be one of {', '.join(map(repr, types))}")
    return kind


def _check_keys(question: Mapping[str, Any], kind: str, allowed: tuple[str, ...]) -> None:
    for key in question:
        if key in PICTURES:
            raise InputError(f"{key} holds pictures, and only text can be read; leave it out")
        if key != "type" and key not in allowed:
            raise InputError(
                f"{key}={short(question[key])} is unknown; a {kind} has type, {', '.join(allowed)}"
            )
