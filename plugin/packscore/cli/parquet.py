"""Results as parquet: a column has one type, and where its values have none it has JSON."""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from packscore.cli.columns import Row, Rows, Shape, as_json, as_text, columns_of
from packscore.files.failures import RunError
from packscore.files.parquet import parquet_module

BATCH_ROWS = 1024
# Deeper lists and objects are JSON: readers of parquet recurse.
MAX_DEPTH = 16


class _NoTypeError(Exception):
    """Parquet has no type for the values of a column."""


def write_parquet(records: Rows, written: Path, shape: Shape) -> list[str]:
    """Write a file.

    Returns:
      Names of the columns that hold JSON, for their values have no type in common that parquet has.
    """
    import pyarrow as pa

    result_types, columns = _result_types(records), columns_of(records)
    if not columns:  # no record was good
        result_types[shape.query_holder] = pa.string()
        columns = [shape.query_holder, "ranking" if shape.command == "rank" else "scores"]
    in_json: list[str] = []
    while True:  # again for each column that turns out to have no type
        try:
            _write(records, written, _types_of(records, columns, result_types, in_json), in_json)
        except _NoTypeError as error:
            in_json.append(str(error))
        else:
            return in_json


def _result_types(records: Rows) -> dict[str, Any]:
    kept = {"corpus_id", "score"}
    for record in records():
        kept.update(*record.get("ranking", ()))
    return result_types(kept)


def result_types(kept: Container[str]) -> dict[str, Any]:
    """What a run adds has its types whatever the values; ids are text, for they may be mixed.

    Args:
      kept: fields of a ranking's entries.
    """
    import pyarrow as pa

    struct = {
        "corpus_id": pa.int64(),
        "id": pa.string(),
        "score": pa.float64(),
        "text": pa.string(),
    }
    texts, integers = pa.list_(pa.string()), pa.list_(pa.int64())
    return {
        "ranking": pa.list_(pa.struct([(name, struct[name]) for name in struct if name in kept])),
        "scores": pa.list_(pa.list_(pa.float64())),
        "item_ids": texts,
        "items": texts,
        "truncated_items": integers,
        "non_finite_items": integers,
    }


def _types_of(
    records: Rows, columns: list[str], result_types: dict[str, Any], in_json: list[str]
) -> dict[str, Any]:
    """The type of every column, over all records."""
    import pyarrow as pa

    types = {name: result_types.get(name, pa.null()) for name in columns}
    types |= {name: pa.string() for name in in_json}
    inferred = [name for name in columns if name not in result_types and name not in in_json]
    for rows in _batches(records):
        for name in inferred:
            found = _array(name, [row.get(name) for row in rows]).type
            try:
                both = [pa.schema([("x", one)]) for one in (types[name], found)]
                unified = pa.unify_schemas(both, promote_options="permissive")
            except pa.ArrowException as error:
                raise _NoTypeError(name) from error
            types[name] = unified.field("x").type
    for name in inferred:
        if not _can_be_written(types[name]):
            raise _NoTypeError(name)
    return types


def _can_be_written(type_: Any, depth: int = 0) -> bool:
    import pyarrow as pa

    below = [type_.field(i).type for i in range(type_.num_fields)]
    if depth > MAX_DEPTH or (pa.types.is_struct(type_) and not below):
        return False
    return all(_can_be_written(one, depth + 1) for one in below)


def write_with_schema(records: Rows, written: Path, schema: Any) -> None:
    """Write a file of these columns, whatever the records have.

    Raises:
      RunError: a value is none of its column's.
    """
    types = {name: schema.field(name).type for name in schema.names}
    try:
        strays = {
            name
            for record in records()
            for name in record.keys() - types.keys()
            if record[name] is not None
        }
        if strays:
            raise _NoTypeError(min(strays))
        _write(records, written, types, [])
    except _NoTypeError as error:
        raise RunError(
            f"column {str(error)!r} has values that are not {types.get(str(error), 'expected')}; "
            "pass --output-format jsonl"
        ) from error


def _write(records: Rows, written: Path, types: dict[str, Any], in_json: list[str]) -> None:
    import pyarrow as pa

    schema = pa.schema([(as_text(name), type_) for name, type_ in types.items()])
    with parquet_module().ParquetWriter(written, schema) as writer:
        for rows in _batches(records):
            arrays = []
            for name, type_ in types.items():
                values = [row.get(name) for row in rows]
                if name in in_json:
                    values = [None if value is None else as_json(value) for value in values]
                arrays.append(_array(name, values, type_))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _array(name: str, values: list[Any], type_: Any = None) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values, type_)
    except (pa.ArrowException, OverflowError, UnicodeError, RecursionError) as error:
        raise _NoTypeError(name) from error


def _batches(records: Rows) -> Iterator[list[Row]]:
    found = records()
    while batch := [_with_text_ids(record) for record in islice(found, BATCH_ROWS)]:
        yield batch


def _with_text_ids(record: Row) -> Row:
    if "item_ids" in record:
        record["item_ids"] = [_text_id(one) for one in record["item_ids"]]
    for entry in record.get("ranking", ()):
        if "id" in entry:
            entry["id"] = _text_id(entry["id"])
    return record


def _text_id(one: str | float | None) -> str | None:
    return None if one is None else as_text(str(one))
