"""What the first records of an input say about all of it, seen before anything else is done."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from packscore.files.failures import UsageError
from packscore.files.readers import Reader
from packscore.files.records import BadRecord, Entry, FieldNames, Fields, Raw
from packscore.files.sources import is_stream

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


def query_path(options: ReadOptions) -> str:
    """The path of the query in rows."""
    assert isinstance(options.names, FieldNames)  # no other records are of rows
    return options.names.query


class Look:
    """What the first records of an input say about all of them."""

    def __init__(
        self, path: str, reader: Reader, options: ReadOptions, reserved: frozenset[str]
    ) -> None:
        self._path, self._reader = path, reader
        self.options, self._reserved = options, reserved
        self._is_stream = is_stream(path)
        self.looked: list[Raw] = []
        self.looked_bytes = 0
        self.whole = False  # whether nothing is behind them
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
        looked = self.looked
        for raw in raws:
            looked.append(raw)
            if len(looked) == LOOKED_AT_RECORDS or self._reader.bytes_read > LOOKED_AT_BYTES:
                break
            if self._is_stream and self._can_be_used(raw):
                break
        else:
            self.whole = True
        self.looked_bytes = self._reader.bytes_read
        kinds = [kind for kind in map(self._kind_of_items, looked) if kind is not None]
        self.rows = self._are_rows(2 * kinds.count(list) < len(kinds))  # what most have
        if self.options.group is not None and kinds and not self.rows:
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
        return self.options.names.entry(
            *raw, rows=self.rows, table=self._reader.table, reserved=self._reserved
        )

    def understood(self) -> str:
        """What was seen, in a line."""
        told = self.options.names.told(
            list(self._items), list(self._ids), rows=self.rows, group=bool(self.options.group)
        )
        parts = [f"{self._path}: {self._reader.described()}", *told]
        bad = f", {self._num_bad} of them bad" if self._num_bad else ""
        return "; ".join(parts) + f" (looked at {self._count}{bad})"

    def _kind_of_items(self, raw: Raw) -> type | None:
        if isinstance(raw, BadRecord) or not isinstance(raw[1], dict):
            return None
        return self.options.names.kind(raw[1], table=self._reader.table)

    def _are_rows(self, single: bool) -> bool:
        """Whether several are a record; `single`: most of them have one item."""
        return self.options.names.of_rows and (self._reader.table or single)

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
        names = self.options.names
        for raw in looked:
            if isinstance(raw, BadRecord) or isinstance(self.entry(raw), BadRecord):
                continue
            value = raw[1]
            assert isinstance(value, dict)
            items, ids = names.paths(value, rows=self.rows, table=self._reader.table)
            self._items[items] = None
            if ids is not None:
                self._ids[ids] = None
