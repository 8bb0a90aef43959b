"""Which files a run reads and writes, and the note beside the output that says what made it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packscore.files.failures import RunError, UsageError
from packscore.files.parquet import parquet_module
from packscore.files.readers import FORMATS, format_of
from packscore.files.sources import is_stream

HASH_CHUNK_BYTES = 1 << 20
# A hash of the ends of a weights file tells a new checkpoint as well as one of all of it.
ENDS_BYTES = 1 << 20
OUTPUT_COMPRESSION = ".gz"
UNWRITTEN_COMPRESSION = (".bz2", ".xz", ".zst", ".zip")


@dataclass(frozen=True)
class FilePlan:
    """The files of one run; "-" is stdin or stdout.

    Args:
      input: to read.
      output: to write.
      errors: for records that cannot be scored; None is stderr.
      input_format, output_format: one of `FORMATS`.
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
    def streams(self) -> bool:
        """Whether the output is written as it comes, and is nothing to go on with."""
        return is_stream(self.output)

    @property
    def converts(self) -> bool:
        """Whether the output is made of the results when all of them are there."""
        return self.output_format != "jsonl" or self.is_compressed

    @property
    def is_compressed(self) -> bool:
        """Whether the output is compressed."""
        return self.output.lower().endswith(OUTPUT_COMPRESSION)

    @property
    def results(self) -> Path:
        """Where results are appended, as JSON lines: the output, or a part-file of it."""
        return Path(f"{self.output}.part.jsonl" if self.converts else self.output)

    @property
    def note(self) -> Path:
        """The file that says what the output was made of."""
        return Path(f"{self.output}.packscore.json")

    @property
    def error_file(self) -> Path | None:
        """`errors`, where that is a file."""
        return None if self.errors is None or is_stream(self.errors) else self.errors

    @property
    def written(self) -> list[Path]:
        """Files that only one run may have: no streams."""
        outputs = [] if self.streams else [Path(self.output)]
        return outputs + ([self.error_file] if self.error_file else [])


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
    for option, given in (("--input-format", input_format), ("--output-format", output_format)):
        check_format(option, given)
    if resume and overwrite:
        raise UsageError("--resume keeps an output and --overwrite removes it; pass one")
    if not is_stream(output_path):
        # what is written beside it, and renamed over it, belongs to the file and not to a link
        output_path = os.path.realpath(output_path) if os.path.islink(output_path) else output_path
        errors_path = errors_path or Path(f"{output_path}.errors.jsonl")
    plan = FilePlan(
        input_path,
        output_path,
        errors_path,
        format_of(input_path, input_format, "--input-format"),
        format_of(output_path, output_format, "--output-format"),
        resume,
        overwrite,
    )
    _check(plan)
    check_free(plan)
    return plan


def check_format(option: str, given: str | None) -> None:
    """Refuse a format that is not known.

    Raises:
      UsageError: it is none of `FORMATS`.
    """
    if given is not None and given not in FORMATS:
        raise UsageError(f"{option}={given!r} must be one of {', '.join(FORMATS)}")


def check_input(path: str) -> None:
    """Refuse an input that cannot be read.

    Raises:
      UsageError: there is no such file or stream.
    """
    if not is_stream(path) and not Path(path).is_file():
        raise UsageError(f"INPUT={path} is not a file")


def _check(plan: FilePlan) -> None:
    check_input(plan.input)
    streams = [path for path in (plan.input, plan.output) if is_stream(path)]
    if plan.errors is not None and plan.error_file is None:
        streams.append(str(plan.errors))
    if plan.resume and streams:
        raise UsageError(
            f"--resume needs files: what went through {streams[0]!r} cannot be read again"
        )
    if "parquet" in (plan.input_format, plan.output_format):
        parquet_module()
    if plan.streams:
        if plan.output_format != "jsonl":
            raise UsageError(
                f"--output={plan.output} is written as jsonl, not as {plan.output_format}"
            )
    else:
        _check_output(plan)


def _check_output(plan: FilePlan) -> None:
    used: list[str | Path] = [plan.output, plan.note, *([plan.errors] if plan.errors else [])]
    used += [plan.results] if plan.converts else []
    used += [] if plan.input == "-" else [plan.input]
    if len({os.path.realpath(path) for path in used}) < len(used):
        raise UsageError("INPUT, --output and --errors must be different files")
    folder = Path(plan.output).parent
    if not folder.is_dir():
        raise UsageError(f"--output={plan.output}: there is no folder {folder}")
    if Path(plan.output).is_dir():
        raise UsageError(f"--output={plan.output} is a folder")
    suffix = Path(plan.output).suffix.lower()
    if suffix in UNWRITTEN_COMPRESSION:
        raise UsageError(
            f"--output={plan.output}: {suffix} is not written; name a {OUTPUT_COMPRESSION} file"
        )
    if plan.is_compressed and plan.output_format == "parquet":
        raise UsageError(f"--output={plan.output}: parquet compresses its columns itself")


def check_free(plan: FilePlan) -> None:
    """Refuse what an earlier run left, unless the options say what to do with it.

    Raises:
      UsageError: a file is there.
    """
    if plan.resume or plan.overwrite:
        return
    for path in [*plan.written, *([plan.results] if plan.converts else [])]:
        if path.exists():
            raise UsageError(f"{path} exists; pass --resume to go on, or --overwrite")


def begin(plan: FilePlan, settings: dict[str, Any]) -> bool:
    """Write the note of a new run, or compare it with this one.

    Args:
      plan: the files, of which the output is no stream.
      settings: everything that the scores depend on, as JSON has it.

    Returns:
      Whether the output is complete already.

    Raises:
      RunError: the output is of other options, another model or another input.
    """
    digest = None if is_stream(plan.input) else fingerprint(Path(plan.input))
    settings = {**settings, "input": digest}
    settings |= {"errors": str(plan.errors), "output_format": plan.output_format}
    if plan.overwrite:
        # what says that records are done goes before those records: a run may be killed here
        for path in (plan.note, plan.error_file, plan.results, Path(plan.output)):
            if path is not None:
                path.unlink(missing_ok=True)
    if plan.note.exists():
        if plan.resume:
            note = compared(plan.note, plan.output, json.loads(json.dumps(settings)))
            # one that was cut or removed since is not complete
            return bool(note["complete"]) and note.get("bytes") == _size_of(plan.output)
    elif any(path.exists() for path in (plan.results, *plan.written)):
        raise RunError(
            f"--resume: {plan.note} is missing, so nothing says what made {plan.output}; "
            "pass --overwrite to begin again"
        )
    write_note(plan, settings, complete=False)
    return False


def compared(path: Path, output: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The note of an output, which must be of the same settings.

    Raises:
      RunError: it is of others, or cannot be read.
    """
    try:
        note: dict[str, Any] = json.loads(path.read_text())
        made_with, _ = dict(note["settings"]), bool(note["complete"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"--resume: {path} cannot be read ({error}); pass --overwrite to begin again"
        ) from error
    for name in sorted({*made_with, *settings}):
        if made_with.get(name) != settings.get(name):
            raise RunError(
                f"--resume: {output} was made with {name}={made_with.get(name)!r}, and now "
                f"it is {settings.get(name)!r}; pass the same, or --overwrite to begin again"
            )
    return note


def write_note(plan: FilePlan, settings: dict[str, Any], *, complete: bool) -> None:
    """Put the note beside the output, all of it or none."""
    size = _size_of(plan.output) if complete else None
    write_json(plan.note, {"complete": complete, "bytes": size, "settings": settings})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a file of JSON, all of it or none."""
    written = Path(f"{path}.tmp")
    with written.open("w") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    written.replace(path)


def _size_of(path: str) -> int | None:
    return os.path.getsize(path) if os.path.exists(path) else None


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
