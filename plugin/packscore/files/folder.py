"""A run's output in parts: a folder of files that appear whole, and the note of what made them.

Parts are numbered in the order of the input. A part is done when its file is there: it is written
under another name first and renamed, its errors before it, so that whoever is killed while writing
it, and tries again, leaves each record once.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packscore.files.failures import RunError, UsageError
from packscore.files.file_plan import check_format, check_input, compared, fingerprint, write_json
from packscore.files.parquet import open_parquet, parquet_module
from packscore.files.readers import format_of
from packscore.files.sources import is_stream

PART_FORMATS = ("parquet", "jsonl")
DEFAULT_PART_ROWS = 10_000
MAX_PARTS = 1_000_000  # six digits: the order of names is that of the input
UNDONE_SUFFIX = ".tmp"
NAMES = (*(("part", name) for name in PART_FORMATS), ("errors", "jsonl"))


@dataclass(frozen=True)
class FolderPlan:
    """The files of a run in parts; paths are absolute, for whoever writes may be elsewhere.

    Args:
      input: a parquet file.
      output: the folder.
      output_format: one of `PART_FORMATS`.
      part_rows: rows of the input that a part is made of, about: rows of a query stay together.
      resume, overwrite: what to do with parts that are there.
    """

    input: str
    output: str
    output_format: str
    part_rows: int
    resume: bool
    overwrite: bool

    @property
    def note(self) -> Path:
        """The file that says what the parts were made of; by its name no part of a dataset."""
        return Path(self.output) / "_packscore.json"

    def part(self, number: int) -> Path:
        """The results of a part."""
        return Path(self.output) / f"part-{number:06d}.{self.output_format}"

    def errors(self, number: int) -> Path:
        """Its bad records, if it has some."""
        return Path(self.output) / f"errors-{number:06d}.jsonl"

    def written(self) -> Iterator[Path]:
        """Everything of an earlier run, what it had not finished among it."""
        number = "[0-9]" * 6
        ours = [f"{name}-{number}.{format_}" for name, format_ in NAMES]
        for pattern in (self.note.name, *ours, *(f".{one}.*{UNDONE_SUFFIX}" for one in ours)):
            yield from sorted(Path(self.output).glob(pattern))


def plan_folder(
    input_path: str,
    output_path: str,
    input_format: str | None,
    output_format: str,
    *,
    part_rows: int,
    resume: bool,
    overwrite: bool,
) -> FolderPlan:
    """Check the files before anything is loaded.

    Raises:
      UsageError: the input is no parquet file, or the output no folder of such parts.
    """
    check_format("--input-format", input_format)
    if is_stream(input_path) or format_of(input_path, input_format, "--input-format") != "parquet":
        raise UsageError(
            f"INPUT={input_path}: --ray reads ranges of a parquet file, and no stream or other "
            "format; convert it, or leave --ray out"
        )
    check_input(input_path)
    _check_parquet(input_path)
    if output_format not in PART_FORMATS:
        raise UsageError(
            f"--output-format={output_format!r}: parts are written as {' or '.join(PART_FORMATS)}"
        )
    if resume and overwrite:
        raise UsageError("--resume keeps an output and --overwrite removes it; pass one")
    if is_stream(output_path) or Path(output_path).is_file():
        raise UsageError(f"--output={output_path} must be a folder: --ray writes parts into it")
    if not Path(output_path).absolute().parent.is_dir():
        parent = Path(output_path).parent
        raise UsageError(f"--output={output_path}: there is no folder {parent}")
    plan = FolderPlan(
        os.path.realpath(input_path),
        os.path.realpath(output_path),
        output_format,
        part_rows,
        resume,
        overwrite,
    )
    check_empty(plan)
    return plan


def _check_parquet(path: str) -> None:
    parquet_module()
    import pyarrow as pa

    try:
        with open_parquet(path):
            pass
    except pa.ArrowInvalid as error:
        raise UsageError(f"INPUT={path} is no parquet file: {error}") from error


def check_empty(plan: FolderPlan) -> None:
    """Refuse a folder with anything in it, unless the options say what to do.

    Raises:
      UsageError: it has something in it.
    """
    folder = Path(plan.output)
    if plan.resume or plan.overwrite or not folder.exists():
        return
    if found := next((path for path in folder.iterdir() if path.suffix != ".lock"), None):
        raise UsageError(
            f"--output={plan.output} holds {found.name}; pass --resume to go on, or --overwrite"
        )


def begin_folder(plan: FolderPlan, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the note of a new run, or compare it with this one.

    Args:
      plan: of the run.
      settings: everything that the scores depend on, as JSON has it.

    Returns:
      The settings as the note has them.

    Raises:
      RunError: the parts are of other options, another model or another input.
    """
    settings = {**settings, "input": fingerprint(Path(plan.input))}
    settings |= {"output_format": plan.output_format, "part_rows": plan.part_rows}
    settings = json.loads(json.dumps(settings))
    if plan.overwrite:
        # the note is the first of them: without it nobody takes the other files for parts
        for path in plan.written():
            path.unlink()
    elif plan.note.exists():
        compared(plan.note, plan.output, settings)
        remove_undone(plan)
        return settings
    elif found := next(plan.written(), None):
        raise RunError(
            f"--resume: {plan.note} is missing, so nothing says what made {found.name}; "
            "pass --overwrite to begin again"
        )
    write_json(plan.note, {"complete": False, "settings": settings})
    return settings


def remove_undone(plan: FolderPlan) -> None:
    """Remove what killed writers left under other names."""
    for path in plan.written():
        if path.suffix == UNDONE_SUFFIX:
            path.unlink(missing_ok=True)


def finish_folder(plan: FolderPlan, settings: dict[str, Any], parts: int) -> None:
    """Say in the note that all parts are there."""
    remove_undone(plan)
    write_json(plan.note, {"complete": True, "parts": parts, "settings": settings})


def put_part(plan: FolderPlan, number: int, results: Path, errors: Path) -> None:
    """Make a part of files that are elsewhere: its errors first, for it is done with its results.

    Args:
      plan: of the run.
      number: of the part.
      results: its results, in the plan's format.
      errors: its bad records; no file where it has none.
    """
    if errors.exists():
        _put(errors, plan.errors(number))
    else:
        plan.errors(number).unlink(missing_ok=True)  # of a try that met other ones
    _put(results, plan.part(number))


def _put(source: Path, target: Path) -> None:
    """Copy a file, all of it or none, whoever else does the same."""
    writer = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    undone = target.with_name(f".{target.name}.{writer}{UNDONE_SUFFIX}")
    with source.open("rb") as read, undone.open("wb") as written:
        shutil.copyfileobj(read, written)
        written.flush()
        os.fsync(written.fileno())
    undone.replace(target)
