"""A parquet file read in parts gives the records of the whole."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from packscore.files import repeats
from packscore.files.failures import UsageError
from packscore.files.inputs import open_input
from packscore.files.look import ReadOptions
from packscore.files.parts import cut, open_part
from packscore.files.records import Entry, FieldNames

# bad rows inside a query, between queries, and of another query inside one
QUERIES = ["a", "a", None, "a", "b", "c", "x", "c", "c", "d", "", "e", "e"]
ITEMS = ["1", "2", "3", None, "5", "6", None, "8", "9", "10", "11", None, "13"]


def written(path: Path, columns: dict[str, Any], rows_a_group: int = 5) -> str:
    parquet.write_table(pa.table(columns), path, row_group_size=rows_a_group)
    return str(path)


def whole(path: str, options: ReadOptions) -> list[Entry]:
    with open_input(path, "parquet", options) as entries:
        return list(entries)


def in_parts(path: str, options: ReadOptions, at_least: int) -> list[list[Entry]]:
    found = []
    for part in cut(path, options, at_least):
        with open_part(path, part, options) as entries:
            found.append(list(entries))
    return found


@pytest.mark.parametrize("query", ["query", "query.text", "query.of.it", "object"])
@pytest.mark.parametrize("rows_a_group", [1, 5, 100])
def test_parts_give_the_records_of_the_whole(tmp_path: Path, rows_a_group: int, query: str) -> None:
    texts: list[Any] = QUERIES
    column, options = query, ReadOptions(FieldNames(query))
    if query == "query.of.it":
        column, texts = "query", [{"of": {"it": text}} for text in QUERIES]
    if query == "object":
        texts = [{"text": text, "n": i} for i, text in enumerate(QUERIES)]
    path = written(tmp_path / "in.parquet", {column: texts, "item": ITEMS}, rows_a_group)
    expected = whole(path, options)
    assert len(expected) == 10
    counts = []
    for at_least in range(1, len(QUERIES) + 2):
        parts = in_parts(path, options, at_least)
        assert [*chain(*parts)] == expected
        counts.append(len(parts))
    assert counts[0] == 4
    assert counts[-1] == 1


def test_parts_of_records_with_lists_are_as_long_as_asked_for(tmp_path: Path) -> None:
    columns = {"query": ["q"] * 7, "items": [["a"], ["b", "c"]] * 3 + [[]]}
    path = written(tmp_path / "in.parquet", columns, 3)
    assert list(cut(path, ReadOptions(), 3)) == [range(3), range(3, 6), range(6, 7)]
    assert [*chain(*in_parts(path, ReadOptions(), 2))] == whole(path, ReadOptions())


def test_parts_are_refused_what_needs_all_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "in.parquet", {"query": ["a", "b", "a"], "item": ["x"] * 3})
    for options, text in (
        (ReadOptions(once=True), r"come back after another one: 1, the first is 'a' \(line 3\)"),
        (ReadOptions(group=True), "--group brings rows from all of INPUT together"),
        (ReadOptions(FieldNames("nope")), "field 'nope' is missing"),
    ):
        with pytest.raises(UsageError, match=text):
            list(cut(path, options, 1))
    with pytest.raises(UsageError, match="at_least=0 rows of a part must be 1 or more"):
        list(cut(path, ReadOptions(), 0))


@pytest.mark.parametrize("same_hash", [False, True])
def test_texts_that_come_more_than_once_are_found_on_the_disk(
    monkeypatch: pytest.MonkeyPatch, same_hash: bool
) -> None:
    monkeypatch.setattr(repeats, "CHUNK", 7)
    if same_hash:  # of other texts: no text is taken for another one
        monkeypatch.setattr(repeats, "hash", lambda text: len(text) - 5, raising=False)
    texts = [(line, f"text {line * line}") for line in range(1, 60)]
    assert repeats.repeated(lambda: iter(texts)) == (0, None)
    again = [*texts, (60, texts[11][1]), (61, texts[40][1]), (62, texts[11][1])]
    count, first = repeats.repeated(lambda: iter(again))
    assert first == (60, texts[11][1])
    assert same_hash or count == 2
    assert repeats.repeated(lambda: iter([])) == (0, None)


def test_texts_of_a_stream_are_seen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "CHUNK", 4)
    seen, texts = repeats.Seen(), [f"text {i}" for i in range(50)]
    for i, text in enumerate(texts):
        assert seen.add(text)
        assert not any(map(seen.add, texts[: i + 1]))
    assert len(seen._sorted) <= 4
