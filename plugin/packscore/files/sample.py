"""Some records of an input, from which all that it holds is estimated before it is read."""

from __future__ import annotations

from dataclasses import dataclass

from packscore.files.inputs import Input, records
from packscore.files.look import Look, query_path
from packscore.files.parquet import (
    ParquetReader,
    open_parquet,
    query_changes,
    row_bytes,
    row_groups,
)
from packscore.files.records import BadRecord, Entry

# Of parquet: rows from the beginnings of so many row groups, spread over all of them.
ROWS, PLACES = 1024, 16
BYTES = 1 << 22


@dataclass(frozen=True)
class Sample:
    """Some records.

    Args:
      entries: the records; the rows of a query may be some of them.
      rows: how many rows, or lines, they are.
      all_rows: how many there are.
      exact_rows: whether that is certain.
      all_queries: how many records all rows make; None: each is one.
      told: where they are from.
      whole: whether they are all.
    """

    entries: list[Entry]
    rows: int
    all_rows: int
    exact_rows: bool = False
    all_queries: int | None = None
    told: str = ""
    whole: bool = False


def sample(path: str, entries: Input) -> Sample | None:
    """Records of an open input, read beside it; None where nothing says how many there are.

    Args:
      path: of the input.
      entries: what `open_input` made of it, from which nothing has been taken.
    """
    look = entries.look
    if look.whole:
        rows = len(look.looked)
        return Sample(list(records(look, look.looked)), rows, rows, whole=True)
    if look.rows and look.options.group:
        return None
    if isinstance(entries.reader, ParquetReader):
        return _of_parquet(path, look)
    if not entries.reader.measured:
        return None
    return _of_the_first(look, entries)


def _of_parquet(path: str, look: Look) -> Sample:
    found: list[Entry] = []
    rows = 0
    with open_parquet(path) as file:
        groups = [group for group in row_groups(file) if group]
        places = min(PLACES, len(groups))
        at_each = max(1, min(ROWS, BYTES // row_bytes(file)) // places)
        for i in range(places):
            reader = ParquetReader(file, groups[i * len(groups) // places][:at_each])
            found += records(look, reader)
            rows += reader.position
        queries = None
        if look.rows:
            queries = sum(1 for _ in query_changes(file, query_path(look.options)))
        all_rows = file.metadata.num_rows
    told = f"from the first {rows:,} rows"
    if len(groups) > 1:
        told = f"from {rows:,} rows at the beginnings of {places} of {len(groups):,} row groups"
    return Sample(found, rows, all_rows, exact_rows=True, all_queries=queries, told=told)


def _of_the_first(look: Look, entries: Input) -> Sample | None:
    """Those that were looked at, by their share of the bytes."""
    found, num_rows = list(records(look, look.looked)), len(look.looked)
    share = look.looked_bytes / (entries.total or 1)
    all_rows = round(num_rows / share)
    told = f"from the first {num_rows:,}, by their bytes"
    if not look.rows:
        return Sample(found, num_rows, all_rows, told=told)
    whole = [one for one in found[:-1] if not isinstance(one, BadRecord)]
    rows_of_whole = sum(one.size for one in whole)
    if not whole:  # all rows are of one query, and nobody knows how many more it has
        return None
    queries = round(all_rows * len(whole) / rows_of_whole)
    return Sample(found, num_rows, all_rows, all_queries=queries, told=told)
