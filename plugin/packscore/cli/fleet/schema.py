"""The columns of a part: of all parts the same, whatever values each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from packscore.cli.parquet import result_types
from packscore.files.parquet import open_parquet
from packscore.files.records import ROW_ID_FIELDS, FieldNames, Fields
from packscore.files.states import StateFields


def part_schema(path: str, names: Fields, command: str, *, rows: bool, texts: bool) -> Any:
    """The schema of a part, from that of the input and the command.

    Args:
      path: of the input.
      names: of its fields.
      command: one of `tasks.TASKS`.
      rows: whether rows of a query are one record, which has lists of what they carry.
      texts: whether the items go to the output.
    """
    import pyarrow as pa

    with open_parquet(path) as file:
        found = file.schema_arrow
    paths = _taken(names, found.names, rows=rows)
    columns = {path: _column_of(path, found.names) for path in paths}
    # of an object that a path leads into, the rest goes to the output; of a list of them nothing
    taken = {
        column
        for path, column in columns.items()
        if path == column or hasattr(found.field(column).type, "value_type")
    }
    shared = _column_of(names.query, found.names) if isinstance(names, FieldNames) else None
    carried = []
    for field in found:
        if field.name not in taken:
            type_ = carried_type(field.type)
            listed = rows and field.name != shared
            carried.append((field.name, pa.list_(type_) if listed else type_))
    return pa.schema([*carried, *_added(command, texts=texts)])


def _taken(names: Fields, columns: Sequence[str], *, rows: bool) -> list[str]:
    """Paths of what no record carries: the items and their ids, or the state and its questions."""
    if isinstance(names, StateFields):
        return [names.state, *([names.questions] if names.given is None else [])]
    assert isinstance(names, FieldNames)
    paths = [names.items or names.items_of(dict.fromkeys(columns))]
    usual = [name for name in ROW_ID_FIELDS if name in columns] if rows else []
    if names.ids is not None:
        paths.append(names.ids)
    elif len(usual) == 1:  # of several, a record's ids are the first that it has values of
        paths += usual
    return paths


def _added(command: str, *, texts: bool) -> list[tuple[str, Any]]:
    """The columns of results."""
    import pyarrow as pa

    types = result_types(command)
    if command == "decide":
        return list(types.items())
    noted = ["truncated_items", "non_finite_items"]
    if command == "score":
        kept = [*(["items"] if texts else []), "item_ids", "scores", *noted]
        return [(name, types[name]) for name in kept]
    entry = [x for x in types["ranking"].value_type if texts or x.name != "text"]
    ranking = pa.list_(pa.struct(entry))
    return [("ranking", ranking), *((name, types[name]) for name in noted)]


def _column_of(path: str, columns: Sequence[str]) -> str:
    """The column that a path is in: the one of that name goes before one that it leads into."""
    ends = [at for at, letter in enumerate(path) if letter == "."]
    return next(name for name in [path, *(path[:at] for at in ends)] if name in columns)


def carried_type(type_: Any) -> Any:
    """What a column of the input is in the output: as it was, with dates as text."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(type_):
        return carried_type(type_.value_type)
    if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
        return pa.list_(carried_type(type_.value_type))
    if types.is_struct(type_):
        fields = [type_.field(i) for i in range(type_.num_fields)]
        return pa.struct([(field.name, carried_type(field.type)) for field in fields])
    if types.is_float16(type_):
        return pa.float32()
    if types.is_boolean(type_) or types.is_integer(type_) or types.is_floating(type_):
        return type_
    # text, dates as text, and what makes every record bad that has a value of it
    return pa.string()
