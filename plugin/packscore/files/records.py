"""One record of the input: checked, or the reason why it cannot be scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from packscore.files.failures import UsageError

DEFAULT_ITEMS_FIELDS = ("items", "documents")


class BadValueError(ValueError):
    """A record cannot be scored; the message is the reason."""


@dataclass(frozen=True)
class Record:
    """A query and its items.

    Args:
      line: where it begins in the input, from 1 (a row, in parquet).
      query: the text.
      items: the texts.
      fields: what goes to the output: all fields but the items, the query among them.
      item_fields: names of `fields` that hold a list with one value for each item.
    """

    line: int
    query: str
    items: list[str]
    fields: dict[str, Any]
    item_fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be scored, and why."""

    line: int
    reason: str
    fields: dict[str, Any] = field(default_factory=dict)


Entry = Record | BadRecord


@dataclass(frozen=True)
class FieldNames:
    """Where a record keeps its query and items; `items=None` is "items" or "documents"."""

    query: str = "query"
    items: str | None = None

    def __post_init__(self) -> None:
        if self.query == self.items:
            raise UsageError(f"--query-field and --items-field are both {self.query!r}")

    def items_of(self, value: Mapping[str, Any]) -> str:
        """The name of the field that holds the items.

        Raises:
          BadValueError: none does, or both of the default names do.
        """
        if self.items is not None:
            present = [self.items] if self.items in value else []
        else:
            present = [name for name in DEFAULT_ITEMS_FIELDS if name in value]
        if len(present) > 1:
            raise BadValueError("has both 'items' and 'documents'; name one with --items-field")
        if not present:
            wanted = repr(self.items) if self.items else "'items' (or 'documents')"
            raise BadValueError(f"field {wanted} is missing")
        return present[0]


def to_record(line: int, value: object, names: FieldNames) -> Entry:
    """Check one parsed record."""
    fields: dict[str, Any] = {}
    try:
        if not isinstance(value, dict):
            raise BadValueError(f"is {kind(value)}; it must be an object")
        fields = {"id": value["id"]} if "id" in value else {}
        query = text_of(names.query, value)
        items_name = names.items_of(value)
        items = list_of_texts(items_name, value[items_name])
        carried = {name: value[name] for name in value if name != items_name}
        return Record(line, query, items, carried)
    except BadValueError as error:
        return BadRecord(line, str(error), fields)


def text_of(name: str, value: Mapping[str, Any]) -> str:
    """A field that has to be text.

    Raises:
      BadValueError: it is missing, of another type, or not valid Unicode.
    """
    if name not in value:
        raise BadValueError(f"field {name!r} is missing")
    return _checked_text(name, value[name])


def list_of_texts(name: str, values: object) -> list[str]:
    """A field that has to be a list of texts.

    Raises:
      BadValueError: it is not, or it is empty.
    """
    if not isinstance(values, list):
        raise BadValueError(f"{name} is {kind(values)}; it must be a list of strings")
    if not values:
        raise BadValueError(f"{name} is an empty list")
    return [_checked_text(f"{name}[{i}]", value) for i, value in enumerate(values)]


def _checked_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadValueError(f"{name} is {kind(value)}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadValueError(
            f"{name} has half of a surrogate pair at character {error.start}, "
            "which is not valid Unicode"
        ) from error
    return value


def kind(value: object) -> str:
    """What a parsed value is, in the words of JSON."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
