"""Columns of the outputs that have columns, and what a cell holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from packscore.files import states
from packscore.files.readers import TABLES
from packscore.files.records import RESULT_FIELDS, TABLE_RESULT_FIELDS

Row = dict[str, Any]
# Called anew for each pass over them.
Rows = Callable[[], Iterator[Row]]


@dataclass(frozen=True)
class Shape:
    """What a run's results look like.

    Args:
      query_holder: the field that has the query.
      command: "score" or "rank".
      labels: their names.
      rows: whether the input had rows of one item, so that carried lists have a value for each.
    """

    query_holder: str
    command: str
    labels: list[str]
    rows: bool = False


def reserved_fields(output_format: str, command: str) -> frozenset[str]:
    """Names that results use in the output, whatever the labels: no field may have them."""
    if command == "decide":
        return frozenset(states.RESULT_FIELDS)
    return frozenset((*RESULT_FIELDS, *(TABLE_RESULT_FIELDS if output_format in TABLES else ())))


def label_columns(output_format: str, labels: list[str]) -> frozenset[str]:
    """The same for the labels."""
    return frozenset(f"score_{label}" for label in labels if output_format in TABLES)


def columns_of(rows: Rows) -> list[str]:
    """Names of all columns, in order of first appearance."""
    columns: dict[str, None] = {}
    for row in rows():
        columns |= dict.fromkeys(row)
    return list(columns)


def cell(value: Any) -> Any:
    """Text and numbers as they are, everything else as JSON; null is an empty cell."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return as_text(value) if isinstance(value, str) else as_json(value)


def as_text(value: str) -> str:
    """Text, and half of a surrogate pair, which no file can hold, as JSON has it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return value


def as_json(value: Any) -> str:
    """Any value as JSON."""
    text = json.dumps(value, ensure_ascii=False)
    return text if as_text(text) is text else json.dumps(value)
