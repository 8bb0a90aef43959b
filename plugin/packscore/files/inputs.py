"""An input as records: opened, looked at before anything else is done, and read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import cast

from packscore.files.failures import UsageError
from packscore.files.grouping import REMEDY, collected, consecutive, scattered
from packscore.files.readers import (
    DELIMITERS,
    TABLES,
    JsonlReader,
    ParquetReader,
    Reader,
    TableReader,
)
from packscore.files.records import BadRecord, Entry, FieldNames, Fields, Raw, Record
from packscore.files.sources import is_stream, open_source

LOOKED_AT_RECORDS = 100
# Records that are looked at stay in memory until they are read.
LOOKED_AT_BYTES = 1 << 26


@dataclass(frozen=True)
class ReadOptions:
    """How an input is read.

    Args:
      names: of its fields.
      max_line_bytes: longer lines are bad.
      delimiter: between columns; None tells it by the header.
      group: of rows, whether all of a query are brought together (True) or those that follow each
        other (False); None is the latter, and `once` says whether a query may come back.
      once: refuses one that does, without `group`.
    """

    names: Fields = field(default_factory=FieldNames)
    max_line_bytes: int = 8 << 20
    delimiter: str | None = None
    group: bool | None = None
    once: bool = False


@dataclass
class Input:
    """The records of an open input.

    Args:
      reader: of its format.
      entries: its records, from the first.
      rows: whether several rows are a record.
      understood: what was seen of it, in a line.
    """

    reader: Reader
    entries: Iterator[Entry]
    rows: bool
    understood: str

    @property
    def total(self) -> int | None:
        """The end of `position`, where it is known."""
        return self.reader.total

    @property
    def position(self) -> int:
        """What has been read, in the unit of `total`."""
        return self.reader.position

    def __iter__(self) -> Iterator[Entry]:
        return self.entries


@contextmanager
def open_input(
    path: str, file_format: str, options: ReadOptions, reserved: frozenset[str] = frozenset()
) -> Iterator[Input]:
    """Open an input and look at its first records.

    Args:
      path: of the file; "-" is stdin.
      file_format: one of `FORMATS`.
      options: how it is read.
      reserved: names of fields that the output needs for itself.

    Raises:
      UsageError: the options do not fit what was seen.
    """
    with _open_reader(path, file_format, options) as reader:
        raws = iter(reader)
        look = _Look(path, reader, options, reserved)
        looked = look.at(raws)
        rows = (look.entry(raw) for raw in chain(looked, raws))
        entries: Iterator[Entry] = rows
        if look.rows:
            once = options.once and options.group is None
            if once and not is_stream(path):
                _check_scattered(path, file_format, options, look)
            parts = cast(Iterator[Record | BadRecord], rows)  # what `of_rows` says of its entries
            entries = collected(parts) if options.group else consecutive(parts, once=once)
        yield Input(reader, entries, look.rows, look.understood())


@contextmanager
def _open_reader(path: str, file_format: str, options: ReadOptions) -> Iterator[Reader]:
    if options.delimiter is not None and file_format not in TABLES:
        raise UsageError(f"--delimiter is for {' and '.join(TABLES)}, and INPUT is {file_format}")
    if file_format == "parquet":
        if is_stream(path):
            raise UsageError(f"INPUT={path} is a stream, and parquet is read from its end")
        yield ParquetReader(path)
        return
    with open_source(path) as source:
        if file_format == "jsonl":
            yield JsonlReader(source, options.max_line_bytes)
            return
        tab_first = tuple(sorted(DELIMITERS, key="\t".__ne__))
        delimiters = tab_first if file_format == "tsv" else DELIMITERS
        if options.delimiter is not None:
            delimiters = (options.delimiter,)
        yield TableReader(source, options.names, options.max_line_bytes, delimiters)


class _Look:
    """What the first records of an input say about all of them."""

    def __init__(
        self, path: str, reader: Reader, options: ReadOptions, reserved: frozenset[str]
    ) -> None:
        self._path, self._reader = path, reader
        self._options, self._reserved = options, reserved
        self._is_stream = is_stream(path)
        self.rows = self._are_rows(False)
        self._count = self._num_bad = 0
        self._items: dict[str, None] = {}  # paths, in order
        self._ids: dict[str, None] = {}

    def at(self, raws: Iterator[Raw]) -> list[Raw]:
        """Take the first records. Of a stream, those up to one that says how it is to be read:
        whoever writes it may wait for an answer.

        Raises:
          UsageError: none can be used, for one reason.
        """
        looked: list[Raw] = []
        for raw in raws:
            looked.append(raw)
            if len(looked) == LOOKED_AT_RECORDS or self._reader.position > LOOKED_AT_BYTES:
                break
            if self._is_stream and self._can_be_used(raw):
                break
        kinds = [kind for kind in map(self._kind_of_items, looked) if kind is not None]
        self.rows = self._are_rows(2 * kinds.count(list) < len(kinds))  # what most have
        if self._options.group is not None and kinds and not self.rows:
            raise UsageError("--group and --no-group are for rows of one item, and INPUT has lists")
        bad = [one for one in map(self.entry, looked) if isinstance(one, BadRecord)]
        self._count, self._num_bad = len(looked), len(bad)
        if looked and len(bad) == len(looked):
            self._refuse_if_alike(bad)
        self._note_paths(looked)
        return looked

    def entry(self, raw: Raw) -> Entry:
        """A record, or a row, checked."""
        if isinstance(raw, BadRecord):
            return raw
        return self._options.names.entry(
            *raw, rows=self.rows, table=self._reader.table, reserved=self._reserved
        )

    def understood(self) -> str:
        """What was seen, in a line."""
        told = self._options.names.told(
            list(self._items), list(self._ids), rows=self.rows, group=bool(self._options.group)
        )
        parts = [f"{self._path}: {self._reader.described()}", *told]
        bad = f", {self._num_bad} of them bad" if self._num_bad else ""
        return "; ".join(parts) + f" (looked at {self._count}{bad})"

    def _kind_of_items(self, raw: Raw) -> type | None:
        if isinstance(raw, BadRecord) or not isinstance(raw[1], dict):
            return None
        return self._options.names.kind(raw[1], table=self._reader.table)

    def _are_rows(self, single: bool) -> bool:
        """Whether several are a record; `single`: most of them have one item."""
        return self._options.names.of_rows and (self._reader.table or single)

    def _can_be_used(self, raw: Raw) -> bool:
        kind = self._kind_of_items(raw)
        self.rows = self._are_rows(kind is not None and kind is not list)
        return kind is not None and not isinstance(self.entry(raw), BadRecord)

    def _refuse_if_alike(self, bad: list[BadRecord]) -> None:
        """End a run whose first records are all bad for one reason.

        Where the fields are other ones than the options say, few records suffice.
        """
        alike = len({re.sub(r"\d+", "0", one.reason) for one in bad}) == 1
        if alike and (bad[0].misfit or len(bad) == LOOKED_AT_RECORDS):
            raise UsageError(
                f"INPUT={self._path}: all of the first {len(bad)} records are bad, for one reason; "
                f"line {bad[0].line}: {bad[0].reason}"
            )

    def _note_paths(self, looked: list[Raw]) -> None:
        names = self._options.names
        for raw in looked:
            if isinstance(raw, BadRecord) or isinstance(self.entry(raw), BadRecord):
                continue
            value = raw[1]
            assert isinstance(value, dict)
            items, ids = names.paths(value, rows=self.rows, table=self._reader.table)
            self._items[items] = None
            if ids is not None:
                self._ids[ids] = None


def _check_scattered(path: str, file_format: str, options: ReadOptions, look: _Look) -> None:
    """Read all of a file once, which takes no time beside scoring it.

    Raises:
      UsageError: rows of a query do not follow each other.
    """
    with _open_reader(path, file_format, options) as reader:
        parts = cast(Iterator[Record | BadRecord], map(look.entry, reader))
        count, row = scattered(parts)
    if row is not None:
        raise UsageError(
            f"INPUT={path}: queries that come back after another one: {count:,}, the first is "
            f"{row.query[:60]!r} (line {row.line}); {REMEDY}"
        )
