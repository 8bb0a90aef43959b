"""An input as records: opened, looked at before anything else is done, and read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import cast

from packscore.files.failures import UsageError
from packscore.files.grouping import REMEDY, changes, collected, consecutive
from packscore.files.look import Look, ReadOptions, query_path
from packscore.files.parquet import ParquetReader, open_parquet, query_changes
from packscore.files.readers import DELIMITERS, TABLES, JsonlReader, Reader, TableReader
from packscore.files.records import BadRecord, Entry, Raw, Record
from packscore.files.repeats import repeated
from packscore.files.sources import is_stream, open_source


@dataclass
class Input:
    """The records of an open input.

    Args:
      reader: of its format.
      entries: its records, from the first.
      look: at the first of them.
    """

    reader: Reader
    entries: Iterator[Entry]
    look: Look

    @property
    def rows(self) -> bool:
        """Whether several rows are a record."""
        return self.look.rows

    @property
    def understood(self) -> str:
        """What was seen of it, in a line."""
        return self.look.understood()

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
        look = Look(path, reader, options, reserved)
        looked = look.at(raws)
        if look.rows and not is_stream(path):
            check_scattered(path, file_format, options, look)
        once = options.once and options.group is None and is_stream(path)
        yield Input(reader, records(look, chain(looked, raws), once=once), look)


def records(look: Look, raws: Iterable[Raw], *, once: bool = False) -> Iterator[Entry]:
    """What was read, checked, and rows made into records as the options say.

    Args:
      look: at the first of the file.
      raws: of it, from any.
      once: whether a query of rows that comes back ends it.
    """
    entries = map(look.entry, raws)
    if not look.rows:
        return entries
    rows = cast(Iterator[Record | BadRecord], entries)  # what `of_rows` says of its entries
    return collected(rows) if look.options.group else consecutive(rows, once=once)


@contextmanager
def _open_reader(path: str, file_format: str, options: ReadOptions) -> Iterator[Reader]:
    if options.delimiter is not None and file_format not in TABLES:
        raise UsageError(f"--delimiter is for {' and '.join(TABLES)}, and INPUT is {file_format}")
    if file_format == "parquet":
        if is_stream(path):
            raise UsageError(f"INPUT={path} is a stream, and parquet is read from its end")
        with open_parquet(path) as file:
            yield ParquetReader(file)
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


def check_scattered(path: str, file_format: str, options: ReadOptions, look: Look) -> None:
    """Read all of a file once, which takes no time beside scoring it.

    Raises:
      UsageError: rows of a query do not follow each other, and the options want them to.
    """
    if not options.once or options.group is not None:
        return

    def by_column() -> Iterator[tuple[int, str]]:
        with open_parquet(path) as file:
            yield from ((row + 1, q) for row, q in query_changes(file, query_path(options)))

    def by_rows() -> Iterator[tuple[int, str]]:
        with _open_reader(path, file_format, options) as reader:
            yield from changes(cast(Iterator[Record | BadRecord], map(look.entry, reader)))

    # all good rows are in the column: what does not come back there does not come back among them
    if file_format == "parquet" and not repeated(by_column)[0]:
        return
    count, first = repeated(by_rows)
    if first is not None:
        raise UsageError(
            f"INPUT={path}: queries that come back after another one: {count:,}, the first is "
            f"{first[1][:60]!r} (line {first[0]}); {REMEDY}"
        )
