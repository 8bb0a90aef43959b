"""One record of the input: checked, or the reason why it cannot be scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from packscore.files.failures import UsageError
from packscore.files.paths import MISSING, find, holder, without

# Where items are looked for without --items-field: lists of them, and one on each row.
LIST_FIELDS = ("items", "documents", "docs")
ROW_FIELDS = ("item", "document", "doc")
# Where ids are looked for without --id-field: in items that are objects, and beside one on a row.
OBJECT_ID_FIELDS = ("id", "_id")
ROW_ID_FIELDS = ("document_id", "doc_id", "item_id")
# The text of a query, or an item, that is an object.
TEXT_FIELD = "text"
# What a run adds to a record, and to a row where the output has columns.
RESULT_FIELDS = ("scores", "ranking", "truncated_items", "non_finite_items", "items", "item_ids")
TABLE_RESULT_FIELDS = ("corpus_id", "item_id", "score", "text", "item", "truncated")

ItemId = str | int | float | None


class BadValueError(ValueError):
    """A record cannot be scored; the message is the reason."""


class MisfitError(BadValueError):
    """The fields of a record are not those that the options, or the output, ask for."""


@dataclass(frozen=True)
class Record:
    """A query and its items.

    Args:
      line: where it begins in the input, from 1 (a row, in parquet).
      query: the text.
      items: the texts.
      fields: what goes to the output: all fields but the items, the query among them.
      ids: one of each item, where the input has them.
      query_holder: the name of the one of `fields` that holds the query.
    """

    line: int
    query: str
    items: list[str]
    fields: dict[str, Any]
    ids: list[ItemId] | None = None
    query_holder: str = "query"

    @property
    def size(self) -> int:
        """How many items it has."""
        return len(self.items)


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be scored, and why; `misfit` where the options are to blame."""

    line: int
    reason: str
    fields: dict[str, Any] = field(default_factory=dict)
    misfit: bool = False


class Readable(Protocol):
    """A good record of any kind: what a run counts and carries of it."""

    @property
    def line(self) -> int:
        """Where it begins in the input, from 1."""
        ...

    @property
    def fields(self) -> dict[str, Any]:
        """What goes to the output as it came."""
        ...

    @property
    def size(self) -> int:
        """How many items it has, or questions."""
        ...


Entry = Readable | BadRecord
# A record as its format has it, with its line.
Raw = tuple[int, object] | BadRecord


class Fields(Protocol):
    """What records of an input are made of, and where that stands in a line or a row."""

    # whether rows of a table, and lines with one item, are parts of a record
    of_rows: ClassVar[bool]

    def entry(
        self, line: int, value: object, *, rows: bool, table: bool, reserved: frozenset[str]
    ) -> Entry:
        """One parsed line, checked."""
        ...

    def check_header(self, row: dict[str, Any]) -> None:
        """Refuse the header of a table, here a row of its own names.

        Raises:
          MisfitError: it lacks a column.
        """
        ...

    def kind(self, value: dict[str, Any], *, table: bool) -> type | None:
        """Of what stands where items do: list, str, dict, or None for none of these."""
        ...

    def paths(self, value: dict[str, Any], *, rows: bool, table: bool) -> tuple[str, str | None]:
        """Where a good record has its items, and their ids."""
        ...

    def told(self, items: list[str], ids: list[str], *, rows: bool, group: bool) -> list[str]:
        """What was understood, in words, with the paths that were met."""
        ...

    def settings(self) -> dict[str, Any]:
        """What the output depends on, by option."""
        ...


@dataclass(frozen=True)
class FieldNames:
    """Where a record keeps its query, its items and their ids, by name or path.

    Args:
      query: of the text.
      items: of the list of texts, or of the one text of a row; None looks for the usual names.
      ids: of the items' ids; None looks for the usual names.
    """

    query: str = "query"
    items: str | None = None
    ids: str | None = None
    of_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given = {"--query-field": self.query, "--items-field": self.items, "--id-field": self.ids}
        options = [option for option, name in given.items() if name is not None]
        if len({given[option] for option in options}) < len(options):
            said = " and ".join(f"{option} {given[option]!r}" for option in options)
            raise UsageError(f"{said} must be different fields")

    def items_of(self, value: Mapping[str, Any], *, table: bool = False) -> str:
        """The path of the items in a record, or in a row of a table.

        Raises:
          MisfitError: there is none, or there are two with usual names.
        """
        if self.items is not None:
            if find(value, self.items) is MISSING:
                raise MisfitError(f"field {self.items!r} is missing")
            return self.items
        for usual in (ROW_FIELDS, LIST_FIELDS) if table else (LIST_FIELDS, ROW_FIELDS):
            present = [name for name in usual if name in value]
            if len(present) > 1:
                both = " and ".join(map(repr, present))
                raise MisfitError(f"has both {both}; name one with --items-field")
            if present:
                return present[0]
        wanted = ", ".join(map(repr, (*LIST_FIELDS[1:], *ROW_FIELDS)))
        raise MisfitError(
            f"field {LIST_FIELDS[0]!r} (or {wanted}) is missing; name it with --items-field"
        )

    def ids_of(self, value: dict[str, Any], items: str, *, rows: bool) -> str | None:
        """The path of the items' ids in a record, or None where they have none.

        Raises:
          MisfitError: the field that was named is missing.
        """
        if self.ids is not None:
            if find(value, self.ids) is MISSING:
                raise MisfitError(f"field {self.ids!r} is missing")
            return self.ids
        owners = [items]
        parent, _, last = items.rpartition(".")
        if items not in value and (isinstance(find(value, parent), list) or rows):
            owners += [parent] if last not in ROW_FIELDS else []  # the object that has the text
        usual = [f"{owner}.{name}" for owner in owners for name in OBJECT_ID_FIELDS]
        found = [p for p in (*usual, *(ROW_ID_FIELDS if rows else ())) if _has_values(value, p)]
        return found[0] if found else None

    def entry(
        self, line: int, value: object, *, rows: bool, table: bool, reserved: frozenset[str]
    ) -> Record | BadRecord:
        """One parsed line, checked."""
        return to_record(line, value, self, rows=rows, table=table, reserved=reserved)

    def check_header(self, row: dict[str, Any]) -> None:
        """Refuse a header without the columns.

        Raises:
          MisfitError: it lacks one.
        """
        text_of(self.query, row)
        self.ids_of(row, self.items_of(row, table=True), rows=True)

    def kind(self, value: dict[str, Any], *, table: bool) -> type | None:
        """Of a record's items: list, str, dict, or None for what has none of these."""
        try:
            found = find(value, self.items_of(value, table=table))
        except MisfitError:
            return None
        return type(found) if isinstance(found, list | str | dict) else None

    def paths(self, value: dict[str, Any], *, rows: bool, table: bool) -> tuple[str, str | None]:
        """Where a good record has its items, and their ids."""
        items = self.items_of(value, table=table)
        return items, self.ids_of(value, items, rows=rows)

    def told(self, items: list[str], ids: list[str], *, rows: bool, group: bool) -> list[str]:
        """What was understood, in words."""
        parts = [f"query in {self.query!r}"]
        if items:
            shape = "one item a row in" if rows else "a list of items in"
            parts.append(f"{shape} {' or '.join(map(repr, items))}")
            parts.append(f"ids in {' or '.join(map(repr, ids))}" if ids else "no ids")
        if rows:
            which = "all rows of a query" if group else "rows of a query that follow each other"
            parts.append(f"{which} are a record")
        return parts

    def settings(self) -> dict[str, Any]:
        """What the output depends on, by option."""
        return {"query_field": self.query, "items_field": self.items, "id_field": self.ids}


def _has_values(value: dict[str, Any], path: str) -> bool:
    found = find(value, path)
    values = found if isinstance(found, list) else [found]
    return any(one is not None and one is not MISSING for one in values)


def to_record(
    line: int,
    value: object,
    names: FieldNames,
    *,
    rows: bool = False,
    table: bool = False,
    reserved: frozenset[str] = frozenset(),
) -> Record | BadRecord:
    """Check one parsed record.

    Args:
      line: where it is.
      value: as its format has it.
      names: of its fields.
      rows: whether it is a row, with one item.
      table: whether it is a row of a file with columns.
      reserved: names that the output needs for itself.
    """
    known: dict[str, Any] = {}
    try:
        if not isinstance(value, dict):
            raise BadValueError(f"is {kind(value)}; it must be an object")
        known = {"id": value["id"]} if "id" in value else {}
        query = text_of(names.query, value)
        path = names.items_of(value, table=table)
        found = find(value, path)
        if rows and isinstance(found, list):
            raise BadValueError(f"{path} is a list; the first records have one text there")
        items = list_of_texts(path, [found] if rows else found, one=rows)
        ids_path = names.ids_of(value, path, rows=rows)
        ids = None if ids_path is None else _ids_at(value, ids_path, len(items), rows=rows)
        carried = without(value, path)
        if ids_path is not None and find(carried, ids_path) is not MISSING:
            carried = without(carried, ids_path)
        taken = reserved & carried.keys()
        if taken:
            raise MisfitError(
                f"has the fields {sorted(taken)}, which the output needs; rename them"
            )
        return Record(line, query, items, carried, ids, holder(value, names.query))
    except BadValueError as error:
        return BadRecord(line, str(error), known, isinstance(error, MisfitError))


def text_of(path: str, value: dict[str, Any]) -> str:
    """A field that has to be text, or an object with a text.

    Raises:
      BadValueError: it is missing, of another type, or not valid Unicode.
    """
    found = find(value, path)
    if found is MISSING:
        raise MisfitError(f"field {path!r} is missing; name it with --query-field")
    return _text_in(path, found, "--query-field")


def list_of_texts(path: str, values: object, *, one: bool = False) -> list[str]:
    """A field that has to be a list of texts, or of objects with a text.

    Raises:
      BadValueError: it is not, or it is empty.
    """
    if not isinstance(values, list):
        raise BadValueError(f"{path} is {kind(values)}; it must be a list of strings")
    if not values:
        raise BadValueError(f"{path} is an empty list")
    names = [path if one else f"{path}[{i}]" for i in range(len(values))]
    pairs = zip(names, values, strict=True)
    return [_text_in(name, value, "--items-field") for name, value in pairs]


def _text_in(name: str, value: object, option: str) -> str:
    if value is MISSING:
        raise BadValueError(f"{name} is missing")
    if isinstance(value, dict):
        if TEXT_FIELD not in value:
            raise BadValueError(
                f"{name} is an object without {TEXT_FIELD!r}; name its text with {option}"
            )
        return _checked_text(f"{name}.{TEXT_FIELD}", value[TEXT_FIELD])
    return _checked_text(name, value)


def _ids_at(value: dict[str, Any], path: str, num_items: int, *, rows: bool) -> list[ItemId]:
    found = find(value, path)
    ids = [found] if rows else found
    if not isinstance(ids, list):
        raise BadValueError(f"{path} is {kind(ids)}; it must be a list with an id for each item")
    if len(ids) != num_items:
        raise BadValueError(f"{path} has {len(ids)} ids, and there are {num_items} items")
    ids = [None if one is MISSING else one for one in ids]
    for i, one in enumerate(ids):
        if one is not None and (isinstance(one, bool) or not isinstance(one, str | int | float)):
            where = path if rows else f"{path}[{i}]"
            raise BadValueError(f"{where} is {kind(one)}; an id is a string or a number")
    return ids


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
