"""The files that people have: what is read of them, and what is said before a model is loaded."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from cli_helpers import MODEL, Cli
from cli_stand_in import plan_of, run_stand_in
from packscore.files.failures import RunError, UsageError
from packscore.files.inputs import Input, open_input
from packscore.files.look import ReadOptions
from packscore.files.paths import MISSING, find, without
from packscore.files.records import BadRecord, FieldNames, Record

NEVER = ("--model", "never loaded")
# (query, its documents by id), of unequal numbers
QUERIES = [
    ("open é 🐼", {"d1": "Open; a, file.", "d2": 'say "no"', "d3": "tab\there"}),
    ("shuffle", {"d4": "Shuffle | a list."}),
    ("delete", {"d5": "", "d2": 'say "no"'}),
]
PAIRS = [(query, i, text) for query, documents in QUERIES for i, text in documents.items()]


def lists(value_of: Callable[[str], Any], documents_of: Callable[[dict[str, str]], Any]) -> Any:
    """Objects with one query and all its documents."""
    return [{"n": 1, **value_of(query), **documents_of(docs)} for query, docs in QUERIES]


# name: (objects, names, the fields that are carried, of the first)
SHAPES: dict[str, tuple[list[dict[str, Any]], FieldNames, list[str]]] = {
    "texts": (
        lists(lambda q: {"query": q}, lambda d: {"items": [*d.values()], "ids": [*d]}),
        FieldNames(ids="ids"),
        ["n", "query"],
    ),
    "objects": (
        lists(lambda q: {"query": q}, lambda d: {"docs": [{"id": i, "text": d[i]} for i in d]}),
        FieldNames(),
        ["n", "query"],
    ),
    "nested": (
        lists(
            lambda q: {"query": {"text": q, "id": 1}},
            lambda d: {"hits": {"docs": [{"_id": i, "body": d[i]} for i in d], "k": 3}},
        ),
        FieldNames("query.text", "hits.docs.body"),
        ["n", "query", "hits"],
    ),
    "dots": (
        lists(lambda q: {"q.text": q}, lambda d: {"a.b": [{"id": i, "text": d[i]} for i in d]}),
        FieldNames("q.text", "a.b"),
        ["n", "q.text"],
    ),
    "rows": (
        [{"query": q, "document": text, "doc_id": i, "n": 1} for q, i, text in PAIRS],
        FieldNames(),
        ["query", "n"],
    ),
    "nested-rows": (
        [{"q": {"text": q}, "document": {"id": i, "text": text}, "n": 1} for q, i, text in PAIRS],
        FieldNames("q.text", "document.text"),
        ["q", "n"],
    ),
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": lambda data: gzip.compress(data[:70]) + gzip.compress(data[70:]),  # two members
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


def entries_of(given: str, file_format: str, options: ReadOptions) -> tuple[list[Any], str]:
    with open_input(given, file_format, options) as entries:
        return list(entries), entries.understood


def check(found: list[Any], fields: list[str]) -> None:
    for record, (query, documents) in zip(found, QUERIES, strict=True):
        assert isinstance(record, Record), record
        assert record.query == query
        assert record.items == list(documents.values())
        assert record.ids == list(documents)
        assert list(record.fields) == fields


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_jsonl_of_every_shape_and_compression(tmp_path: Path, shape: str, compression: str) -> None:
    objects, names, fields = SHAPES[shape]
    data = "".join(f"{json.dumps(value)}\n" for value in objects).encode()
    path = tmp_path / "in.jsonl"
    path.write_bytes(COMPRESSIONS[compression](data))
    found, understood = entries_of(str(path), "jsonl", ReadOptions(names))
    check(found, fields)
    assert (compression in understood) == (compression != "plain")
    assert repr(names.query) in understood
    assert ("rows of a query" in understood) == ("rows" in shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_parquet_of_every_shape(tmp_path: Path, shape: str) -> None:
    objects, names, fields = SHAPES[shape]
    path = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(objects), path, row_group_size=2)
    check(entries_of(str(path), "parquet", ReadOptions(names))[0], fields)


TABLES = list(itertools.product([",", "\t", ";", "|"], COMPRESSIONS, ["query", "the.query"]))


@pytest.mark.parametrize(("delimiter", "compression", "query"), TABLES)
def test_tables_of_every_delimiter_and_compression(
    tmp_path: Path, delimiter: str, compression: str, query: str
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow([query, "n,m", "doc_id", "document"])
    writer.writerows([q, "1;2", i, document] for q, i, document in PAIRS)
    path = tmp_path / "in.csv"
    path.write_bytes(COMPRESSIONS[compression](text.getvalue().encode()))
    for given in (None, delimiter):
        options = ReadOptions(FieldNames(query), delimiter=given)
        found, understood = entries_of(str(path), "csv", options)
        check(found, [query, "n,m"])
        assert ("a tab" if delimiter == "\t" else repr(delimiter)) in understood


def test_a_row_between_tabs_is_a_line_whatever_quotes_it_has(tmp_path: Path) -> None:
    rows = ['"never closed', 'closed "inside" it', '"enclosed, ""twice"""', 'at the end"', '"a" b']
    path = tmp_path / "in.tsv"
    path.write_text("query\tdocument\n" + "".join(f"q\t{row}\n" for row in rows))
    (found,), _ = entries_of(str(path), "tsv", ReadOptions(FieldNames()))
    assert isinstance(found, Record)
    assert found.items == [*rows[:2], 'enclosed, "twice"', *rows[3:]]


def test_names_go_before_paths_and_paths_through_lists() -> None:
    value = {"a": {"b": {"c": 1}, "b.c": 2}, "a.b": {"c": 3}, "x": [{"y": 1}, {}, {"y": None}]}
    assert find(value, "a.b") == {"c": 3}
    assert find(value, "a.b.c") == 2
    assert find(value, "x.y") == [1, MISSING, None]
    for path in ("a.c", "x.z", "a.b.c.d", "", "a.", "n"):
        assert find(value, path) is MISSING
    assert find({"x": []}, "x.y") == []
    assert without({"a": {"b": 1, "c": 2}, "d": 3}, "a.b") == {"a": {"c": 2}, "d": 3}
    assert without({"a": {"b": 1}, "d": 3}, "a.b") == {"d": 3}
    assert without({"a": [{"b": 1}], "d": 3}, "a.b") == {"d": 3}


BAD_DOCUMENTS = {
    "no-text": ([{"id": 1}], "docs[0] is an object without 'text'; name its text with"),
    "bad-text": ([{"text": "a"}, {"text": 3}], "docs[1].text is a number; it must be a string"),
    "bad-id": ([{"text": "a", "id": ["x"]}], "docs.id[0] is a list; an id is a string or a"),
    "boolean-id": ([{"text": "a", "id": True}], "docs.id[0] is a boolean"),
    "mixed": ([{"text": "a"}, None], "docs[1] is null; it must be a string"),
}


@pytest.mark.parametrize("case", BAD_DOCUMENTS)
def test_documents_that_are_objects_and_bad(cli: Cli, case: str) -> None:
    docs, reason = BAD_DOCUMENTS[case]
    good = {"query": "q", "docs": [{"id": 1, "text": "a"}, {"text": "b"}]}
    cli.write("in.jsonl", [{"query": "q", "docs": docs}, good])
    (bad, record), _ = entries_of("in.jsonl", "jsonl", ReadOptions())
    assert reason in bad.reason
    assert record.ids == [1, None]


def test_ids_of_another_number_than_items_are_bad(cli: Cli) -> None:
    values = [{"query": "q", "docs": ["a", "b"], "at": ids} for ids in ([1, 2], [1], 3, None)]
    cli.write("in.jsonl", values)
    found, _ = entries_of("in.jsonl", "jsonl", ReadOptions(FieldNames(ids="at")))
    assert [getattr(one, "reason", "good") for one in found] == [
        "good",
        "at has 1 ids, and there are 2 items",
        "at is a number; it must be a list with an id for each item",
        "at is null; it must be a list with an id for each item",
    ]


def test_rows_may_miss_what_others_carry(cli: Cli) -> None:
    rows = [
        {"query": "a", "doc": "1", "x": [1], "id": "p"},
        {"query": "a", "doc": "2"},
        {"query": "a", "doc": ["3"]},
        {"query": "b", "doc": "4", "late": {}},
    ]
    cli.write("in.jsonl", rows)
    found, _ = entries_of("in.jsonl", "jsonl", ReadOptions())
    first, bad, second = sorted(found, key=lambda one: one.line)
    assert first.fields == {"query": "a", "x": [[1], None], "id": ["p", None]}
    assert (bad.line, bad.reason) == (3, "doc is a list; the first records have one text there")
    assert second.fields == {"query": "b", "late": [{}]}


def test_a_nested_query_with_fields_of_its_own_rows_loses_none(cli: Cli) -> None:
    rows = [{"q": {"text": "a", "k": k, "item": f"{k}"}} for k in range(3)]
    cli.write("in.jsonl", rows)
    (record,), _ = entries_of("in.jsonl", "jsonl", ReadOptions(FieldNames("q.text", "q.item")))
    assert record.fields == {"q": [{"text": "a", "k": k} for k in range(3)]}


# rows whose queries come back: "a" and "c" do, "b" does not
SCATTERED = [{"query": q, "document": f"{q}{i}", "k": i} for i, q in enumerate("aabaccbbac")]


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv", "in.parquet", "in.jsonl.gz"])
def test_rank_refuses_scattered_rows_unless_told(cli: Cli, name: str) -> None:
    if name.endswith("parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(SCATTERED), name)
    elif name.endswith("csv"):
        text = "".join(f"{r['query']},{r['document']},{r['k']}\n" for r in SCATTERED)
        Path(name).write_text(f"query,document,k\n{text}")
    else:
        text = "".join(f"{json.dumps(r)}\n" for r in SCATTERED)
        data = text.encode()
        Path(name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    done = cli("rank", name, "-o", "out.jsonl", *NEVER)
    assert done.code == 2
    assert "queries that come back after another one: 3, the first is 'a' (line " in done.err
    assert list(Path().glob("out*")) == []
    run_stand_in(plan_of("out.jsonl", name), read=ReadOptions(group=True), command="rank")
    found = cli.read("out.jsonl")
    assert [r["query"] for r in found] == ["a", "b", "c"]
    assert [list(map(int, r["k"])) for r in found] == [[0, 1, 3, 8], [2, 6, 7], [4, 5, 9]]
    run_stand_in(plan_of("each.jsonl", name), read=ReadOptions(group=False, once=True))
    assert "".join(r["query"] for r in cli.read("each.jsonl")) == "abacbac"
    run_stand_in(plan_of("score.jsonl", name))
    assert Path("score.jsonl").read_bytes() == Path("each.jsonl").read_bytes()


def test_a_stream_whose_rows_come_back_ends_there(cli: Cli) -> None:
    lines = "".join(f"{json.dumps(r)}\n" for r in SCATTERED).encode()
    done = cli("rank", "-", "-o", "-", *MODEL, stdin=lines)
    assert done.code == 1
    assert [json.loads(line)["query"] for line in done.out.splitlines()] == ["a", "b"]
    assert "line 4 of INPUT: the query 'a' comes back after another one" in done.err
    done = cli("rank", "-", "-o", "-", *MODEL, "--group", stdin=lines)
    assert [len(json.loads(line)["ranking"]) for line in done.out.splitlines()] == [4, 3, 3]


def test_group_is_for_rows(cli: Cli) -> None:
    cli.write("in.jsonl", [{"query": "q", "items": ["a"]}])
    done = cli("score", "in.jsonl", "-o", "out.jsonl", *NEVER, "--group")
    assert done.code == 2
    assert "--group and --no-group are for rows of one item, and INPUT has lists" in done.err


def lines_of(record: str, count: int) -> str:
    return "".join(f"{record}\n" for _ in range(count))


ALIKE = {
    "no-query": ('{"text": "q", "items": ["a"]}', 1, "field 'query' is missing; name it with"),
    "no-items": ('{"query": "q", "texts": ["a"]}', 7, "field 'items' (or 'documents', 'docs'"),
    "reserved": ('{"query": "q", "items": ["a"], "scores": 1}', 3, "has the fields ['scores']"),
    "not-json": ("{nope", 130, "is not JSON: Expecting property name"),
    "empty": ('{"query": "q", "items": []}', 100, "items is an empty list"),
}


@pytest.mark.parametrize("case", ALIKE)
def test_records_that_are_all_bad_for_one_reason_end_it_at_once(cli: Cli, case: str) -> None:
    line, count, reason = ALIKE[case]
    Path("in.jsonl").write_text(lines_of(line, count))
    done = cli("score", "in.jsonl", "-o", "out.jsonl", *NEVER)
    assert done.code == 2
    assert f"all of the first {min(count, 100)} records are bad, for one reason; line 1" in done.err
    assert reason in done.err
    assert [path.name for path in Path().iterdir()] == ["in.jsonl"]
    # as a stream it is the same
    done = cli("score", "-", "-o", "-", *NEVER, stdin=Path("in.jsonl").read_bytes())
    assert done.code == 2
    # one record that is good, or bad for another reason, and they are bad records
    for other in ('{"query": "q", "items": ["a"]}', "[]"):
        text = lines_of(line, min(count, 99))
        Path("in.jsonl").write_text(f"{text}{other}\n{text}")
        run_stand_in(plan_of("out.jsonl", overwrite=True, resume=False))
        assert len(cli.read("out.jsonl.errors.jsonl")) >= 2 * min(count, 99)


def test_few_bad_records_are_bad_records(cli: Cli) -> None:
    Path("in.jsonl").write_text(lines_of("{nope", 99))
    run_stand_in(plan_of("out.jsonl"))
    assert len(cli.read("out.jsonl.errors.jsonl")) == 99


def test_what_was_understood_is_said_before_the_model_is_loaded(cli: Cli) -> None:
    docs = [{"_id": 3, "text": "a"}]
    cli.write("in.jsonl", ["nope", *[{"query": {"text": "q"}, "docs": docs}] * 120])
    done = cli("rank", "in.jsonl", "-o", "out.jsonl", *NEVER)
    assert done.code == 1
    first, second = done.err.splitlines()[:2]
    assert first == (
        "packscore: in.jsonl: jsonl; query in 'query'; a list of items in 'docs'; ids in 'docs._id'"
        " (looked at 100, 1 of them bad)"
    )
    assert "never loaded cannot be loaded" in second
    quiet = cli("rank", "in.jsonl", "-o", "out.jsonl", *NEVER, "--quiet")
    assert first not in quiet.err


REFUSED = {
    "zstd": (b"\x28\xb5\x2f\xfd....", "compressed with zstd; pipe it in: zstd -dc FILE"),
    "zip": (b"PK\x03\x04....", "a zip archive"),
    "parquet": (b"PAR1....", "a parquet file; pass --input-format parquet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_something_else_is_refused_by_name(cli: Cli, case: str) -> None:
    data, message = REFUSED[case]
    Path("in.jsonl").write_bytes(data)
    done = cli("score", "in.jsonl", "-o", "out.jsonl", *NEVER)
    assert done.code == 2
    assert message in done.err


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "xz"])
def test_damage_is_told_and_what_was_before_it_stays(cli: Cli, compression: str) -> None:
    lines = [json.dumps({"query": f"{i * 7919}", "items": [f"{i * 104729}"]}) for i in range(3000)]
    data = COMPRESSIONS[compression](lines_of("\n".join(lines), 1).encode())
    Path("in.jsonl").write_bytes(data[:-9])
    with pytest.raises(RunError, match="the compressed data is damaged"):
        run_stand_in(plan_of("out.jsonl"))
    kept = cli.read("out.jsonl")
    assert len(kept) > 100
    assert [r["query"] for r in kept] == [f"{i * 7919}" for i in range(len(kept))]
    done = cli("score", "in.jsonl", "-o", "out.jsonl", *NEVER)
    assert done.code == 2


@pytest.mark.parametrize("compression", ["gzip", "xz"])
def test_bytes_that_changed_are_told(cli: Cli, compression: str) -> None:
    data = COMPRESSIONS[compression](lines_of('{"query": "q", "items": ["a"]}', 500).encode())
    Path("in.jsonl").write_bytes(data[:-30] + bytes(30))
    with pytest.raises(RunError, match="the compressed data is damaged"):
        run_stand_in(plan_of("out.jsonl"))


def test_a_stream_is_answered_line_by_line(tmp_path: Path) -> None:
    """Whoever writes it may wait for each answer: nothing waits for a hundred lines."""
    read_end, write_end = os.pipe()
    path = f"/dev/fd/{read_end}"
    answers: list[Any] = []
    first = threading.Event()

    def consume() -> None:
        with open_input(path, "jsonl", ReadOptions()) as entries:
            for entry in entries:
                answers.append(entry)
                first.set()

    reader = threading.Thread(target=consume)
    reader.start()
    with os.fdopen(write_end, "wb", buffering=0) as pipe:
        for value in ({"query": "a"}, {"query": "b", "items": ["c"]}):
            pipe.write(f"{json.dumps(value)}\n".encode())
        assert first.wait(20)
        pipe.write(b'{"query": "d", "items": ["e"]}\n')
    reader.join(20)
    os.close(read_end)
    assert [type(one) for one in answers] == [BadRecord, Record, Record]


def test_tables_are_read_from_streams(cli: Cli) -> None:
    text = "query;document\n" + "".join(f"{q};{i}\n" for q, i, _ in PAIRS)
    for data in (text.encode(), gzip.compress(text.encode())):
        options = ("--format", "csv", "--quiet")
        done = cli("rank", "-", "-o", "-", *MODEL, *options, stdin=data)
        assert done.code == 0, done.err
        assert [len(json.loads(line)["ranking"]) for line in done.out.splitlines()] == [3, 1, 2]


OPTIONS = {
    "--delimiter=xx": "--delimiter='xx' must be one character, or one of tab, comma",
    "--delimiter=;": "--delimiter is for csv and tsv, and INPUT is jsonl",
    "--id-field=query": "must be different fields",
    "--id-field=nowhere": "field 'nowhere' is missing",
    "--items-field=items.body": "field 'items.body' is missing",
    "--format=json": "--input-format='json' must be one of jsonl, csv, tsv, parquet",
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("command", ["rank", "verify"])
def test_options_that_do_not_fit_are_told_before_the_model_is_loaded(
    cli: Cli, option: str, command: str
) -> None:
    cli.write("in.jsonl", [{"query": "q", "items": ["a"]}])
    output = ["-o", "out.jsonl"] if command == "rank" else []
    done = cli(command, "in.jsonl", *output, *NEVER, option)
    assert done.code == 2
    assert OPTIONS[option] in done.err


def test_a_column_that_is_missing_is_told_before_the_model_is_loaded(cli: Cli) -> None:
    Path("in.csv").write_text("question,document\n")
    done = cli("rank", "in.csv", "-o", "out.csv", *NEVER)
    assert done.code == 2
    assert "the header is ['question', 'document']: field 'query' is missing" in done.err
    parquet.write_table(pyarrow.table({"query": ["q"], "texts": [["a"]]}), "in.parquet")
    done = cli("rank", "in.parquet", "-o", "out.csv", *NEVER)
    assert done.code == 2
    assert "field 'items' (or" in done.err


def test_an_input_is_an_iterator_of_its_entries(cli: Cli) -> None:
    cli.write("in.jsonl", [{"query": "q", "items": ["a"]}] * 130)
    with open_input("in.jsonl", "jsonl", ReadOptions()) as entries:
        assert isinstance(entries, Input)
        assert entries.total == Path("in.jsonl").stat().st_size
        assert len(list(entries)) == 130
        assert entries.position == entries.total
    with pytest.raises(UsageError, match="INPUT=- is a stream, and parquet is read from its end"):
        entries_of("-", "parquet", ReadOptions())
