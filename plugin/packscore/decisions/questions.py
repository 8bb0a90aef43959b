"""The three kinds of questions, in System One's words."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from packscore.decisions.texts import Json, check_key, checked_json, is_blank, json_of
from packscore.errors import InputError, InputTypeError
from packscore.inputs import short
from packscore.telling import counted, cut, telling

MAX_OPTIONS, MAX_LEVELS = 255, 10
# A noul's options: the first is what its answer is the probability of.
YES, NO = "yes", "no"
# (what it is called, its description or None)
Option: TypeAlias = tuple[Json, Json]


@dataclass(frozen=True)
class Noul:
    """A question that yes or no answers.

    Args:
      instructions: what is asked, text or JSON; may be None where criteria say it.
      criteria: what counts as a yes under "true", as a no under "false": text or JSON, or None.

    Raises:
      InputError, InputTypeError: they are malformed, or say nothing.
    """

    instructions: Json
    criteria: dict[str, Json] | None = None
    type: ClassVar[str] = "noul"

    def __post_init__(self) -> None:
        criteria = self.criteria
        if criteria is not None:
            _check_mapping("criteria", criteria, '{"true": "what counts as a yes"}')
            for key in criteria:
                if key not in ("true", "false") or not isinstance(key, str):
                    raise InputError(
                        f"criteria has the key {short(key)}; a noul has the criteria 'true' and "
                        "'false', as strings"
                    )
            _set(self, criteria=_described("criteria", criteria))
        _set(self, instructions=checked_json("instructions", self.instructions))
        if is_blank(self.instructions) and all(is_blank(x) for x in (criteria or {}).values()):
            raise InputError(
                f"instructions={short(self.instructions)} and criteria={short(criteria)} ask "
                "nothing; a noul needs instructions, or a description of a yes or a no"
            )

    @telling
    def __repr__(self) -> str:
        return _told(self)

    @property
    def options(self) -> list[Option]:
        """(name, description) of its answers: yes, no."""
        described = self.criteria or {}
        return [(YES, described.get("true")), (NO, described.get("false"))]


@dataclass(frozen=True)
class Choice:
    """A question that one of up to 255 options answers.

    Args:
      instructions: what is asked, text or JSON; None asks which option fits the state best.
      criteria: option -> its description, text or JSON, or None. An option is a string, or a bool,
        which is another option than the string that spells it.

    Raises:
      InputError, InputTypeError: they are malformed.
    """

    instructions: Json
    criteria: dict[str | bool, Json]
    type: ClassVar[str] = "choice"

    def __post_init__(self) -> None:
        _set(self, instructions=checked_json("instructions", self.instructions))
        _check_mapping("criteria", self.criteria, '{"option": "its description", "other": None}')
        check_options("criteria", self.criteria)
        _set(self, criteria=_described("criteria", self.criteria))

    @telling
    def __repr__(self) -> str:
        return f"{_told(self)}, {counted(len(self.criteria), 'option')}"

    @property
    def options(self) -> list[Option]:
        """(option, description), in the order of the criteria."""
        return list(self.criteria.items())


@dataclass(frozen=True)
class Level:
    """A level of a score that has a label beside its description."""

    label: str
    description: Json = None

    def __post_init__(self) -> None:
        if not isinstance(self.label, str):
            raise InputTypeError(f"label={short(self.label)} must be a string")
        _set(self, label=checked_json("label", self.label))
        _set(self, description=checked_json("description", self.description))
        if is_blank(self.label):
            raise InputError(f"label={self.label!r} is empty; say what the level is")

    @telling
    def __repr__(self) -> str:
        return f"{cut(self.label)}, {cut(self.description)}"


@dataclass(frozen=True)
class Score:
    """A question that one of up to 10 levels answers; a score is a mean of their numbers, from 0.

    Args:
      instructions: what is asked, text or JSON; None asks which level fits the state best.
      criteria: the levels, lowest first: text or JSON each, or a Level.

    Raises:
      InputError, InputTypeError: they are malformed.
    """

    instructions: Json
    criteria: list[Json | Level]
    type: ClassVar[str] = "score"

    def __post_init__(self) -> None:
        _set(self, instructions=checked_json("instructions", self.instructions))
        if not isinstance(self.criteria, list | tuple):
            raise InputTypeError(
                f"criteria={short(self.criteria)} is a {type(self.criteria).__name__}; a score has "
                "a list of levels, lowest first"
            )
        check_levels("criteria", self.criteria)
        levels = [
            x if isinstance(x, Level) else checked_json(f"criteria[{i}]", x)
            for i, x in enumerate(self.criteria)
        ]
        _set(self, criteria=levels)

    @telling
    def __repr__(self) -> str:
        return f"{_told(self)}, {counted(len(self.criteria), 'level')}"

    @property
    def options(self) -> list[Option]:
        """(level, description), lowest first."""
        return [
            (x.label, x.description) if isinstance(x, Level) else (x, None) for x in self.criteria
        ]


Question: TypeAlias = Noul | Choice | Score


def check_options(field: str, options: Iterable[Any]) -> None:
    """Refuse options that are none, too many, empty, or that a model could not tell apart.

    Raises:
      InputError, InputTypeError: naming the field.
    """
    found = list(options)
    _check_number(field, len(found), "option", MAX_OPTIONS)
    for option in found:
        if not isinstance(option, bool):
            check_key(field, option)
            if not option.strip():
                raise InputError(f"{field} has the option {option!r}, which is empty; name it")
    _check_distinct(field, "option", found)


def check_levels(field: str, levels: Iterable[Any]) -> None:
    """The same for the levels of a score."""
    found = list(levels)
    _check_number(field, len(found), "level", MAX_LEVELS)
    for i, level in enumerate(found):
        if not isinstance(level, Level):
            checked_json(f"{field}[{i}]", level)
        if is_blank(level):
            raise InputError(f"{field}[{i}]={short(level)} is empty; say what the level is")
    _check_distinct(field, "level", [x.label if isinstance(x, Level) else x for x in found])


def _check_number(field: str, number: int, kind: str, most: int) -> None:
    if not number:
        raise InputError(f"{field} is empty; give at least one {kind}")
    if number > most:
        raise InputError(
            f"{field} has {number} {kind}s and may have {most}; split the question into several"
        )


def _check_distinct(field: str, kind: str, names: list[Json]) -> None:
    seen: dict[str, Json] = {}
    for name in names:
        # tokenizers compose characters: what is canonically the same is the same tokens
        key = unicodedata.normalize("NFC", json_of(name))
        if key in seen:
            raise InputError(
                f"{field} has the {kind} {short(name)} twice"
                + ("" if seen[key] == name else f" (also written {seen[key]!a})")
                + f"; each {kind} must be there once"
            )
        seen[key] = name


def _check_mapping(field: str, value: object, example: str) -> None:
    if not isinstance(value, Mapping):
        raise InputTypeError(
            f"{field}={short(value)} is a {type(value).__name__}; it must be a dict such as "
            f"{example}"
        )


def _described(field: str, criteria: Mapping[Any, Json]) -> dict[Any, Json]:
    return {k: checked_json(f"{field}[{short(k)}]", x) for k, x in criteria.items()}


def _set(question: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(question, name, value)


def _told(question: Question) -> str:
    asked = question.instructions
    return cut(question.criteria if is_blank(asked) else asked)
