"""Results as parquet: a column has one type, and where its values have none it has JSON.

They are read twice, some at a time, for a type may show in the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from packscore.cli.columns import Row, Shape, as_json, as_text
from packscore.files.failures import RunError
from packscore.files.parquet import parquet_module
from packscore.files.states import RESULT_FIELDS as DECISION_FIELDS

# Deeper lists and objects are JSON: readers of parquet recurse. So are those with more fields in
# all, whose names are data.
MAX_DEPTH, MAX_FIELDS = 16, 256
# What a row group has in memory before it is written.
ROW_GROUP_BYTES = 1 << 22
# A dictionary of scores, of which no two are equal, takes three times what it encodes.
WRITING = {"use_dictionary": False, "data_page_size": 1 << 17, "compression": "zstd"}
# What every record gets, by command; the first are JSON whatever the values.
RESULTS = {"decide": DECISION_FIELDS, "rank": ("ranking",), "score": ("scores",)}
JSON_RESULTS = frozenset(DECISION_FIELDS) - {"model"}

# Results, some at a time; called anew for each pass over them.
Batches = Callable[[], Iterable[list[Row]]]


class _NoTypeError(Exception):
    """Parquet has no type for the values of a column."""


def write_parquet(batches: Batches, written: Path, shape: Shape) -> list[str]:
    """Write a file.

    Returns:
      Names of the columns that hold JSON, for their values have no type in common that parquet has.
    """
    import pyarrow as pa

    types, in_json = _types_of(batches, shape)
    always = JSON_RESULTS if shape.command == "decide" else frozenset()
    while True:  # again for each column with a value that its type turns out not to hold
        try:
            _write(batches, written, types, always.union(in_json))
        except _NoTypeError as error:
            in_json.append(str(error))
            types[str(error)] = pa.string()
        else:
            return in_json


def write_with_schema(batches: Batches, written: Path, schema: Any, command: str) -> None:
    """Write a file of these columns, whatever the records have.

    Raises:
      RunError: a value is none of its column's.
    """
    types = {name: schema.field(name).type for name in schema.names}
    in_json = JSON_RESULTS if command == "decide" else frozenset()
    try:
        for rows in batches():
            for row in rows:
                for name in row.keys() - types.keys():
                    if row[name] is not None:
                        raise _NoTypeError(name)
        _write(batches, written, types, in_json)
    except _NoTypeError as error:
        name = str(error)
        raise RunError(
            f"column {name!r} has values that are not {types.get(name, 'expected')}, as others of "
            "INPUT are; pass --output-format jsonl"
        ) from error


def _types_of(batches: Batches, shape: Shape) -> tuple[dict[str, Any], list[str]]:
    """The type of every column, in order of appearance, and the columns that only JSON can hold."""
    import pyarrow as pa

    known, in_json = result_types(shape.command), list[str]()
    types: dict[str, Any] = {}
    entry_fields = {"corpus_id", "score"}
    for rows in batches():
        for row in rows:
            types |= {name: known.get(name, pa.null()) for name in row if name not in types}
            if shape.command == "rank":
                entry_fields.update(*row["ranking"])
        for name in [name for name in types if name not in known and name not in in_json]:
            try:
                types[name] = _unified(types[name], name, [row.get(name) for row in rows])
            except _NoTypeError:
                in_json.append(name)
    if not types:  # no record was good
        holder = [] if shape.command == "decide" else [shape.query_holder]
        types = {x: known.get(x, pa.string()) for x in (*holder, *RESULTS[shape.command])}
    if shape.command == "rank":
        kept = [field for field in known["ranking"].value_type if field.name in entry_fields]
        types["ranking"] = pa.list_(pa.struct(kept))
    in_json += [name for name, one in types.items() if name not in in_json and not _fields_of(one)]
    return types | dict.fromkeys(in_json, pa.string()), in_json


def result_types(command: str) -> dict[str, Any]:
    """What a run adds has its types whatever the values; ids are text, for they may be mixed."""
    import pyarrow as pa

    if command == "decide":
        return dict.fromkeys(DECISION_FIELDS, pa.string())
    ranked = {"corpus_id": pa.int64(), "id": pa.string(), "score": pa.float64()}
    texts, integers = pa.list_(pa.string()), pa.list_(pa.int64())
    return {
        "ranking": pa.list_(pa.struct({**ranked, "text": pa.string()})),
        "scores": pa.list_(pa.list_(pa.float64())),
        "item_ids": texts,
        "items": texts,
        "truncated_items": integers,
        "non_finite_items": integers,
    }


def _unified(before: Any, name: str, values: list[Any]) -> Any:
    """The type of values and of those before them."""
    import pyarrow as pa

    found = _array(name, values).type
    try:
        both = [pa.schema([("x", one)]) for one in (before, found)]
        unified = pa.unify_schemas(both, promote_options="permissive").field("x").type
    except pa.ArrowException as error:
        raise _NoTypeError(name) from error
    if unified != before and _fields_of(unified) > MAX_FIELDS:
        raise _NoTypeError(name)
    return unified


def _fields_of(type_: Any, depth: int = 0) -> int:
    """How many columns a type is in parquet; 0 where it is none."""
    import pyarrow as pa

    below = [type_.field(i).type for i in range(type_.num_fields)]
    if depth > MAX_DEPTH or (pa.types.is_struct(type_) and not below):
        return 0
    counts = [_fields_of(one, depth + 1) for one in below]
    return sum(counts) if all(counts) and counts else int(not counts)


def _write(batches: Batches, written: Path, types: dict[str, Any], in_json: frozenset[str]) -> None:
    import pyarrow as pa

    schema = pa.schema([(as_text(name), type_) for name, type_ in types.items()])
    with parquet_module().ParquetWriter(written, schema, **WRITING) as writer:
        waiting: list[Any] = []
        for rows in batches():
            arrays = []
            for name, type_ in types.items():
                values = [row.get(name) for row in rows]
                if name in in_json:
                    values = [None if value is None else as_json(value) for value in values]
                arrays.append(_array(name, values, type_))
            waiting.append(pa.RecordBatch.from_arrays(arrays, schema=schema))
            if sum(batch.nbytes for batch in waiting) >= ROW_GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(waiting))
                waiting.clear()
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting))


def _array(name: str, values: list[Any], type_: Any = None) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values, type_)
    except (pa.ArrowException, OverflowError, UnicodeError, RecursionError) as error:
        raise _NoTypeError(name) from error
