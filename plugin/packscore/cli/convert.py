"""From the JSON lines of a run to the file that was asked for."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from packscore.cli.columns import Row, Shape, as_text, cell, columns_of
from packscore.cli.parquet import write_parquet

# Of JSON lines that are Python objects at a time; a longer line is alone.
BATCH_BYTES = 1 << 18


def convert(results: Path, output: Path, output_format: str, shape: Shape) -> list[str]:
    """Write the output from the part-file, all of it or none.

    Args:
      results: the part-file, JSON lines.
      output: the file to write; compressed where its name ends in .gz.
      output_format: one of `FORMATS`.
      shape: of the results.

    Returns:
      Names of columns that hold JSON, for want of a type: in parquet a column has one.
    """
    written, in_json = Path(f"{output}.packscore.tmp"), list[str]()
    if output_format == "parquet":
        in_json = write_parquet(lambda: batches_of(results, shape.command), written, shape)
    else:
        with _bytes_of(written, compressed=output.suffix.lower() == ".gz") as file:
            if output_format == "jsonl":
                with results.open("rb") as lines:
                    shutil.copyfileobj(lines, file)
            else:
                _write_table(results, file, "\t" if output_format == "tsv" else ",", shape)
    with written.open("rb+") as done:
        os.fsync(done.fileno())
    written.replace(output)
    return in_json


@contextmanager
def _bytes_of(path: Path, *, compressed: bool) -> Iterator[IO[bytes]]:
    with path.open("wb") as raw:
        if compressed:
            # the same bytes at any time and under any name
            with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
                yield cast(IO[bytes], file)
        else:
            yield raw


def _records(results: Path) -> Iterator[Row]:
    with results.open("rb") as file:
        for line in file:
            yield json.loads(line)


def batches_of(results: Path, command: str) -> Iterator[list[Row]]:
    """Records, as many as have some bytes; ids as text, for a column of parquet has one type."""
    with results.open("rb") as file:
        while lines := file.readlines(BATCH_BYTES):
            yield [_with_text_ids(json.loads(line), command) for line in lines]


def _with_text_ids(record: Row, command: str) -> Row:
    if command == "decide":
        return record
    if "item_ids" in record:
        record["item_ids"] = [_text_id(one) for one in record["item_ids"]]
    for entry in record.get("ranking", ()):
        if "id" in entry:
            entry["id"] = _text_id(entry["id"])
    return record


def _text_id(one: str | float | None) -> str | None:
    return None if one is None else as_text(str(one))


def _rows(record: Row, shape: Shape) -> Iterator[Row]:
    """One row for each item of a record: in their order for scores, best first for a ranking."""
    record = dict(record)
    scores, ranking = record.pop("scores", None), record.pop("ranking", None)
    truncated = set(record.pop("truncated_items", ()))
    record.pop("non_finite_items", None)  # their cells are empty
    items, ids = record.pop("items", None), record.pop("item_ids", None)
    listed = {name for name in record if shape.rows and isinstance(record[name], list)}
    for place in range(len(ranking if scores is None else scores)):
        entry = {"corpus_id": place} if ranking is None else dict(ranking[place])
        i = entry.pop("corpus_id")
        row = {name: value[i] if name in listed else value for name, value in record.items()}
        row["corpus_id"] = i
        if ids is not None or "id" in entry:
            row["item_id"] = entry.pop("id") if ids is None else ids[i]
        row |= entry
        if items is not None:
            row["item"] = items[i]
        if scores is not None:
            labelled = zip(shape.labels, scores[i], strict=True)
            row |= {f"score_{label}": p for label, p in labelled}
        yield row | {"truncated": i in truncated}


def _write_table(results: Path, file: IO[bytes], delimiter: str, shape: Shape) -> None:
    def rows() -> Iterator[Row]:
        for record in _records(results):
            yield from _rows(record, shape)

    columns = columns_of(rows)
    if not columns:  # no record was good
        scores = ["score"] if shape.command == "rank" else [f"score_{x}" for x in shape.labels]
        columns = [shape.query_holder, "corpus_id", *scores, "truncated"]
    text = io.TextIOWrapper(file, "utf-8", newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(map(cell, columns))
    for row in rows():
        writer.writerow([cell(row.get(name)) for name in columns])
    text.flush()
    text.detach()
