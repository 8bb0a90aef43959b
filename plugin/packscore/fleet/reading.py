"""A parquet file as a Ray dataset of records, each a query with its items."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from packscore.errors import InputError
from packscore.files.failures import UsageError
from packscore.files.look import ReadOptions
from packscore.files.parts import cut, open_part
from packscore.files.records import BadRecord, FieldNames, Record
from packscore.fleet.cluster import ray_module


def read_records(
    path: str,
    *,
    query: str = "query",
    items: str | None = None,
    ids: str | None = None,
    block_rows: int = 1000,
) -> Any:
    """Records of a parquet file, which all machines can read.

    Rows of one item make a record where their query follows itself: a block ends where a query
    does. Each block is read by a task of Ray's, a few rows in memory at a time.

    Args:
      path: of the file.
      query, items, ids: columns or paths, as `packscore rank` takes them; None finds the usual.
      block_rows: rows of the file that make a block, about.

    Returns:
      A `ray.data.Dataset` of {"line": int, "query": str, "items": list[str], "ids": list[str]}:
      `line` is the record's first row, from 1; `ids` is null where there are none.

    Raises:
      InputError: the file has no such columns, or queries that come back after another one. Records
        that cannot be scored end the run that reads them with the same.
      MissingPackageError: Ray is not installed.
    """
    path = os.path.abspath(path)
    options = ReadOptions(FieldNames(query, items, ids), once=True)
    try:
        ranges = [{"start": r.start, "stop": r.stop} for r in cut(path, options, block_rows)]
    except UsageError as error:
        raise InputError(f"path={path}: {error}") from error
    blocks = ray_module().data.from_items(ranges, override_num_blocks=max(1, len(ranges)))
    return blocks.flat_map(
        lambda row: list(_records(path, range(row["start"], row["stop"]), options))
    )


def _records(path: str, rows: range, options: ReadOptions) -> Iterator[dict[str, Any]]:
    with open_part(path, rows, options) as entries:
        for entry in entries:
            if isinstance(entry, BadRecord):
                raise InputError(f"path={path}, line {entry.line}: {entry.reason}")
            assert isinstance(entry, Record)
            ids = None if entry.ids is None else [str(one) for one in entry.ids]
            yield {"line": entry.line, "query": entry.query, "items": entry.items, "ids": ids}
