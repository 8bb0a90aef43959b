"""What a worker does: it loads the model once, and makes parts of ranges of the input."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packscore.cli import tasks
from packscore.cli.columns import reserved_fields
from packscore.cli.convert import batches_of
from packscore.cli.fleet.schema import part_schema
from packscore.cli.load import load
from packscore.cli.options import ModelOptions
from packscore.cli.parquet import write_with_schema
from packscore.cli.run import Counts, run_one
from packscore.errors import PackscoreError
from packscore.files.failures import RunError, UsageError
from packscore.files.file_plan import compared, model_fingerprint
from packscore.files.folder import FolderPlan, put_part
from packscore.files.journal import FileJournal
from packscore.files.look import ReadOptions
from packscore.files.parts import open_part
from packscore.files.records import BadRecord

# What ends a run with one line, and is told by whoever started it.
FAILURES = (PackscoreError, UsageError, RunError, OSError)


@dataclass(frozen=True)
class Job:
    """What all workers of a run are told.

    Args:
      folder: the files.
      read: how the input is read.
      chosen: the model.
      task: the command, one of `tasks.TASKS`, and its own options.
      settings: those of the folder's note.
    """

    folder: FolderPlan
    read: ReadOptions
    chosen: ModelOptions
    task: dict[str, Any]
    settings: dict[str, Any]


class PartWorker:
    """A stage of ranges: takes {"part", "start", "stop"}, and gives {"told"}, JSON of its counts.

    Why a run cannot go on comes back as {"failure"} in the place of counts: an error that is raised
    would come with Ray's traceback, and without its type.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._failure: str | None = None
        try:
            self._load()
        except FAILURES as error:
            self._failure = str(error)

    def __call__(self, batch: Any) -> Any:
        """Make the parts of a batch."""
        import pyarrow as pa

        told = [json.dumps(self._told(**row)) for row in batch.to_pylist()]
        return pa.table({"told": pa.array(told, pa.string())})

    def _load(self) -> None:
        job = self._job
        if not job.folder.note.exists():
            raise RunError(
                f"--output={job.folder.output} is not the same folder on every machine; name one "
                "on storage that all of them share"
            )
        compared(job.folder.note, job.folder.output, job.settings)
        loaded = load(job.chosen)
        found = model_fingerprint(job.chosen.model, loaded.commit)
        if found != job.settings["model"]:
            raise RunError(
                f"--model={job.chosen.model} is another one here ({found}) than where the run was "
                f"started ({job.settings['model']}); give all machines the same"
            )
        command, options = job.task["command"], dict(job.task)
        del options["command"]
        self._task = tasks.TASKS[command](loaded.scorer, **options)
        self._reserved = reserved_fields(job.folder.output_format, command)
        self._texts = bool(options.get("return_documents") or options.get("return_items"))

    def _told(self, part: int, start: int, stop: int) -> dict[str, Any]:
        if self._failure is None:
            try:
                return self._make(part, range(start, stop))
            except FAILURES as error:
                self._failure = f"rows {start + 1:,} to {stop:,} of INPUT: {error}"
        return {"failure": self._failure}

    def _make(self, part: int, rows: range) -> dict[str, Any]:
        folder, counts = self._job.folder, Counts()
        with tempfile.TemporaryDirectory(prefix="packscore-part-") as scratch:
            results, errors = Path(scratch) / "results.jsonl", Path(scratch) / "errors.jsonl"
            with open_part(folder.input, rows, self._job.read, self._reserved) as entries:
                in_rows, journal = entries.rows, FileJournal(results, errors)
                try:
                    for entry in entries:
                        if isinstance(entry, BadRecord):
                            journal.write_error(entry)
                        else:
                            run_one(entry, journal, self._task, frozenset(), counts)
                finally:
                    journal.close()
            if folder.output_format == "parquet":
                lines, results = results, Path(scratch) / "results.parquet"
                command, schema = self._job.task["command"], self._schema(in_rows)
                write_with_schema(lambda: batches_of(lines, command), results, schema, command)
            put_part(folder, part, results, errors)
        return {**vars(counts), "bad": journal.num_bad}

    def _schema(self, in_rows: bool) -> Any:
        path, names = self._job.folder.input, self._job.read.names
        command = self._job.task["command"]
        return part_schema(path, names, command, rows=in_rows, texts=self._texts)
