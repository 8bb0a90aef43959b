"""Records of a state and the questions about it: one a line, or one a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from packscore.files.failures import UsageError
from packscore.files.paths import MISSING, find, without
from packscore.files.records import BadRecord, BadValueError, MisfitError, kind

# What a run adds to a record, in either shape.
RESULT_FIELDS = ("model", "answers", "usage", "diagnostics")


@dataclass(frozen=True)
class StateRecord:
    """A state and the questions about it.

    Args:
      line: where it begins in the input, from 1 (a row, in parquet).
      state: text or JSON.
      questions: an object or a list, as the line has it; those given for all lines are not copied
        here.
      size: how many questions.
      fields: what goes to the output: all fields but the state and the questions.
    """

    line: int
    state: Any
    questions: Any
    size: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class StateFields:
    """Where a record keeps its state and its questions, by name or path.

    Args:
      state: of the state.
      questions: of the questions, where lines have their own.
      given: those that are asked on every line instead; None takes each line's.

    Raises:
      UsageError: both names are one.
    """

    state: str = "state"
    questions: str = "questions"
    given: Any = None
    of_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.state == self.questions:
            raise UsageError(
                f"--state-field {self.state!r} and --questions-field {self.questions!r} must be "
                "different fields"
            )

    def entry(
        self, line: int, value: object, *, rows: bool, table: bool, reserved: frozenset[str]
    ) -> StateRecord | BadRecord:
        """One parsed line, checked; the questions themselves are when they are asked."""
        known: dict[str, Any] = {}
        try:
            if not isinstance(value, dict):
                raise BadValueError(f"is {kind(value)}; it must be an object")
            known = {"id": value["id"]} if "id" in value else {}
            self.check_header(value)
            state, carried = find(value, self.state), without(value, self.state)
            questions = self.given
            if questions is None:
                questions = find(value, self.questions)
                if not isinstance(questions, dict | list):
                    raise BadValueError(
                        f"{self.questions} is {kind(questions)}; it must be an object of id to "
                        "question, or a list"
                    )
                if find(carried, self.questions) is not MISSING:
                    carried = without(carried, self.questions)
            if taken := reserved & carried.keys():
                raise MisfitError(
                    f"has the fields {sorted(taken)}, which the output needs; rename them"
                )
            return StateRecord(line, state, questions, len(questions), carried)
        except BadValueError as error:
            return BadRecord(line, str(error), known, isinstance(error, MisfitError))

    def check_header(self, row: dict[str, Any]) -> None:
        """Refuse a line, or a header, that lacks a field.

        Raises:
          MisfitError: it lacks one, or has questions where all lines are asked others.
        """
        if find(row, self.state) is MISSING:
            raise MisfitError(f"field {self.state!r} is missing; name it with --state-field")
        has_questions = find(row, self.questions) is not MISSING
        if self.given is None and not has_questions:
            raise MisfitError(
                f"field {self.questions!r} is missing; name it with --questions-field, or pass "
                "--questions FILE to ask the same of every line"
            )
        if self.given is not None and has_questions:
            raise MisfitError(
                f"has a field {self.questions!r} of its own, and --questions asks the same of "
                "every line; leave one out"
            )

    def kind(self, value: dict[str, Any], *, table: bool) -> type | None:
        """A record is whole: there are no rows to bring together."""
        return None if find(value, self.state) is MISSING else list

    def paths(self, value: dict[str, Any], *, rows: bool, table: bool) -> tuple[str, str | None]:
        """Where a good record has its questions; they bring their ids."""
        return self.questions, None

    def told(self, items: list[str], ids: list[str], *, rows: bool, group: bool) -> list[str]:
        """What was understood, in words."""
        asked = f"questions in {self.questions!r}"
        if self.given is not None:
            asked = f"the same questions on every line, {len(self.given)}"
        return [f"state in {self.state!r}", asked]

    def settings(self) -> dict[str, Any]:
        """What the output depends on, by option."""
        return {
            "state_field": self.state,
            "questions_field": self.questions,
            "questions": self.given,
        }
