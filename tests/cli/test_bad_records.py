"""What cannot be scored is reported by line and reason, and stops nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from pyarrow import parquet

from cli_helpers import MODEL, RECORDS, Cli

GOOD = json.dumps(RECORDS[0]).encode()
DEEP = b'{"query": "q", "items": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD_LINES = {
    "not-json": (b"{nope", "is not JSON"),
    "not-an-object": (b"[1, 2]", "is a list; it must be an object"),
    "nan": (b'{"query": "q", "items": ["a"], "x": NaN}', "NaN is not a JSON value"),
    "deep": (DEEP, "is not JSON that can be read"),
    "huge-number": (b'{"query": "q", "items": ["a"], "x": ' + b"1" * 5000 + b"}", "that can be"),
    "no-query": (b'{"id": 3, "items": ["a"]}', "field 'query' is missing"),
    "no-items": (b'{"id": 3, "query": "q"}', "field 'items' (or 'documents', "),
    "both": (b'{"query": "q", "items": ["a"], "documents": ["b"]}', "both 'items' and 'documents'"),
    "empty-list": (b'{"query": "q", "items": []}', "items is an empty list"),
    "null-item": (b'{"query": "q", "items": ["a", null]}', "items[1] is null"),
    "number-item": (b'{"query": "q", "items": [1]}', "items[0] is a number; it must be a string"),
    "text-items": (b'{"query": "q", "items": "abc"}', "items is a string; it must be a list"),
    "number-query": (b'{"query": true, "items": ["a"]}', "query is a boolean"),
    "surrogate": (b'{"query": "q", "items": ["a\\ud800"]}', "items[0] has half of a surrogate"),
    "not-utf8": (b'{"query": "\xff", "items": ["a"]}', "is not UTF-8: invalid start byte at byte"),
    "long": (b'{"query": "' + b"x" * 10**7 + b'", "items": ["a"]}', "10,000,029 bytes long"),
    "blank-query": (b'{"query": " ", "items": ["a"]}', "is empty, and the prompt asks"),
    "long-query": (
        b'{"id": 9, "query": "' + b"word " * 9000 + b'", "items": ["a"]}',
        "which leaves none of max_tokens=8192",
    ),
    "result-field": (b'{"query": "q", "items": ["a"], "scores": 1}', "fields ['scores'], which"),
}


def test_every_kind_of_bad_line_between_good_ones(cli: Cli) -> None:
    lines = [line for bad, _ in BAD_LINES.values() for line in (bad, b"", GOOD)]
    (cli.folder / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    done = cli("score", "in.jsonl", "-o", "out.jsonl", *MODEL)
    assert done.code == 3
    found = cli.read("out.jsonl")
    assert len(found) == len(BAD_LINES)
    assert all(record == found[0] for record in found)
    reported = cli.read("out.jsonl.errors.jsonl")
    assert [r["line"] for r in reported] == [1 + 3 * i for i in range(len(BAD_LINES))]
    for (name, (line, reason)), got in zip(BAD_LINES.items(), reported, strict=True):
        assert reason in got["reason"], name
        assert got.get("id") == (json.loads(line)["id"] if b'"id"' in line else None)
    assert f"{len(BAD_LINES)} bad records, by line and reason in out.jsonl.errors.jsonl" in done.err


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize(("spare", "code"), [(0, 0), (-1, 3)])
def test_the_limit_of_a_line_is_exact(cli: Cli, spare: int, code: int, end: bytes) -> None:
    (cli.folder / "in.jsonl").write_bytes(GOOD + end + GOOD)
    limit = str(len(GOOD) + spare)
    done = cli("score", "in.jsonl", "-o", "out.jsonl", *MODEL, "--max-line-bytes", limit)
    assert done.code == code, done.err
    if code:
        reasons = [r["reason"] for r in cli.read("out.jsonl.errors.jsonl")]
        expected = f"the line is {len(GOOD)} bytes long, over --max-line-bytes={limit}"
        assert reasons == [expected, expected]


def test_errors_go_where_they_are_told(cli: Cli) -> None:
    path = cli.write("in.jsonl", ["nope"])
    done = cli("score", path, "-o", "out.jsonl", "--errors", "bad.jsonl", *MODEL)
    assert done.code == 3
    assert [r["line"] for r in cli.read("bad.jsonl")] == [1]


def test_on_long_error_refuses_the_record(cli: Cli) -> None:
    path = cli.write("in.jsonl", [RECORDS[0], {"query": "q", "items": ["a", "word " * 300]}])
    options = ("--max-tokens", "200", "--on-long", "error")
    done = cli("score", path, "-o", "out.jsonl", *MODEL, *options)
    assert done.code == 3
    (reported,) = cli.read("out.jsonl.errors.jsonl")
    assert reported["line"] == 2
    assert "items[1] has" in reported["reason"]


BROKEN = [RECORDS[0], {"query": "drinks", "items": ["tea", "café", "juice"]}]


def test_scores_that_are_not_finite_make_a_bad_record(cli: Cli, broken_model_folder: str) -> None:
    done = cli("score", cli.write("in.jsonl", BROKEN), "-o", "out.jsonl", "-m", broken_model_folder)
    assert done.code == 3
    (reported,) = cli.read("out.jsonl.errors.jsonl")
    assert reported["line"] == 2
    assert "1 scores are not finite" in reported["reason"]
    assert "items[1]" in reported["reason"]
    assert len(cli.read("out.jsonl")) == 1


def test_scores_that_are_not_finite_are_null_where_asked_for(
    cli: Cli, broken_model_folder: str
) -> None:
    options = ("-m", broken_model_folder, "--on-non-finite", "report")
    path = cli.write("in.jsonl", BROKEN)
    done = cli("score", path, "-o", "out.jsonl", *options)
    assert done.code == 0
    assert "1 scores are not finite (non_finite_items)" in done.err
    scored = cli.read("out.jsonl")[1]
    assert scored["non_finite_items"] == [1]
    assert [row[0] is None for row in scored["scores"]] == [False, True, False]
    assert cli("rank", path, "-o", "ranked.jsonl", "--top-k", "3", *options).code == 0
    ranked = cli.read("ranked.jsonl")[1]
    assert ranked["non_finite_items"] == [1]
    assert ranked["ranking"][-1] == {"corpus_id": 1, "score": None}
    for suffix in ("csv", "parquet"):
        assert cli("rank", path, "-o", f"out.{suffix}", *options).code == 0
    with (cli.folder / "out.csv").open(newline="") as file:
        assert [row["score"] == "" for row in csv.DictReader(file)][-3:] == [False, False, True]
    table = parquet.read_table(cli.folder / "out.parquet").to_pylist()
    assert table[1]["ranking"] == ranked["ranking"]
    assert (
        cli(
            "score", path, "-o", "x.jsonl", "-m", broken_model_folder, "--on-non-finite", "skip"
        ).code
        == 2
    )


CSV_WITH_BAD_ROWS = (
    b"query,item\nopen,a\nopen\nopen,b\nopen,\xff\nopen," + b"x" * 400 + b'\n\nshuffle,c\nend,"d\n'
)


def test_bad_csv_rows_leave_their_group_whole(cli: Cli) -> None:
    (cli.folder / "in.csv").write_bytes(CSV_WITH_BAD_ROWS)
    done = cli("score", "in.csv", "-o", "out.jsonl", *MODEL, "--max-line-bytes", "100")
    assert done.code == 3
    assert [len(r["scores"]) for r in cli.read("out.jsonl")] == [2, 1]
    reported = {r["line"]: r["reason"] for r in cli.read("out.jsonl.errors.jsonl")}
    assert sorted(reported) == [3, 5, 6, 9]
    assert "has 1 fields, and the header has 2" in reported[3]
    assert "is not UTF-8" in reported[5]
    assert "405 bytes long, over --max-line-bytes=100" in reported[6]
    assert "unexpected end of data" in reported[9]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "the header is []: field 'query' is missing"),
        ("query,text", "field 'items' (or 'documents', 'docs', 'item', 'document', 'doc')"),
        ("query,item,document", "has both 'item' and 'document'; name one with --items-field"),
        ("query,item,item", "names ['item'] more than once"),
    ],
)
def test_csv_headers_that_do_not_fit(cli: Cli, header: str, message: str) -> None:
    Path("in.csv").write_text(f"{header}\na,b\n" if header else "")
    done = cli("score", "in.csv", "-o", "out.jsonl", "--model", "never loaded")
    assert done.code == 2
    assert message in done.err


def test_csv_output_refuses_records_whose_columns_it_needs(cli: Cli) -> None:
    records = [RECORDS[0], {"query": "q", "items": ["a"], "score_yes": 3}]
    done = cli("score", cli.write("in.jsonl", records), "-o", "out.csv", *MODEL)
    assert done.code == 3
    (reported,) = cli.read("out.csv.errors.jsonl")
    assert "['score_yes'], which the output needs" in reported["reason"]
