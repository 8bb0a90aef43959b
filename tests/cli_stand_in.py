"""Runs over files without a model: what tests of reading, writing and going on share."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyarrow import parquet

from packscore import Usage
from packscore.cli import run as running
from packscore.cli.columns import Shape, reserved_fields
from packscore.cli.tasks import Task
from packscore.files.file_plan import FilePlan, plan_files
from packscore.files.inputs import open_input
from packscore.files.locks import locked
from packscore.files.look import ReadOptions
from packscore.files.records import Record

# An output of every kind.
OUTPUTS = ("out.jsonl", "out.jsonl.gz", "out.csv", "out.csv.gz", "out.tsv", "out.parquet")


class StandIn:
    """In the place of a scorer: scores of lengths, and the lines that were scored."""

    def __init__(self, command: str, before: Callable[[Record], object]) -> None:
        self.lines: list[int] = []
        self._command, self._before = command, before

    def __call__(self, record: Record) -> tuple[dict[str, Any], Usage]:
        self._before(record)
        self.lines.append(record.line)
        scores = [[len(item) / 7, len(record.query) / 3] for item in record.items]
        ids = [{} if record.ids is None else {"id": one} for one in record.ids or scores]
        ranking = [
            {"corpus_id": i, **ids[i], "score": scores[i][0]} for i in reversed(range(len(scores)))
        ]
        result: dict[str, Any] = {"ranking": ranking}
        if self._command == "score":
            known = {} if record.ids is None else {"item_ids": record.ids}
            result = {**known, "scores": scores}
        return result, Usage(1, 1, 0, 0, 0, (), (), "packed", "segment")

    def encode(self, record: Record) -> Any:
        raise AssertionError("a run encodes nothing by itself")


def run_stand_in(
    plan: FilePlan,
    settings: dict[str, Any] | None = None,
    read: ReadOptions | None = None,
    command: str = "score",
    before: Callable[[Record], object] = bool,
) -> list[int]:
    """One run; the lines that it scored. `before` is called with every record first."""
    task = StandIn(command, before)
    given = {"softmax": False} if settings is None else settings
    read = read or ReadOptions()
    reserved = reserved_fields(plan.output_format, command)
    with (
        open_input(plan.input, plan.input_format, read, reserved) as entries,
        locked(plan.written),
    ):
        shape = Shape("query", command, ["no", "yes"], entries.rows)
        running.run_file(plan, entries, Task(task, encode=task.encode), given, shape, quiet=True)
    return task.lines


def plan_of(output: str, given: str = "in.jsonl", **options: bool) -> FilePlan:
    """A plan that goes on with what is there."""
    choice = {"resume": True, "overwrite": False, **options}
    return plan_files(given, output, None, None, None, **choice)


def rows_of(output: str) -> list[dict[str, Any]]:
    """What stands in an output of any format; of tables all cells are text."""
    path = Path(output)
    if output.endswith("parquet"):
        found: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return found
    data = gzip.decompress(path.read_bytes()) if output.endswith("gz") else path.read_bytes()
    if ".jsonl" in output:
        return [json.loads(line) for line in data.splitlines()]
    delimiter = "\t" if ".tsv" in output else ","
    return list(csv.DictReader(data.decode().splitlines(True), delimiter=delimiter))
