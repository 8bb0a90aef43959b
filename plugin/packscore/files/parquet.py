"""Rows of a parquet file, a few in memory at a time: all, some, or the queries of all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from packscore.files.failures import UsageError
from packscore.files.paths import prefixes
from packscore.files.records import BadRecord, BadValueError, Raw, text_of
from packscore.installed import install_command

# Rows that are Python objects at a time, fewer where rows are large.
BATCH_ROWS = 64
BATCH_BYTES = 1 << 24
# What is read of a column at a time: without it all that a row group has of the column is.
COLUMN_BYTES = 1 << 18
QUERY_BATCH_ROWS = 8192


def parquet_module() -> Any:
    """pyarrow's parquet.

    Raises:
      UsageError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            f"parquet files need pyarrow, which is not installed: {install_command('parquet')}"
        ) from error
    return pyarrow.parquet


@contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """Open a file so that a row group is read piece by piece, however large it is."""
    options = {"buffer_size": COLUMN_BYTES, "pre_buffer": False}
    with parquet_module().ParquetFile(path, **options) as file:
        yield file


def row_groups(file: Any) -> Iterator[range]:
    """The rows of every row group, in order."""
    start = 0
    for i in range(file.metadata.num_row_groups):
        stop = start + file.metadata.row_group(i).num_rows
        yield range(start, stop)
        start = stop


def batches(
    file: Any, rows: range, columns: list[str] | None = None, batch_rows: int = BATCH_ROWS
) -> Iterator[tuple[int, Any]]:
    """The rows of a range: a record batch and the number of its first row, from 0.

    Args:
      file: from `open_parquet`.
      rows: which of them; those before them in their row group are read past.
      columns: names of columns; None is all.
      batch_rows: at most so many at a time.
    """
    wanted = [
        (i, group)
        for i, group in enumerate(row_groups(file))
        if group.start < rows.stop and rows.start < group.stop
    ]
    if not wanted:
        return
    at = wanted[0][1].start
    for batch in file.iter_batches(
        batch_rows, row_groups=[i for i, _ in wanted], columns=columns, use_threads=False
    ):
        start, stop = max(rows.start, at), min(rows.stop, at + len(batch))
        if start < stop:
            yield start, batch.slice(start - at, stop - start)
        at += len(batch)
        if at >= rows.stop:
            return


def query_changes(file: Any, path: str) -> Iterator[tuple[int, str]]:
    """Rows whose query is not that of the row before, and their queries; no other column is read.

    A row that has no text there is as if it were not; one that is bad for another reason counts.

    Args:
      file: from `open_parquet`.
      path: of the query.
    """
    before = None
    names = set(file.schema_arrow.names)
    columns = [name for name in prefixes(path) if name in names]
    for start, batch in batches(file, range(file.metadata.num_rows), columns, QUERY_BATCH_ROWS):
        for row, value in _runs(batch) if columns == [path] else enumerate(batch.to_pylist()):
            try:
                query = text_of(path, value)
            except BadValueError:
                continue
            if query != before:
                yield start + row, query
                before = query


def _runs(batch: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The first of the rows of a column that are equal and follow each other."""
    import pyarrow as pa
    import pyarrow.compute

    (name,), column = batch.schema.names, batch.column(0)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        yield from enumerate(batch.to_pylist())
        return
    runs, row = pa.compute.run_end_encode(column), 0
    for end, value in zip(runs.run_ends.to_pylist(), runs.values.to_pylist(), strict=True):
        yield row, {name: value}
        row = end


class ParquetReader:
    """One record on each row; items are a column of lists, or of texts.

    Args:
      file: from `open_parquet`.
      rows: which of them, from 0; None is all.
    """

    table, measured = False, True

    def __init__(self, file: Any, rows: range | None = None) -> None:
        self._file = file
        self._rows = range(file.metadata.num_rows) if rows is None else rows
        self._row_bytes = row_bytes(file)
        self.total: int | None = len(self._rows)
        self.position = 0

    @property
    def bytes_read(self) -> int:
        """About what the rows that were read take in memory."""
        return self.position * self._row_bytes

    def described(self) -> str:
        """The format, in words."""
        return "parquet"

    def __iter__(self) -> Iterator[Raw]:
        at_a_time = max(1, min(BATCH_ROWS, BATCH_BYTES // self._row_bytes))
        for start, batch in batches(self._file, self._rows, batch_rows=at_a_time):
            for line, row in enumerate(batch.to_pylist(), start + 1):
                self.position += 1
                yield _raw(line, row)


def row_bytes(file: Any) -> int:
    """Bytes of a row, on the average of the row group where that is most."""
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    return max([group.total_byte_size // max(group.num_rows, 1) for group in groups], default=0) + 1


def _raw(line: int, row: dict[str, Any]) -> Raw:
    try:
        return line, {name: json_value(name, found) for name, found in row.items()}
    except BadValueError as error:
        return BadRecord(line, str(error))


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
