"""Rows of one query made into one record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from packscore.files.failures import RunError
from packscore.files.records import BadRecord, Record
from packscore.files.repeats import Seen

# a row of one item, or a record made of some
Part = Record | BadRecord
REMEDY = (
    "pass --group to bring each query's rows together, or --no-group to take rows "
    "that follow each other as a record"
)


def consecutive(rows: Iterable[Part], *, once: bool = False) -> Iterator[Part]:
    """A record for the rows of one query that follow each other; bad rows as they come.

    Args:
      rows: records of one item each.
      once: whether a query that comes back is refused. Takes 8 bytes a query.

    Raises:
      RunError: a query comes back, and `once`.
    """
    group: list[Record] = []
    seen = Seen()
    for row in rows:
        if isinstance(row, BadRecord):
            yield row
            continue
        if group and row.query != group[0].query:
            yield _merged(group)
            group = []
        if once and not group and not seen.add(row.query):
            raise RunError(
                f"line {row.line} of INPUT: the query {row.query[:60]!r} comes back after "
                f"another one; {REMEDY}"
            )
        group.append(row)
    if group:
        yield _merged(group)


def collected(rows: Iterable[Part]) -> Iterator[Part]:
    """A record for all rows of one query, in the order of first appearance.

    Bad rows come first, and all good ones are in memory at once.
    """
    groups: dict[str, list[Record]] = {}
    for row in rows:
        if isinstance(row, BadRecord):
            yield row
        else:
            groups.setdefault(row.query, []).append(row)
    yield from map(_merged, groups.values())


def changes(rows: Iterable[Part]) -> Iterator[tuple[int, str]]:
    """The first of the rows of one query that follow each other: its line, and the query."""
    before = None
    for row in rows:
        if isinstance(row, Record) and row.query != before:
            before = row.query
            yield row.line, before


def _merged(rows: list[Record]) -> Record:
    """One record of a query's rows: fields beside the query are lists with a value of each."""
    first = rows[0]
    names = dict.fromkeys(name for row in rows for name in row.fields)
    fields: dict[str, Any] = {}
    for name in names:
        values = [row.fields.get(name) for row in rows]
        is_shared = name == first.query_holder and all(value == values[0] for value in values)
        fields[name] = values[0] if is_shared else values
    ids = [row.ids[0] if row.ids else None for row in rows]
    return Record(
        first.line,
        first.query,
        [row.items[0] for row in rows],
        fields,
        ids if any(one is not None for one in ids) else None,
        first.query_holder,
    )
