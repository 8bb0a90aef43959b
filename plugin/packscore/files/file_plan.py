"""Which files a run reads and writes, and the note beside the output that says what made it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packscore.files.failures import RunError, UsageError
from packscore.files.readers import FORMATS, format_of, parquet_module

HASH_CHUNK_BYTES = 1 << 20
# A hash of the ends of a weights file tells a new checkpoint as well as one of all of it.
ENDS_BYTES = 1 << 20


@dataclass(frozen=True)
class FilePlan:
    """The files of one run; "-" is stdin or stdout.

    Args:
      input: to read.
      output: to write.
      errors: for records that cannot be scored; None is stderr.
      input_format, output_format: "jsonl", "csv" or "parquet".
      resume, overwrite: what to do with an output that is there.
    """

    input: str
    output: str
    errors: Path | None
    input_format: str
    output_format: str
    resume: bool
    overwrite: bool

    @property
    def results(self) -> Path:
        """Where results are appended, as JSON lines: the output, or a part-file of it."""
        if self.output_format == "jsonl":
            return Path(self.output)
        return Path(f"{self.output}.part.jsonl")

    @property
    def note(self) -> Path:
        """The file that says what the output was made of."""
        return Path(f"{self.output}.packscore.json")


def plan_files(
    input_path: str,
    output_path: str,
    errors_path: Path | None,
    input_format: str | None,
    output_format: str | None,
    *,
    resume: bool,
    overwrite: bool,
) -> FilePlan:
    """Check the files before anything is loaded.

    Raises:
      UsageError: a file is missing, in the way, or used twice; or a format is not known.
    """
    for option, given in (("--format", input_format), ("--output-format", output_format)):
        if given is not None and given not in FORMATS:
            raise UsageError(f"{option}={given!r} must be one of {', '.join(FORMATS)}")
    if resume and overwrite:
        raise UsageError("--resume keeps an output and --overwrite removes it; pass one")
    if resume and "-" in (input_path, output_path):
        raise UsageError("--resume needs files: what went through '-' cannot be read again")
    if errors_path is None and output_path != "-":
        errors_path = Path(f"{output_path}.errors.jsonl")
    plan = FilePlan(
        input_path,
        output_path,
        errors_path,
        format_of(input_path, input_format, "--format"),
        format_of(output_path, output_format, "--output-format"),
        resume,
        overwrite,
    )
    _check(plan)
    return plan


def _check(plan: FilePlan) -> None:
    if plan.input != "-" and not Path(plan.input).is_file():
        raise UsageError(f"INPUT={plan.input} is not a file")
    if "parquet" in (plan.input_format, plan.output_format):
        parquet_module()
    if plan.output == "-":
        if plan.output_format != "jsonl":
            raise UsageError(f"--output=- is written as jsonl, not as {plan.output_format}")
        return
    used = [Path(plan.input), Path(plan.output), plan.results, plan.note]
    used += [plan.errors] if plan.errors else []
    different = {path.resolve() for path in used}
    expected = len(used) - (plan.results == Path(plan.output))
    if len(different) < expected:
        raise UsageError("INPUT, --output and --errors must be different files")
    if not Path(plan.output).parent.is_dir():
        raise UsageError(f"--output={plan.output}: there is no folder {Path(plan.output).parent}")
    if plan.resume or plan.overwrite:
        return
    for path in (Path(plan.output), plan.results, plan.errors):
        if path is not None and path.exists():
            raise UsageError(f"{path} exists; pass --resume to go on, or --overwrite")


def begin(plan: FilePlan, settings: dict[str, Any]) -> bool:
    """Write the note of a new run, or compare it with this one.

    Args:
      plan: the files, of which neither input nor output is a stream.
      settings: everything that the scores depend on, as JSON has it.

    Returns:
      Whether the output is complete already.

    Raises:
      RunError: the output is of other options, another model or another input.
    """
    settings = {**settings, "input": fingerprint(Path(plan.input))}
    settings |= {"errors": str(plan.errors), "output_format": plan.output_format}
    if plan.overwrite:
        for path in (plan.note, plan.results, Path(plan.output), plan.errors):
            if path is not None:
                path.unlink(missing_ok=True)
    if plan.note.exists():
        if plan.resume:
            complete = _compare(plan, json.loads(json.dumps(settings)))
            return complete and Path(plan.output).exists()
    elif plan.results.exists() or Path(plan.output).exists():
        raise RunError(
            f"--resume: {plan.note} is missing, so nothing says what made {plan.output}; "
            "pass --overwrite to begin again"
        )
    write_note(plan, settings, complete=False)
    return False


def _compare(plan: FilePlan, settings: dict[str, Any]) -> bool:
    try:
        note = json.loads(plan.note.read_text())
        made_with, complete = dict(note["settings"]), bool(note["complete"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"--resume: {plan.note} cannot be read ({error}); pass --overwrite to begin again"
        ) from error
    for name in sorted({*made_with, *settings}):
        if made_with.get(name) != settings.get(name):
            raise RunError(
                f"--resume: {plan.output} was made with {name}={made_with.get(name)!r}, and now "
                f"it is {settings.get(name)!r}; pass the same, or --overwrite to begin again"
            )
    return complete


def write_note(plan: FilePlan, settings: dict[str, Any], *, complete: bool) -> None:
    """Put the note beside the output, all of it or none."""
    note = {"complete": complete, "settings": settings}
    written = Path(f"{plan.note}.tmp")
    with written.open("w") as file:
        json.dump(note, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    written.replace(plan.note)


def mark_complete(plan: FilePlan) -> None:
    """Say in the note that the output is whole."""
    write_note(plan, json.loads(plan.note.read_text())["settings"], complete=True)


def fingerprint(path: Path) -> str:
    """A hash of all of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def model_fingerprint(name: str, commit: str | None) -> str:
    """What tells one model from another: a hub's commit, or a hash over a folder.

    The folder's hash is of names, sizes and the ends of every file, so that it takes no time.
    """
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{commit}"
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                digest.update(file.read(ENDS_BYTES))
                file.seek(max(0, size - ENDS_BYTES))
                digest.update(file.read(ENDS_BYTES))
    return f"sha256:{digest.hexdigest()}"
