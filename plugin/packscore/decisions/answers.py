"""Answers to questions, and a decision: all answers about one state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeAlias, TypeVar

from packscore.decisions.confidence import choice_confidence, mode, score_confidence
from packscore.decisions.questions import Choice, Level, Noul, Question
from packscore.decisions.texts import Json, text_of
from packscore.errors import InputError, InputTypeError
from packscore.results import Usage
from packscore.telling import counted, cut, telling

AnswerT = TypeVar("AnswerT")


class Rotation(NamedTuple):
    """What one item of a question gave.

    Args:
      log_probs: of the options' answers, in the order of the question's options; only their
        differences count.
      label_mass: their probability together, over the whole vocabulary; None where undefined.
      argmax_is_label: whether the vocabulary's most probable token begins one of them, or None.
    """

    log_probs: Sequence[float]
    label_mass: float | None = None
    argmax_is_label: bool | None = None


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What every answer says of how it was read.

    Args:
      label_mass: the probability that the model answers with one of the options at all, a mean over
        the orders of the options; None where undefined.
      argmax_is_label: whether its most probable answer is one of them, in all orders; None where
        undefined.
      order_spread: how far an option's probability moved between orders, at most; None with one.
    """

    label_mass: float | None = None
    argmax_is_label: bool | None = None
    order_spread: float | None = None

    def __bool__(self) -> NoReturn:
        raise InputTypeError(
            f"{self!r} has no truth value, for a probability is neither; compare it, as in "
            f"{self._compared}"
        )

    @property
    def _compared(self) -> str:
        raise NotImplementedError

    def _told(self, *values: str) -> str:
        names = ("label_mass", "argmax_is_label", "order_spread")
        found = ((name, getattr(self, name)) for name in names)
        return ", ".join([*values, *(f"{k}={_few(x)}" for k, x in found if x is not None)])


@dataclass(frozen=True, repr=False)
class NoulAnswer(_Answer):
    """The probability of a yes."""

    noul: float

    @telling
    def __repr__(self) -> str:
        return self._told(f"noul={_few(self.noul)}")

    @property
    def _compared(self) -> str:
        return "answer.noul > 0.5"

    def to_systemone(self) -> dict[str, Any]:
        """The answer in System One's shape."""
        return {"type": "noul", "noul": self.noul}

    def to_decisions(self, name: str | None) -> dict[str, Any]:
        """The answer in OpenAI's shape."""
        return {"type": "predicate", "name": name, "probability": self.noul}


@dataclass(frozen=True, repr=False)
class ChoiceAnswer(_Answer):
    """The most probable option (the first of several), and the probability of each."""

    choice: str | bool
    probabilities: dict[str | bool, float]
    confidence: float

    @telling
    def __repr__(self) -> str:
        return self._told(
            f"choice={cut(self.choice)} of {len(self.probabilities)}",
            f"probability={_few(self.probabilities[self.choice])}",
            f"confidence={_few(self.confidence)}",
        )

    @property
    def _compared(self) -> str:
        return f"answer.choice == {self.choice!r}"

    def to_systemone(self) -> dict[str, Any]:
        """The answer in System One's shape, where options are strings.

        Raises:
          InputError: a bool is an option beside the string that spells it.
        """
        spelled = {text_of(option): p for option, p in self.probabilities.items()}
        if len(spelled) < len(self.probabilities):
            raise InputError(
                "probabilities: a bool and the string that spells it are two options, which System "
                "One cannot say; use to_decisions()"
            )
        return {
            "type": "choice",
            "choice": text_of(self.choice),
            "confidence": self.confidence,
            "probabilities": spelled,
        }

    def to_decisions(self, name: str | None) -> dict[str, Any]:
        """The answer in OpenAI's shape."""
        return {
            "type": "choice",
            "name": name,
            "choice": self.choice,
            "confidence": self.confidence,
            "probabilities": [
                {"value": option, "probability": p} for option, p in self.probabilities.items()
            ],
        }


@dataclass(frozen=True, repr=False)
class ScoreAnswer(_Answer):
    """The mean of the levels' numbers, and the probability of each; `legend` says what they are."""

    score: float
    probabilities: dict[str, float]
    confidence: float
    legend: dict[str, Json | Level]

    @telling
    def __repr__(self) -> str:
        return self._told(
            f"score={_few(self.score)} of 0 to {len(self.legend) - 1}",
            f"confidence={_few(self.confidence)}",
        )

    @property
    def _compared(self) -> str:
        return "answer.score > 1"

    def to_systemone(self) -> dict[str, Any]:
        """The answer in System One's shape."""
        return {
            "type": "score",
            "score": self.score,
            "confidence": self.confidence,
            "legend": {number: _as_json(level) for number, level in self.legend.items()},
            "probabilities": dict(self.probabilities),
        }

    def to_decisions(self, name: str | None) -> dict[str, Any]:
        """The answer in OpenAI's shape."""
        return {
            "type": "score",
            "name": name,
            "score": self.score,
            "confidence": self.confidence,
            "probabilities": [
                {
                    "value": int(number),
                    "label": level.label if isinstance(level, Level) else text_of(level),
                    "probability": self.probabilities[number],
                }
                for number, level in self.legend.items()
            ],
        }


Answer: TypeAlias = NoulAnswer | ChoiceAnswer | ScoreAnswer


@dataclass(frozen=True)
class Decision:
    """All answers about one state, in the order of the questions.

    Args:
      answers: by the ids of the questions; an unnamed one of OpenAI's has its place, an int.
      usage: what they took.
      model: its name.
    """

    answers: dict[str | int, Answer]
    usage: Usage
    model: str

    @telling
    def __repr__(self) -> str:
        return f"{counted(len(self.answers), 'answer')} of {cut(self.model)}, usage={self.usage!r}"

    @property
    def nouls(self) -> dict[str | int, NoulAnswer]:
        """The answers that are a noul's."""
        return self._of(NoulAnswer)

    @property
    def choices(self) -> dict[str | int, ChoiceAnswer]:
        """The answers that are a choice's."""
        return self._of(ChoiceAnswer)

    @property
    def scores(self) -> dict[str | int, ScoreAnswer]:
        """The answers that are a score's."""
        return self._of(ScoreAnswer)

    def _of(self, kind: type[AnswerT]) -> dict[str | int, AnswerT]:
        return {name: answer for name, answer in self.answers.items() if isinstance(answer, kind)}

    def to_systemone(self) -> dict[str, Any]:
        """The body that System One answers with, and how each answer was read as `diagnostics`.

        Raises:
          InputError: it has no way to say an answer, or two ids are one as text.
        """
        answers = {str(name): answer.to_systemone() for name, answer in self.answers.items()}
        if len(answers) < len(self.answers):
            raise InputError("answers: an id is the place of an unnamed question; name that one")
        return {
            "model": self.model,
            "answers": answers,
            "usage": {
                "input_tokens": self.usage.input_tokens,
                "output_tokens": self.usage.output_tokens,
            },
            "diagnostics": {
                str(name): {
                    "label_mass": answer.label_mass,
                    "argmax_is_label": answer.argmax_is_label,
                    "order_spread": answer.order_spread,
                }
                for name, answer in self.answers.items()
            },
        }

    def to_decisions(self) -> dict[str, Any]:
        """The body that OpenAI's decisions answer with; unnamed questions have the name null."""
        usage = self.usage
        return {
            "model": self.model,
            "answers": [
                answer.to_decisions(name if isinstance(name, str) else None)
                for name, answer in self.answers.items()
            ],
            "usage": {
                "input_tokens": usage.input_tokens,
                "input_tokens_details": {
                    "cached_tokens": usage.cached_tokens,
                    "cache_write_tokens": 0,
                },
                "output_tokens": usage.output_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.input_tokens + usage.output_tokens,
            },
        }


def answer_of(question: Question, rotations: Sequence[Rotation]) -> Answer:
    """The answer that the items of a question give: a mean over them, option by option.

    Args:
      question: what was asked.
      rotations: what each of its items gave, as `DecisionPrompt.render` made them.

    Raises:
      InputError: a log-probability is NaN or above all numbers, or no option has any probability.
    """
    each = [_probabilities(question, rotation.log_probs) for rotation in rotations]
    by_option = list(zip(*each, strict=True))
    mean = [math.fsum(ps) / len(each) for ps in by_option]
    total = math.fsum(mean)
    p = [x / total for x in mean]
    masses = [x.label_mass for x in rotations if x.label_mass is not None]
    told = [x.argmax_is_label for x in rotations if x.argmax_is_label is not None]
    read: dict[str, Any] = {
        "label_mass": math.fsum(masses) / len(each) if len(masses) == len(each) else None,
        "argmax_is_label": all(told) if len(told) == len(each) else None,
        "order_spread": max(max(ps) - min(ps) for ps in by_option) if len(each) > 1 else None,
    }
    if isinstance(question, Noul):
        return NoulAnswer(noul=p[0], **read)
    if isinstance(question, Choice):
        options = list(question.criteria)
        return ChoiceAnswer(
            choice=options[mode(p)],
            probabilities=dict(zip(options, p, strict=True)),
            confidence=choice_confidence(p),
            **read,
        )
    return ScoreAnswer(
        score=math.fsum(i * x for i, x in enumerate(p)),
        probabilities={str(i): x for i, x in enumerate(p)},
        confidence=score_confidence(p),
        legend={str(i): level for i, level in enumerate(question.criteria)},
        **read,
    )


def _probabilities(question: Question, log_probs: Sequence[float]) -> list[float]:
    """The options' shares of what they have together."""
    found, n = [float(x) for x in log_probs], len(question.options)
    if len(found) != n:
        raise InputError(f"log_probs has {len(found)} entries; the question has {n} options")
    top = max(found)
    if not math.isfinite(top) or any(math.isnan(x) for x in found):
        raise InputError(f"log_probs={cut(found)} are no log-probabilities to compare")
    shares = [math.exp(x - top) for x in found]
    total = math.fsum(shares)
    return [x / total for x in shares]


def _as_json(level: Json | Level) -> Json:
    if not isinstance(level, Level):
        return level
    named = {"label": level.label, "description": level.description}
    return level.label if level.description is None else named


def _few(value: float | bool) -> str:
    """Few digits, for a reader."""
    return str(value) if isinstance(value, bool) else f"{value:.3g}"
