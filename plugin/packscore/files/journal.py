"""What a run has written: the output and the error file, whole lines only, safe to be killed.

Every record of the input ends as one line of one of the two files. A line counts once its newline
is there: a torn one is cut when the run is resumed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from packscore.files.failures import RunError
from packscore.files.records import BadRecord, Readable
from packscore.files.sources import close_sink, is_stream, open_sink


class UnwritableError(ValueError):
    """A record or result holds what JSON does not have, or lists in lists without end."""


class Journal(Protocol):
    """Where results and errors go."""

    num_bad: int

    def is_reported(self, line: int) -> bool:
        """Whether an earlier run wrote this record of the input to the error file."""
        ...

    def take_done(self, record: Readable) -> bool:
        """Whether an earlier run wrote the result of this record, which must be the next one."""
        ...

    def check_all_taken(self) -> None:
        """Refuse an output that holds more than the input."""
        ...

    def write_result(self, record: Readable, result: dict[str, Any]) -> None:
        """Append the result of a record."""
        ...

    def write_error(self, bad: BadRecord) -> None:
        """Append a record that cannot be scored."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


def to_line(value: dict[str, Any]) -> bytes:
    """One line of JSON.

    Raises:
      UnwritableError: a number is not finite, or what it holds is nested too deep.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise UnwritableError(f"cannot be written as JSON: {error}") from error
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair in a carried field: written as it came
        return json.dumps(value).encode() + b"\n"


def error_line(bad: BadRecord) -> bytes:
    """One line of the error file; what the record is known by is left out if JSON has no such."""
    try:
        return to_line({"line": bad.line, **bad.fields, "reason": bad.reason})
    except UnwritableError:
        return to_line({"line": bad.line, "reason": bad.reason})


class FileJournal:
    """The journal in two files; those of an earlier run are continued.

    Args:
      results: JSON lines of the results.
      errors: JSON lines of what could not be scored; a stream, or a file that is made with the
        first of them.

    Raises:
      RunError: a file holds what no run wrote.
    """

    def __init__(self, results: Path, errors: Path) -> None:
        self._results_path, self._errors_path = results, errors
        self._results = _open_whole_lines(results)
        self._errors: BinaryIO | None = None
        self._reported: Iterator[int] = iter(())
        self._errors_stay = not is_stream(errors)
        self.num_bad = 0
        if not self._errors_stay:
            self._errors = open_sink(errors)
        elif errors.exists():
            self._errors = _open_whole_lines(errors)
            self._reported = _lines_reported(errors, os.path.getsize(errors))
            self.num_bad = sum(1 for _ in _lines_reported(errors, os.path.getsize(errors)))
        self._next_reported = next(self._reported, None)
        self._errors_unsafe = False
        self._done = _lines_of(results, os.path.getsize(results))
        self._next_done = next(self._done, None)

    def is_reported(self, line: int) -> bool:
        """Whether the error file has this line of the input; they are met in their order."""
        if line != self._next_reported:
            return False
        self._next_reported = next(self._reported, None)
        return True

    def take_done(self, record: Readable) -> bool:
        """Whether the output has the record; its lines are met in the order of the input.

        Raises:
          RunError: the next line of the output is another record's.
        """
        if self._next_done is None:
            return False
        carried = to_line(record.fields).removesuffix(b"}\n") + (b", " if record.fields else b"")
        if not self._next_done.startswith(carried):
            raise RunError(
                f"--resume: {self._results_path} does not hold the record of line {record.line} "
                "of INPUT where it should be; pass --overwrite to begin again"
            )
        self._next_done = next(self._done, None)
        return True

    def check_all_taken(self) -> None:
        """Refuse an output that holds more than the input.

        Raises:
          RunError: it does.
        """
        if self._next_done is not None:
            raise RunError(
                f"--resume: {self._results_path} holds more records than INPUT; "
                "pass --overwrite to begin again"
            )
        if self._next_reported is not None:
            raise RunError(
                f"--resume: {self._errors_path} has line {self._next_reported} of INPUT, which is "
                "not bad there; pass --overwrite to begin again"
            )

    def write_result(self, record: Readable, result: dict[str, Any]) -> None:
        """Append a result; the errors before it are on the disk first."""
        line = to_line({**record.fields, **result})
        if self._errors_unsafe and self._errors is not None:
            os.fsync(self._errors.fileno())
            self._errors_unsafe = False
        self._results.write(line)
        self._results.flush()

    def write_error(self, bad: BadRecord) -> None:
        """Append an error."""
        if self._errors is None:
            self._errors = _open_whole_lines(self._errors_path)
        self._errors.write(error_line(bad))
        self._errors.flush()
        self._errors_unsafe = self._errors_stay
        self.num_bad += 1

    def close(self) -> None:
        """Close both files, on the disk; a stream has none to be on."""
        if self._errors is not None and not self._errors_stay:
            close_sink(self._errors)
            self._errors = None
        for file in (self._errors, self._results):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
                file.close()


class StreamJournal:
    """The journal for a stream: nothing can be resumed."""

    def __init__(self, results: BinaryIO, errors: BinaryIO) -> None:
        self._results, self._errors = results, errors
        self.num_bad = 0

    def is_reported(self, line: int) -> bool:
        """Never."""
        return False

    def take_done(self, record: Readable) -> bool:
        """Never."""
        return False

    def check_all_taken(self) -> None:
        """Nothing was there before."""

    def write_result(self, record: Readable, result: dict[str, Any]) -> None:
        """Write a result."""
        self._results.write(to_line({**record.fields, **result}))
        self._results.flush()

    def write_error(self, bad: BadRecord) -> None:
        """Write an error."""
        self._errors.write(error_line(bad))
        self._errors.flush()
        self.num_bad += 1

    def close(self) -> None:
        """Close both, but for what every process has open."""
        for file in (self._results, self._errors):
            close_sink(file)


def _open_whole_lines(path: Path) -> BinaryIO:
    """Open for appending, without the torn line that a killed run may have left at the end."""
    file = path.open("r+b" if path.exists() else "x+b")
    file.truncate(_whole_lines_size(file))
    file.seek(0, os.SEEK_END)
    return file


def _whole_lines_size(file: BinaryIO) -> int:
    """Bytes without the last line where that is torn: no newline, or no JSON before it."""
    size = file.seek(0, os.SEEK_END)
    start = _line_start(file, size)
    file.seek(start)
    line = file.read(size - start)
    return size if line.endswith(b"\n") and _is_json(line) else start


def _line_start(file: BinaryIO, end: int, step: int = 1 << 16) -> int:
    """Where the line begins whose last byte (its newline, if it has one) is before `end`."""
    position = end - 1
    while position > 0:
        low = max(0, position - step)
        file.seek(low)
        found = file.read(position - low).rfind(b"\n")
        if found >= 0:
            return low + found + 1
        position = low
    return 0


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _lines_of(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while file.tell() < size:
            yield file.readline()


def _lines_reported(errors: Path, size: int) -> Iterator[int]:
    for line in _lines_of(errors, size):
        try:
            yield int(json.loads(line)["line"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"--resume: {errors} holds {line[:60]!r}, which is no error of a run; "
                "pass --overwrite to begin again"
            ) from error
