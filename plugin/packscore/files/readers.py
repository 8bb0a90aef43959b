"""Readers of JSONL, tables and parquet: records in order as they stand, the bad ones with why."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NoReturn, Protocol

from packscore.files.failures import UsageError
from packscore.files.lines import Lines
from packscore.files.records import (
    BadRecord,
    BadValueError,
    Fields,
    MisfitError,
    Raw,
)
from packscore.files.sources import COMPRESSED_SUFFIXES, Source, is_stream

FORMATS = ("jsonl", "csv", "tsv", "parquet")
TABLES = ("csv", "tsv")
SUFFIXES = {f".{name}": name for name in FORMATS} | {".ndjson": "jsonl", ".tab": "tsv"}
# What may stand between columns, in the order in which a header is tried with them.
DELIMITERS = (",", "\t", ";", "|")
DELIMITER_NAMES = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}


class Reader(Protocol):
    """A file of records; `position` out of `total` is how far it has been read."""

    table: bool  # whether it has columns, and each row one item
    measured: bool  # whether `position` is how much of the records was taken

    @property
    def total(self) -> int | None:
        """The end of `position`, where it is known."""
        ...

    @property
    def position(self) -> int:
        """What has been read, in the unit of `total`."""
        ...

    @property
    def bytes_read(self) -> int:
        """The same in bytes."""
        ...

    def described(self) -> str:
        """The format, in words."""
        ...

    def __iter__(self) -> Iterator[Raw]: ...


def format_of(path: str, given: str | None, option: str) -> str:
    """The format of a file: as given, or by its suffix; JSONL for streams that have none.

    Raises:
      UsageError: the suffix says nothing.
    """
    if given is not None:
        return given
    name = Path(path).name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    suffix = Path(name).suffix
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if is_stream(path):
        return "jsonl"
    raise UsageError(
        f"{path} has the suffix {suffix!r}, which is none of {', '.join(SUFFIXES)}; pass {option}"
    )


class JsonlReader:
    """One JSON object on each line; blank lines count and are passed over."""

    table = False

    def __init__(self, source: Source, max_line_bytes: int) -> None:
        self.total = source.total
        self.measured = source.total is not None and source.compression is None
        self._source = source
        self._lines = Lines(source.file, max_line_bytes)

    @property
    def position(self) -> int:
        """Bytes read."""
        return self._source.position

    bytes_read = position

    def described(self) -> str:
        """The format, in words."""
        return f"jsonl{_compressed(self._source)}"

    def __iter__(self) -> Iterator[Raw]:
        while True:
            try:
                line = next(self._lines)
            except StopIteration:
                return
            except BadValueError as error:
                yield BadRecord(self._lines.number, f"the line {error}")
                continue
            if line.strip():
                yield self._parse(line)

    def _parse(self, line: str) -> Raw:
        number = self._lines.number
        try:
            value = json.loads(line, parse_constant=_refuse_constant, parse_float=_finite)
        except json.JSONDecodeError as error:
            return BadRecord(number, f"is not JSON: {error.msg} at character {error.colno}")
        except (ValueError, RecursionError) as error:
            return BadRecord(number, f"is not JSON that can be read: {error}")
        return number, value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is beyond the range of numbers")
    return value


class TableReader:
    """One (query, item) pair on each row, below a header that names the columns.

    Args:
      source: the bytes.
      names: the columns that the header must have, by which the delimiter is told.
      max_line_bytes: longer lines are bad.
      delimiters: those that may stand between columns.

    Raises:
      UsageError: the header does not fit.
    """

    table = True

    def __init__(
        self, source: Source, names: Fields, max_line_bytes: int, delimiters: tuple[str, ...]
    ) -> None:
        self.total = source.total
        self.measured = source.total is not None and source.compression is None
        self._source = source
        self._lines = Lines(source.file, max_line_bytes)
        self._max_line_bytes = max_line_bytes
        try:
            first = next(self._lines, "")
        except BadValueError as error:
            raise UsageError(f"INPUT: the header {error}") from error
        with self._field_limit():
            self._delimiter = _delimiter_of(first, names, delimiters)
            lines = chain([first], self._lines)
            self._rows: Iterator[list[str]] = (
                map(_tabbed, lines)
                if self._delimiter == "\t"
                else csv.reader(lines, strict=True, delimiter=self._delimiter)
            )
            self._header = _header(self._rows, names)

    @property
    def position(self) -> int:
        """Bytes read."""
        return self._source.position

    bytes_read = position

    def described(self) -> str:
        """The format, in words."""
        between = "a tab" if self._delimiter == "\t" else repr(self._delimiter)
        return f"csv with {between} between columns{_compressed(self._source)}"

    def __iter__(self) -> Iterator[Raw]:
        with self._field_limit():
            while True:
                line = self._lines.number + 1
                try:
                    row = next(self._rows)
                    if row and len(row) != len(self._header):
                        raise BadValueError(
                            f"has {len(row)} fields, and the header has {len(self._header)}"
                        )
                except StopIteration:
                    return
                except (BadValueError, csv.Error) as error:
                    yield BadRecord(line, f"the row {error}")
                    continue
                if row:
                    yield line, dict(zip(self._header, row, strict=True))

    @contextmanager
    def _field_limit(self) -> Iterator[None]:
        # a setting of the whole process: it stays as this reader needs it while it reads
        found_limit = csv.field_size_limit(self._max_line_bytes)
        try:
            yield
        finally:
            csv.field_size_limit(found_limit)


def _tabbed(line: str) -> list[str]:
    """A row between tabs: always one line; quotes that do not enclose a field are text.

    Files of this kind come with quotes as spreadsheets write them, and without any rule for them,
    where one that is never closed would take all rows behind it into its field.
    """
    try:
        return next(csv.reader([line], strict=True, delimiter="\t"))
    except csv.Error:
        return next(csv.reader([line], delimiter="\t", quoting=csv.QUOTE_NONE))


def _delimiter_of(line: str, names: Fields, delimiters: tuple[str, ...]) -> str:
    """The first delimiter with which a header has the columns."""
    for delimiter in delimiters:
        try:
            _check_header(next(csv.reader([line], delimiter=delimiter), []), names)
        except (MisfitError, csv.Error):
            continue
        return delimiter
    return delimiters[0]


def _header(rows: Iterator[list[str]], names: Fields) -> list[str]:
    try:
        header = next(rows, [])
    except (BadValueError, csv.Error) as error:
        raise UsageError(f"INPUT: the header {error}") from error
    repeated = {name for name in header if header.count(name) > 1}
    if repeated:
        raise UsageError(f"INPUT: the header names {sorted(repeated)} more than once")
    try:
        _check_header(header, names)
    except MisfitError as error:
        raise UsageError(f"INPUT: the header is {header}: {error} (or --delimiter)") from error
    return header


def _check_header(header: list[str], names: Fields) -> None:
    names.check_header(dict(zip(header, header, strict=True)))


def delimiter_from(option: str) -> str:
    """What `--delimiter` says: one character, or the name of one.

    Raises:
      UsageError: it says nothing that can stand between columns.
    """
    delimiter = DELIMITER_NAMES.get(option, option)
    if len(delimiter) != 1 or delimiter in '"\r\n':
        names = ", ".join(name for name in DELIMITER_NAMES if name.isalpha())
        raise UsageError(f"--delimiter={option!r} must be one character, or one of {names}")
    return delimiter


def _compressed(source: Source) -> str:
    return f", {source.compression}" if source.compression else ""
