"""The columns of a part: of all parts the same, whatever values each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from packscore.cli.parquet import result_types
from packscore.files.parquet import open_parquet
from packscore.files.records import ROW_ID_FIELDS, FieldNames


def part_schema(path: str, names: FieldNames, command: str, *, rows: bool, texts: bool) -> Any:
    """The schema of a part, from that of the input and the command.

    Args:
      path: of the input.
      names: of its fields.
      command: "score" or "rank".
      rows: whether rows of a query are one record, which has lists of what they carry.
      texts: whether the items go to the output.
    """
    import pyarrow as pa

    with open_parquet(path) as file:
        found = file.schema_arrow
    holder = _column_of(names.query, found.names)
    taken = _taken(names, found, rows=rows)
    carried = []
    for field in found:
        if field.name not in taken:
            type_ = carried_type(field.type)
            listed = rows and field.name != holder
            carried.append((field.name, pa.list_(type_) if listed else type_))
    results = result_types({"corpus_id", "id", "score", *(["text"] if texts else [])})
    added = ["ranking"]
    if command == "score":
        added = [*(["items"] if texts else []), "item_ids", "scores"]
    added += ["truncated_items", "non_finite_items"]
    return pa.schema([*carried, *((name, results[name]) for name in added)])


def _taken(names: FieldNames, schema: Any, *, rows: bool) -> set[str]:
    """Columns that no record carries: of the items, and of their ids."""
    columns = schema.names
    paths = [names.items or names.items_of(dict.fromkeys(columns))]
    usual = [name for name in ROW_ID_FIELDS if name in columns] if rows else []
    if names.ids is not None:
        paths.append(names.ids)
    elif len(usual) == 1:  # of several, a record's ids are the first that it has values of
        paths += usual
    found = {path: _column_of(path, columns) for path in paths}
    return {
        column
        for path, column in found.items()
        if path == column or hasattr(schema.field(column).type, "value_type")
    }


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
