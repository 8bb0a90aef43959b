"""From the JSON lines of a run to the CSV or parquet file that was asked for."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from packscore.files.failures import RunError
from packscore.files.readers import parquet_module

PARQUET_BATCH_ROWS = 1024
Row = dict[str, Any]
# What a run adds to a record.
RESULT_FIELDS = frozenset({"scores", "ranking", "truncated_items", "non_finite_items", "items"})


def result_columns(output_format: str, labels: list[str]) -> frozenset[str]:
    """Names that results use in the output, so that no field of the input may have them."""
    if output_format != "csv":
        return RESULT_FIELDS
    columns = {"corpus_id", "score", "text", "item", "truncated"}
    return RESULT_FIELDS | columns | {f"score_{label}" for label in labels}


def convert(
    results: Path, output: Path, output_format: str, labels: list[str], item_fields: bool
) -> None:
    """Write the output from the part-file, all of it or none.

    Args:
      results: the part-file, JSON lines.
      output: the file to write.
      output_format: "csv" or "parquet".
      labels: names of the labels, for CSV columns.
      item_fields: whether lists among the carried fields have one value for each item.

    Raises:
      RunError: a column holds values of different types.
    """
    written = Path(f"{output}.tmp")
    if output_format == "csv":
        _write_csv(results, written, lambda record: _rows(record, labels, item_fields))
    else:
        _write_parquet(results, written)
    written.replace(output)


def _records(results: Path) -> Iterator[Row]:
    with results.open("rb") as file:
        for line in file:
            yield json.loads(line)


def _rows(record: Row, labels: list[str], item_fields: bool) -> Iterator[Row]:
    """One row for each item of a record: in their order for scores, best first for a ranking."""
    record = dict(record)
    scores, ranking = record.pop("scores", None), record.pop("ranking", None)
    truncated = set(record.pop("truncated_items", ()))
    record.pop("non_finite_items", None)  # their cells are empty
    items = record.pop("items", None)
    listed = {name for name in record if item_fields and isinstance(record[name], list)}
    for place in range(len(ranking if scores is None else scores)):
        entry = {"corpus_id": place} if ranking is None else dict(ranking[place])
        i = entry["corpus_id"]
        row = {name: value[i] if name in listed else value for name, value in record.items()}
        row |= entry
        if items is not None:
            row["item"] = items[i]
        if scores is not None:
            row |= {f"score_{label}": p for label, p in zip(labels, scores[i], strict=True)}
        yield row | {"truncated": i in truncated}


def _write_csv(results: Path, written: Path, rows_of: Callable[[Row], Iterator[Row]]) -> None:
    columns = _columns(row for record in _records(results) for row in rows_of(record))
    with written.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for record in _records(results):
            for row in rows_of(record):
                writer.writerow({name: _cell(value) for name, value in row.items()})


def _cell(value: Any) -> Any:
    """Text and numbers as they are, everything else as JSON; null is an empty cell."""
    if value is None or (isinstance(value, str | int | float) and not isinstance(value, bool)):
        return value
    return json.dumps(value, ensure_ascii=False)


def _columns(rows: Iterator[Row]) -> list[str]:
    """Names of all columns, in order of first appearance."""
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    return list(columns)


def _write_parquet(results: Path, written: Path) -> None:
    import pyarrow

    parquet = parquet_module()
    columns = _columns(_records(results))
    try:
        tables = (_table(rows, columns) for rows in _batches(results))
        schemas = [table.schema for table in tables]
        schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
        with parquet.ParquetWriter(written, schema) as writer:
            for rows in _batches(results):
                writer.write_table(_table(rows, columns, schema))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise RunError(
            f"{error}; parquet has one type for a column. All results are in {results}; "
            "pass --output-format jsonl, or make the types of the input's fields agree"
        ) from error


def _batches(results: Path) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for record in _records(results):
        batch.append(record)
        if len(batch) == PARQUET_BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _table(rows: list[Row], columns: list[str], schema: Any = None) -> Any:
    import pyarrow

    if schema is not None:
        return pyarrow.Table.from_pylist(rows, schema=schema)
    # from_pylist takes the columns from the first row alone
    arrays = [pyarrow.array([row.get(name) for row in rows]) for name in columns]
    return pyarrow.table(dict(zip(columns, arrays, strict=True)))
