"""Files of any length in the memory of some rows: what is alive at any moment is counted."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from cli_helpers import Cli
from cli_stand_in import plan_of, rows_of, run_stand_in
from packscore.cli import convert
from packscore.cli import parquet as results
from packscore.files import inputs
from packscore.files import parquet as source
from packscore.files.failures import RunError
from packscore.files.inputs import open_input
from packscore.files.journal import FileJournal
from packscore.files.look import ReadOptions
from packscore.files.records import Record


class Alive:
    """How many objects of a kind are alive, at most at any moment."""

    def __init__(self) -> None:
        self.now = self.most = self.total = 0

    def add(self, thing: Any) -> None:
        self.now, self.total = self.now + 1, self.total + 1
        self.most = max(self.most, self.now)
        weakref.finalize(thing, self._ended)

    def _ended(self) -> None:
        self.now -= 1


def counting(alive: Alive, found: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The same, of which every batch is counted."""

    def counted(*args: Any, **options: Any) -> Iterator[Any]:
        for start, batch in found(*args, **options):
            alive.add(batch)
            pair = start, batch
            del batch
            yield pair
            del pair

    return counted


def test_so_much_is_alive_whatever_the_rows(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one row group, and of queries that have few rows or many."""
    most = []
    for num_rows in (300, 3000):
        batches, records = Alive(), Alive()
        monkeypatch.setattr(source, "batches", counting(batches, source.batches))
        columns = {"query": [f"q{i // 7}" for i in range(num_rows)], "item": ["x"] * num_rows}
        parquet.write_table(pa.table(columns), "in.parquet", row_group_size=num_rows)
        lines = run_stand_in(
            plan_of(f"{num_rows}.parquet", "in.parquet"), command="rank", before=records.add
        )
        assert len(lines) == records.total == -(-num_rows // 7)
        assert batches.total >= num_rows // source.BATCH_ROWS
        assert batches.now == records.now == 0
        most.append((batches.most, records.most))
        monkeypatch.undo()
        monkeypatch.chdir(cli.folder)
    assert most == [(2, 1)] * 2


class CountedFile:
    """A file that says how many of its bytes were asked for."""

    closed = False

    def __init__(self, path: str) -> None:
        self._file, self.bytes_read = Path(path).open("rb"), 0  # noqa: SIM115  # close() is its
        self.seek, self.tell, self.close = self._file.seek, self._file.tell, self._file.close

    def read(self, size: int = -1) -> bytes:
        found = self._file.read(size)
        self.bytes_read += len(found)
        return found


@pytest.mark.parametrize("is_buffered", [True, False])
def test_a_row_group_is_read_piece_by_piece(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, is_buffered: bool
) -> None:
    """A million rows in one of them must not be in memory because the first is."""
    columns = {"query": ["q"] * 4000, "item": [f"{i} " * 80 for i in range(4000)]}
    parquet.write_table(
        pa.table(columns), "in.parquet", use_dictionary=False, compression="none",
        data_page_size=1 << 14,
    )  # fmt: skip
    size, opened = Path("in.parquet").stat().st_size, list[CountedFile]()

    def counted(path: str, **options: Any) -> Any:
        opened.append(CountedFile(path))
        return parquet.ParquetFile(opened[-1], **(options if is_buffered else {}))

    monkeypatch.setattr(source, "parquet_module", lambda: SimpleNamespace(ParquetFile=counted))
    monkeypatch.setattr(source, "COLUMN_BYTES", 1 << 16)
    with open_input("in.parquet", "parquet", ReadOptions()):
        read = sum(file.bytes_read for file in opened)
    assert (read < size / 2) is is_buffered  # the control, without buffers, reads all of it


def test_results_are_converted_some_at_a_time(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "BATCH_BYTES", 2000)
    monkeypatch.setattr(results, "ROW_GROUP_BYTES", 4000)
    records = [{"n": i, "query": f"query {i}", "items": ["a", "b" * (i % 9)]} for i in range(400)]
    cli.write("in.jsonl", records)
    groups = []
    for count in (200, 400):
        cli.write("in.jsonl", records[:count])
        output = f"{count}.parquet"
        run_stand_in(plan_of(output))
        found = parquet.ParquetFile(output).metadata
        sizes = [found.row_group(i).num_rows for i in range(found.num_row_groups)]
        assert max(sizes) < 2 * min(sizes[:-1]) < 200
        assert [row["n"] for row in rows_of(output)] == list(range(count))
        groups.append(len(sizes))
    assert groups[1] == pytest.approx(2 * groups[0], abs=1)


LATE: dict[str, tuple[list[Any], Any]] = {
    "null, then text": ([None] * 50 + ["x"], pa.string()),
    "integers, then a float": ([*range(50), 0.5], pa.float64()),
    "objects of other fields": ([{"a": 1}] * 50 + [{"b": "x"}], None),
    "empty objects, then one": ([{}] * 50 + [{"a": 1}], None),
    "lists, empty until late": ([[]] * 50 + [["x"]], pa.list_(pa.string())),
    "integers, then text": ([*range(50), "x"], "json"),
    "integers, then beyond 64 bits": ([*range(50), 2**70], "json"),
    "fields that are data": ([{f"k{i}": i} for i in range(300)], "json"),
    "the same, in lists": ([[{f"k{i}": i}] for i in range(300)], "json"),
}


@pytest.mark.parametrize("name", LATE)
def test_a_type_that_shows_late_is_that_of_all_rows(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(convert, "BATCH_BYTES", 300)
    monkeypatch.setattr(results, "ROW_GROUP_BYTES", 500)
    values, type_ = LATE[name]
    cli.write("in.jsonl", [{"query": "q", "items": ["a"], "v": value} for value in values])
    run_stand_in(plan_of("out.parquet"))
    assert parquet.ParquetFile("out.parquet").num_row_groups > 1
    found = [row["v"] for row in rows_of("out.parquet")]
    if type_ == "json":
        assert list(map(json.loads, found)) == values
    elif type_ is not None:
        assert parquet.read_schema("out.parquet").field("v").type == type_
        assert found == values
    else:
        kept = [{k: v for k, v in one.items() if v is not None} for one in found]
        assert kept == values


def test_errors_of_an_earlier_run_are_met_in_order(cli: Cli) -> None:
    errors = Path("e.jsonl")
    errors.write_text("".join(f'{{"line": {line}}}\n' for line in (2, 5, 6)))
    journal = FileJournal(Path("o.jsonl"), errors)
    assert journal.num_bad == 3
    assert [line for line in range(1, 9) if journal.is_reported(line)] == [2, 5, 6]
    journal.check_all_taken()
    journal.close()


def test_an_error_of_no_record_is_refused(cli: Cli) -> None:
    cli.write("in.jsonl", ["bad", {"query": "q", "items": ["a"]}, "bad"])
    run_stand_in(plan_of("out.jsonl"))
    note, errors = Path("out.jsonl.packscore.json"), Path("out.jsonl.errors.jsonl")
    note.write_text(note.read_text().replace("true", "false"))
    errors.write_text(errors.read_text().replace('"line": 3', '"line": 9'))
    with pytest.raises(RunError, match=r"errors\.jsonl has line 9 of INPUT, which is not bad"):
        run_stand_in(plan_of("out.jsonl"))


def test_a_query_that_comes_back_is_looked_for_in_one_column_first(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[bool]()
    found = inputs.changes
    monkeypatch.setattr(inputs, "changes", lambda rows: found(read.append(True) or x for x in rows))
    options = ReadOptions(once=True)
    # of two bad rows of another query, which nothing but all columns tells
    for queries, passes in ((["a", "a", "b", "b"], 0), (["a", "b", "b", "a"], 1)):
        columns = {"query": queries, "item": ["x", None, None, "z"]}
        parquet.write_table(pa.table(columns), "in.parquet")
        with open_input("in.parquet", "parquet", options) as entries:
            assert [len(one.items) for one in entries if isinstance(one, Record)] == (
                [2] if passes else [1, 1]
            )
        assert len(read) == 4 * passes
