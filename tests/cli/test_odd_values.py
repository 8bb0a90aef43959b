"""Odd values in carried fields and ids: every format carries them, or the record is bad."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from cli_helpers import MODEL, RECORDS, Cli
from cli_stand_in import OUTPUTS, plan_of, rows_of, run_stand_in

ODD = [
    '{"id": 1180591620717411303424}',
    '{"id": "half \\ud83d"}',
    '{"id": {}}',
    '{"id": []}',
    '{"id": [[{}]]}',
    '{"id": [1, "a", null, {"b": 2.5}]}',
    '{"id": true}',
    '{"id": 1e308}',
    '{"id": -0.0}',
    '{"id": null}',
    '{"id": {"\\udc00": 1}}',
    '{"id": ""}',
    '{"id": "a\\u0000b\\r\\nc\\td;\\"e\\""}',
    '{"": 1}',
    '{"\\ud800": 1}',
    '{"id": %s}' % ("[" * 150 + "]" * 150),
    '{"id": 9007199254740993}',
    '{"id": 0.5}',
    '{"id": {"a": 1}}',
    '{"id": {"a": "x"}}',
]  # fmt: skip


def with_request(line: str) -> str:
    return json.dumps({**json.loads(line), "query": "q é", "items": ["a", "bc"]})


def cell_value(text: str) -> Any:
    """What a cell says, where that is JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("odd", [*range(len(ODD)), "all"])
def test_odd_values_are_carried_to_every_format(cli: Cli, output: str, odd: int | str) -> None:
    chosen = ODD if odd == "all" else [ODD[int(odd)]]
    cli.write("in.jsonl", [*map(with_request, chosen), with_request('{"n": 1}')])
    run_stand_in(plan_of(output))
    found = rows_of(output)
    assert run_stand_in(plan_of(output)) == []
    if ".csv" in output or ".tsv" in output:
        assert len(found) == 2 * len(chosen) + 2
        found = found[::2]
    for line, row in zip(chosen, found, strict=False):
        for name, value in json.loads(line).items():
            if ".jsonl" in output:
                assert row[name] == value
                continue
            key = json.dumps(name) if name.startswith("\ud800") else name
            got = row[key]
            if got != value and got != str(value):
                assert (got in ("", None) and value is None) or cell_value(got) == value


BEYOND = ("1e999", "-1e999", "[1e400]", '{"a": {"b": 2e308}}', "NaN", "Infinity")


@pytest.mark.parametrize("number", BEYOND)
@pytest.mark.parametrize("output", OUTPUTS)
def test_numbers_beyond_the_range_are_bad_records(cli: Cli, number: str, output: str) -> None:
    odd = '{"id": NUMBER, "query": "q", "items": ["a"]}'.replace("NUMBER", number)
    lines = [json.dumps(RECORDS[0]), odd] * 2
    cli.write("in.jsonl", lines)
    for _ in range(2):
        assert cli("rank", "in.jsonl", "-o", output, *MODEL, "--resume").code == 3
    assert len(rows_of(output)) == (4 if "csv" in output or "tsv" in output else 2)
    reported = cli.read(f"{output}.errors.jsonl")
    assert [one["line"] for one in reported] == [2, 4]
    assert all("is not JSON that can be read: " in one["reason"] for one in reported)


def test_a_record_too_deep_to_be_written_is_bad(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.write("in.jsonl", [with_request(line) for line in (ODD[0], ODD[15], ODD[2])])
    plain = json.dumps

    def shallow(value: Any, **options: Any) -> str:
        if "[" * 100 in plain(value):
            raise RecursionError("too deep")
        return plain(value, **options)

    monkeypatch.setattr("packscore.files.journal.json.dumps", shallow)
    run_stand_in(plan_of("out.jsonl"))
    assert len(cli.read("out.jsonl")) == 2
    (reported,) = cli.read("out.jsonl.errors.jsonl")
    assert reported == {"line": 2, "reason": "cannot be written as JSON: too deep"}


def test_parquet_says_which_columns_are_json(cli: Cli) -> None:
    cli.write("in.jsonl", RECORDS)
    done = cli("score", "in.jsonl", "-o", "out.parquet", *MODEL)
    assert done.code == 0
    assert "JSON is in the columns ['id']: their values have no one type" in done.err
    table = parquet.read_table("out.parquet")
    assert table.column("id").to_pylist() == ['"a"', None, "7"]
    assert table.column("n").to_pylist() == [1, None, None]


@pytest.mark.parametrize("command", ["score", "rank"])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("lines", [[], ["nope", '{"query": "a", "items": []}']])
def test_outputs_are_made_where_no_record_was_good(
    cli: Cli, command: str, output: str, lines: list[str]
) -> None:
    cli.write("in.jsonl", lines)
    run_stand_in(plan_of(output), command=command)
    assert rows_of(output) == []
    cli.write("in.jsonl", [{"query": "q", "items": ["a"]}])
    run_stand_in(plan_of(f"one.{output}"), command=command)
    if ".csv" in output or ".tsv" in output:
        opened = gzip.open if output.endswith("gz") else open
        with opened(output, "rt") as empty, opened(f"one.{output}", "rt") as one:
            assert empty.read() == one.readline()
    elif output.endswith("parquet"):
        assert parquet.read_schema(output) == parquet.read_schema(f"one.{output}")


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("command", ["score", "rank"])
def test_ids_of_any_kind_are_carried_to_every_format(cli: Cli, output: str, command: str) -> None:
    ids = [7, "d", None, "\ud800", 2**70, 0.5, ""]
    docs = [{"id": one, "text": "x" * i} for i, one in enumerate(ids)]
    cli.write("in.jsonl", [{"query": "q", "docs": docs}, {"query": "r", "docs": ["no id"]}])
    run_stand_in(plan_of(output), command=command)
    found = rows_of(output)
    if ".csv" in output or ".tsv" in output:
        got = {int(row["corpus_id"]): row["item_id"] for row in found if row["query"] == "q"}
        expected = ["7", "d", "", '"\\ud800"', str(2**70), "0.5", ""]
    elif command == "rank":
        got = {entry["corpus_id"]: entry["id"] for entry in found[0]["ranking"]}
        expected = ids
    else:
        got, expected = dict(enumerate(found[0]["item_ids"])), ids
    if output.endswith("parquet"):
        expected = ["7", "d", None, '"\\ud800"', str(2**70), "0.5", ""]
    assert [got[i] for i in range(len(ids))] == expected


def test_mixed_numbers_keep_their_digits(cli: Cli) -> None:
    values = [1, 2.5, 2**60 + 1]
    for given in (values[:2], values):
        cli.write("in.jsonl", [{"query": "q", "items": ["a"], "x": one} for one in given])
        run_stand_in(plan_of("out.parquet", resume=False, overwrite=True))
        found = parquet.read_table("out.parquet").column("x").to_pylist()
        assert [float(one) for one in found] == list(map(float, given))
    assert found == ["1", "2.5", str(2**60 + 1)]
    assert pyarrow.types.is_string(parquet.read_schema("out.parquet").field("x").type)
