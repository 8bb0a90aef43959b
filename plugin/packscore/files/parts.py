"""A parquet file in parts that can be scored apart from each other, on one machine or on many.

with open_part("in.parquet", part, options) as entries: ...  # for each of cut("in.parquet", ...)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from packscore.files.failures import UsageError
from packscore.files.inputs import Input, check_scattered, records
from packscore.files.look import Look, ReadOptions, query_path
from packscore.files.parquet import ParquetReader, open_parquet, query_changes
from packscore.files.records import BadRecord


def cut(
    path: str, options: ReadOptions, at_least: int, reserved: frozenset[str] = frozenset()
) -> Iterator[range]:
    """Rows of a parquet file, from 0, in parts that split no rows of one query on end.

    Of rows with lists of items only the footer is read, and of rows with one item the queries; and
    where a part may end, the two rows there, with those before them in their row group read past.

    Args:
      path: of the file.
      options: how it is read.
      at_least: rows of a part, but for the last; more, up to where a query ends.
      reserved: names of fields that the output needs for itself.

    Raises:
      UsageError: the options do not fit what was seen of the file, or ask for all rows of a query.
    """
    if at_least < 1:
        raise UsageError(f"{at_least=} rows of a part must be 1 or more")
    with open_parquet(path) as file:
        look, end, start = _look(file, path, options, reserved), file.metadata.num_rows, 0
        if look.rows:
            check_scattered(path, "parquet", options, look)
            for row, _ in query_changes(file, query_path(options)):
                if row - start >= at_least and _both_good(file, look, row):
                    yield range(start, row)
                    start = row
        else:
            while end - start > at_least:
                yield range(start, start + at_least)
                start += at_least
        if start < end:
            yield range(start, end)


@contextmanager
def open_part(
    path: str, part: range, options: ReadOptions, reserved: frozenset[str] = frozenset()
) -> Iterator[Input]:
    """The records of some rows of a parquet file, read as `open_input` reads all of them.

    Args:
      path: of the file.
      part: from `cut`, with the same options.
      options: how it is read.
      reserved: names of fields that the output needs for itself.

    Raises:
      UsageError: the options do not fit what was seen of the file, or ask for all rows of a query.
    """
    with open_parquet(path) as file:
        look, reader = _look(file, path, options, reserved), ParquetReader(file, part)
        yield Input(reader, records(look, reader), look)


def _look(file: Any, path: str, options: ReadOptions, reserved: frozenset[str]) -> Look:
    """At the first records of all of the file, whatever the part."""
    if options.group:
        raise UsageError(
            "--group brings rows from all of INPUT together, and parts do not have them"
        )
    reader = ParquetReader(file)
    look = Look(path, reader, options, reserved)
    look.at(iter(reader))
    return look


def _both_good(file: Any, look: Look, row: int) -> bool:
    """Whether a row and the one before it can be scored: a query does not go on past a bad row."""
    pair = map(look.entry, ParquetReader(file, range(row - 1, row + 1)))
    return not any(isinstance(entry, BadRecord) for entry in pair)
