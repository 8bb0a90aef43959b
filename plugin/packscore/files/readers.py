"""Readers of JSONL, CSV and parquet: records in order, the bad ones with their reason."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol

from packscore.files.failures import RunError, UsageError
from packscore.files.lines import Lines
from packscore.files.records import BadRecord, BadValueError, Entry, FieldNames, Record, to_record

FORMATS = ("jsonl", "csv", "parquet")
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
# The column of a CSV file that holds one item of a row.
DEFAULT_ITEM_COLUMNS = ("item", "document")
PARQUET_BATCH_ROWS = 64


class Reader(Protocol):
    """A file of records; `position` out of `total` is how far it has been read."""

    total: int | None

    @property
    def position(self) -> int:
        """What has been read, in the unit of `total`."""
        ...

    def __iter__(self) -> Iterator[Entry]: ...


def format_of(path: str, given: str | None, option: str) -> str:
    """The format of a file: as given, or by its suffix; JSONL for stdin and stdout.

    Raises:
      UsageError: the suffix says nothing.
    """
    if given is not None:
        return given
    if path == "-":
        return "jsonl"
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"{path} has the suffix {suffix!r}, which is none of {', '.join(SUFFIXES)}; "
            f"pass {option}"
        )
    return SUFFIXES[suffix]


@contextmanager
def open_reader(
    path: str, file_format: str, names: FieldNames, max_line_bytes: int
) -> Iterator[Reader]:
    """A reader of the file, or of stdin for "-".

    Raises:
      UsageError: stdin is not JSONL, or parquet needs a package that is not there.
    """
    if path == "-" and file_format != "jsonl":
        raise UsageError(f"INPUT=- is read as jsonl, not as {file_format}; name a file")
    if file_format == "parquet":
        yield ParquetReader(path, names)
        return
    if path == "-":
        yield JsonlReader(sys.stdin.buffer, names, max_line_bytes, None)
        return
    reader_type = JsonlReader if file_format == "jsonl" else CsvReader
    with Path(path).open("rb") as file:
        yield reader_type(file, names, max_line_bytes, Path(path).stat().st_size)


class JsonlReader:
    """One JSON object on each line; blank lines count and are passed over."""

    def __init__(
        self, file: BinaryIO, names: FieldNames, max_line_bytes: int, total: int | None
    ) -> None:
        self.total = total
        self._lines = Lines(file, max_line_bytes)
        self._names = names

    @property
    def position(self) -> int:
        """Bytes read."""
        return self._lines.position_bytes

    def __iter__(self) -> Iterator[Entry]:
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

    def _parse(self, line: str) -> Entry:
        number = self._lines.number
        try:
            value = json.loads(line, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            return BadRecord(number, f"is not JSON: {error.msg} at character {error.colno}")
        except (ValueError, RecursionError) as error:
            return BadRecord(number, f"is not JSON that can be read: {error}")
        return to_record(number, value, self._names)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


class CsvReader:
    """One (query, item) pair on each row; consecutive rows of one query are one record.

    The other columns have a value for each item, so that they are carried as lists.
    """

    def __init__(
        self, file: BinaryIO, names: FieldNames, max_line_bytes: int, total: int | None
    ) -> None:
        self.total = total
        self._lines = Lines(file, max_line_bytes)
        self._names = names
        self._max_line_bytes = max_line_bytes

    @property
    def position(self) -> int:
        """Bytes read."""
        return self._lines.position_bytes

    def __iter__(self) -> Iterator[Entry]:
        # a setting of the whole process: it stays as this reader needs it while it reads
        found_limit = csv.field_size_limit(self._max_line_bytes)
        try:
            yield from self._groups()
        finally:
            csv.field_size_limit(found_limit)

    def _groups(self) -> Iterator[Entry]:
        rows = csv.reader(self._lines, strict=True)
        header = self._header(rows)
        query_at, item_at = header.index(self._names.query), self._item_column(header)
        start, group = 0, list[list[str]]()
        while True:
            line = self._lines.number + 1
            try:
                row = next(rows)
                if row and len(row) != len(header):
                    raise BadValueError(f"has {len(row)} fields, and the header has {len(header)}")
            except StopIteration:
                break
            except (BadValueError, csv.Error) as error:
                yield BadRecord(line, f"the row {error}")
                continue
            if not row:
                continue
            if group and row[query_at] != group[0][query_at]:
                yield self._record(start, header, group, item_at)
                group = []
            start = start if group else line
            group.append(row)
        if group:
            yield self._record(start, header, group, item_at)

    def _header(self, rows: Iterator[list[str]]) -> list[str]:
        try:
            header = next(rows, [])
        except (BadValueError, csv.Error) as error:
            raise RunError(f"INPUT: the header {error}") from error
        repeated = {name for name in header if header.count(name) > 1}
        if repeated:
            raise RunError(f"INPUT: the header names {sorted(repeated)} more than once")
        if self._names.query not in header:
            raise RunError(
                f"INPUT: the header {header} has no column {self._names.query!r}; "
                "name it with --query-field"
            )
        return header

    def _item_column(self, header: list[str]) -> int:
        wanted = DEFAULT_ITEM_COLUMNS if self._names.items is None else (self._names.items,)
        present = [name for name in wanted if name in header]
        if len(present) != 1:
            raise RunError(
                f"INPUT: the header {header} must have one column of {list(wanted)}; "
                "name it with --items-field"
            )
        return header.index(present[0])

    def _record(self, line: int, header: list[str], rows: list[list[str]], item_at: int) -> Record:
        query = self._names.query
        others = [(i, name) for i, name in enumerate(header) if i != item_at and name != query]
        fields: dict[str, Any] = {query: rows[0][header.index(query)]}
        fields |= {name: [row[i] for row in rows] for i, name in others}
        items = [row[item_at] for row in rows]
        return Record(line, fields[query], items, fields, tuple(name for _, name in others))


class ParquetReader:
    """One record on each row; the items are a column of lists of strings."""

    def __init__(self, path: str, names: FieldNames) -> None:
        self._file = parquet_module().ParquetFile(path)
        self._names = names
        self.total: int | None = self._file.metadata.num_rows
        self.position = 0

    def __iter__(self) -> Iterator[Entry]:
        for batch in self._file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
            for row in batch.to_pylist():
                self.position += 1
                yield self._entry(row)

    def _entry(self, row: dict[str, Any]) -> Entry:
        try:
            value = {name: json_value(name, found) for name, found in row.items()}
        except BadValueError as error:
            return BadRecord(self.position, str(error))
        return to_record(self.position, value, self._names)


def json_value(name: str, value: Any) -> Any:
    """A value of a parquet column as JSON has it: dates as text, what is not a number as null.

    Raises:
      BadValueError: JSON has nothing like it.
    """
    if isinstance(value, list):
        return [json_value(name, entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): json_value(name, entry) for key, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return None
        raise BadValueError(f"{name} is {value}, which JSON does not have")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise BadValueError(f"{name} is a {type(value).__name__}, which the output cannot carry")


def parquet_module() -> Any:
    """pyarrow's parquet.

    Raises:
      UsageError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            "parquet files need pyarrow, which is not installed: pip install 'packscore[parquet]'"
        ) from error
    return pyarrow.parquet
