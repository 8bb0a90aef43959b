"""Files of records in, files of scores out: the numbers of the Python API, in order."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from typing import Any

import pytest
from pyarrow import parquet
from transformers import AutoModelForCausalLM, PreTrainedModel

from cli_helpers import MODEL, RECORDS, Cli
from packscore import MultiItemScorer, patch_model, shipped_model_path
from packscore.installed import install_command
from tolerances import LABEL_RELATIVE_BFLOAT16


@pytest.fixture(scope="module")
def scorer(tokenizer: Any) -> MultiItemScorer:
    """The scorer that the command line makes, in the checkpoint's own dtype."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        shipped_model_path(), dtype="auto"
    )
    patch_model(model.eval())
    return MultiItemScorer(model, tokenizer, prompt="qwen3-reranker", prefix_cache_bytes=0)


@pytest.mark.parametrize("softmax", [False, True])
def test_score_writes_what_the_api_gives(cli: Cli, scorer: MultiItemScorer, softmax: bool) -> None:
    option = ["--apply-softmax"] if softmax else []
    done = cli("score", cli.write("in.jsonl", RECORDS), "-o", "out.jsonl", *MODEL, *option)
    assert done.code == 0, done.err
    found = cli.read("out.jsonl")
    for given, got in zip(RECORDS, found, strict=True):
        expected = scorer.score(given["query"], given["items"], apply_softmax=softmax)
        carried = {name: value for name, value in given.items() if name != "items"}
        assert got == {**carried, "scores": expected}
        assert list(got)[:-1] == list(carried)
    assert not (cli.folder / "out.jsonl.errors.jsonl").exists()
    assert "3 records, 7 items" in done.err


def test_labels_of_several_tokens(cli: Cli, scorer: MultiItemScorer) -> None:
    path = cli.write("in.jsonl", RECORDS)
    for option, values, columns, labels in (
        ("--labels", " very good, bad", [" very good", " bad"], {"labels": [" very good", " bad"]}),
        ("--label-token-ids", "5 17,300", ["5 17", "300"], {"label_token_ids": [[5, 17], [300]]}),
    ):
        done = cli("score", path, "-o", "out.csv", "--overwrite", *MODEL, option, values)
        assert done.code == 0, done.err
        with (cli.folder / "out.csv").open(newline="") as file:
            found = [
                [float(row[f"score_{name}"]) for name in columns] for row in csv.DictReader(file)
            ]
        expected: list[list[float]] = []
        for record in RECORDS:
            expected += scorer.score(record["query"], record["items"], **labels)
        assert found == [pytest.approx(row, rel=LABEL_RELATIVE_BFLOAT16) for row in expected]
    done = cli("verify", path, *MODEL, "--labels", "no.,yes.", "--dtype", "float32")
    assert done.code == 0, done.err
    done = cli("score", path, "-o", "b.csv", *MODEL, "--label-token-ids", "5 x,3")
    assert "must be numbers with commas between labels, and blanks between the ids" in done.err


def test_rank_takes_documents_top_k_and_texts(cli: Cli, scorer: MultiItemScorer) -> None:
    records = [{"query": r["query"], "documents": r["items"]} for r in RECORDS]
    options = ("--top-k", "2", "--return-documents")
    done = cli("rank", cli.write("in.jsonl", records), "-o", "out.jsonl", *MODEL, *options)
    assert done.code == 0, done.err
    for given, got in zip(records, cli.read("out.jsonl"), strict=True):
        ranked = scorer.rank(given["query"], given["documents"], top_k=2, return_documents=True)
        assert got == {"query": given["query"], "ranking": ranked}


def test_options_reach_the_scorer(cli: Cli) -> None:
    texts = ["Open a file. " * 20, "No."]
    path = cli.write("in.jsonl", [{"q": "open", "texts": texts, "items": 3}])
    prompt = {"prefix": "Q: {query} {instruction}\nT:", "item": " {item}", "suffix": "\nA:\n"}
    (cli.folder / "mine.json").write_text(json.dumps(prompt))
    options = ("--query-field", "q", "--items-field", "texts", "--prompt", "mine.json")
    options += ("--instruction", "Now.", "--label-token-ids", "5,6,7", "--dtype", "float32")
    done = cli("score", path, "-o", "out.jsonl", *MODEL, *options)
    assert done.code == 2  # a field named items would be lost, were items returned
    records = [{"q": "open", "texts": texts}]
    done = cli(
        "score", cli.write("in.jsonl", records), "-o", "out.jsonl", *MODEL, *options,
        "--max-tokens", "40", "--overwrite", "--return-items",
    )  # fmt: skip
    assert done.code == 0, done.err
    (got,) = cli.read("out.jsonl")
    assert got["items"] == records[0]["texts"]
    assert [len(row) for row in got["scores"]] == [3, 3]
    assert got["truncated_items"] == [0]
    assert "1 items lost their end" in done.err


def test_stdin_to_stdout(cli: Cli, scorer: MultiItemScorer) -> None:
    lines = "".join(f"{json.dumps(r)}\n" for r in [RECORDS[0], "broken", RECORDS[1]])
    done = cli("rank", "-", "-o", "-", *MODEL, "--quiet", stdin=lines.encode())
    assert done.code == 3
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [r["ranking"] for r in found] == [
        scorer.rank(r["query"], r["items"]) for r in RECORDS[:2]
    ]
    (reported,) = (json.loads(line) for line in done.err.splitlines())
    assert reported["line"] == 2
    assert list(cli.folder.iterdir()) == []


def test_a_reader_that_goes_away_ends_it_quietly(cli: Cli) -> None:
    cli.write("in.jsonl", RECORDS * 50)
    command = f"{sys.executable} -m packscore score in.jsonl -o - {' '.join(MODEL)} -q | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


PAIRS = """id,query,item,note
1,open,Open a file.,x
2,open,"Shuffle, ""it""
twice",y
3,shuffle,Shuffle a list.,
4,open,No.,é
"""


def test_csv_groups_consecutive_rows_and_gives_them_back(cli: Cli, scorer: MultiItemScorer) -> None:
    (cli.folder / "in.csv").write_text(PAIRS)
    done = cli("score", "in.csv", "-o", "out.csv", *MODEL, "--return-items")
    assert done.code == 0, done.err
    rows = list(csv.DictReader((cli.folder / "out.csv").open(newline="")))
    given = list(csv.DictReader(io.StringIO(PAIRS, newline="")))
    for row, before in zip(rows, given, strict=True):
        assert {name: row[name] for name in before} == before
    groups = [("open", [0, 1]), ("shuffle", [2]), ("open", [3])]
    for query, index in groups:
        expected = scorer.score(query, [given[i]["item"] for i in index])
        for i, (no, yes) in zip(index, expected, strict=True):
            assert (float(rows[i]["score_no"]), float(rows[i]["score_yes"])) == (no, yes)
    assert "3 records, 4 items" in done.err
    assert not (cli.folder / "out.csv.part.jsonl").exists()


def test_csv_ranking_is_sorted_inside_a_query(cli: Cli, scorer: MultiItemScorer) -> None:
    (cli.folder / "in.csv").write_text(PAIRS)
    done = cli(
        "rank",
        "in.csv",
        "-o",
        "out.csv",
        *MODEL,
        "--top-k",
        "1",
        "--return-documents",
        "--no-group",
    )
    assert done.code == 0, done.err
    rows = list(csv.DictReader((cli.folder / "out.csv").open(newline="")))
    best = scorer.rank("open", ["Open a file.", 'Shuffle, "it"\ntwice'])[0]
    assert [row["id"] for row in rows] == [str(best["corpus_id"] + 1), "3", "4"]
    assert float(rows[0]["score"]) == best["score"]
    assert rows[1]["text"] == "Shuffle a list."


def test_csv_to_jsonl_carries_columns_as_lists(cli: Cli) -> None:
    (cli.folder / "in.csv").write_text(PAIRS)
    assert cli("score", "in.csv", "-o", "out.jsonl", *MODEL).code == 0
    found = cli.read("out.jsonl")
    assert [r["id"] for r in found] == [["1", "2"], ["3"], ["4"]]
    assert [r["note"] for r in found] == [["x", "y"], [""], ["é"]]


def test_parquet_both_ways(cli: Cli, scorer: MultiItemScorer) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(
        {
            "query": [r["query"] for r in RECORDS],
            "items": [r["items"] for r in RECORDS],
            "weight": [1.5, float("nan"), None],
        }
    )
    pyarrow.parquet.write_table(table, cli.folder / "in.parquet", row_group_size=2)
    done = cli("score", "in.parquet", "-o", "out.parquet", *MODEL)
    assert done.code == 0, done.err
    found = pyarrow.parquet.read_table(cli.folder / "out.parquet").to_pylist()
    for given, got in zip(RECORDS, found, strict=True):
        assert got["scores"] == scorer.score(given["query"], given["items"])
    assert [r["weight"] for r in found] == [1.5, None, None]
    again = cli("score", "in.parquet", "-o", "out.parquet", *MODEL, "--resume")
    assert again.code == 0
    assert "nothing to do" in again.err


def test_parquet_keeps_columns_that_begin_late(cli: Cli) -> None:
    records = [*RECORDS, *({"query": "q", "items": ["x"], "late": i} for i in range(3))]
    done = cli("score", cli.write("in.jsonl", records[1:]), "-o", "o.parquet", *MODEL)
    assert done.code == 0, done.err
    found = parquet.read_table(cli.folder / "o.parquet").to_pylist()
    assert [r["late"] for r in found] == [None, None, 0, 1, 2]


def test_without_pyarrow_the_remedy_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (cli.folder / "in.parquet").write_bytes(b"")
    done = cli("score", "in.parquet", "-o", "out.jsonl", *MODEL)
    assert done.code == 2
    assert install_command("parquet") in done.err


def test_empty_input_gives_an_empty_output(cli: Cli) -> None:
    done = cli("score", cli.write("in.jsonl", []), "-o", "out.jsonl", *MODEL)
    assert done.code == 0, done.err
    assert cli.read("out.jsonl") == []
