"""What a run tells before it starts: counted or estimated, timed or predicted."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from cli_helpers import MODEL, RECORDS, Cli, Done
from packscore import MultiItemScorer, shipped_model_path
from packscore.cli import plan as planning
from packscore.cli import run as running
from packscore.cli import tasks
from packscore.cli.plan import Plan, foretold, make_plan, predicted_seconds, priced, span
from packscore.files import look
from packscore.files import sample as sampling
from packscore.files.inputs import open_input
from packscore.files.look import ReadOptions
from packscore.flows.costs import FROM_SHAPE

UNTIMED = "; time unknown until the first records are timed"
QUESTIONS = {"late": {"type": "noul", "instructions": "Is it late?"}}


def plan_in(done: Done) -> str:
    """What was told, behind the name of the command."""
    found = [line for line in done.err.splitlines() if "plan: " in line]
    assert len(found) == 1, done.err
    return found[0].partition("plan: ")[2]


@pytest.fixture(scope="module")
def scorer() -> MultiItemScorer:
    return MultiItemScorer.from_pretrained(
        shipped_model_path(), device="cpu", prompt="qwen3-reranker"
    )


def numbers(text: str) -> list[int]:
    return [int(found.replace(",", "")) for found in re.findall(r"\d[\d,]*", text)]


def written(num_rows: int, rows_a_group: int, per_query: int | None) -> None:
    """Rows of a query, or (None) lists, all over the file of about the same length."""
    columns: dict[str, Any] = {"query": [f"query {i // (per_query or 1)}" for i in range(num_rows)]}
    texts = [f"item {i} {'a' * (i % 7)}" for i in range(num_rows)]
    columns |= {"item": texts} if per_query else {"items": [[one, "b"] for one in texts]}
    parquet.write_table(pa.table(columns), "in.parquet", row_group_size=rows_a_group)


def test_a_small_input_is_counted_before_it_is_run_and_by_a_dry_run(cli: Cli) -> None:
    path = cli.write("in.jsonl", [*RECORDS, "bad"])
    done = cli("score", path, "-o", "out.jsonl", *MODEL, "--price-per-hour", "3")
    dry = cli("score", path, "-o", "never.jsonl", *MODEL, "--dry-run")
    table = dict(
        re.split(r" {1,}(?=\d|unknown)", line, maxsplit=1) for line in dry.out.splitlines()
    )
    expected = (
        f"3 records and 1 bad, 7 items; {table['tokens packed']} tokens, "
        f"{table['tokens saved']} saved{UNTIMED}"
    )
    assert plan_in(done) == expected
    assert f"time {table['time']}" == UNTIMED.removeprefix("; ")
    assert done.err.index("plan: ") < done.err.index("3 records, 7 items in")


def test_quiet_tells_no_plan_and_a_run_that_is_done_has_none(cli: Cli) -> None:
    path = cli.write("in.jsonl", RECORDS)
    assert cli("score", path, "-o", "out.jsonl", *MODEL, "--quiet").err == ""
    done = cli("score", path, "-o", "out.jsonl", *MODEL, "--resume")
    assert "complete; nothing to do" in done.err
    assert "plan: " not in done.err


@pytest.mark.parametrize("rows_a_group", [50, 600])
@pytest.mark.parametrize("per_query", [12, None])
def test_of_a_long_parquet_a_few_rows_all_over_it_are_encoded(
    cli: Cli,
    scorer: MultiItemScorer,
    monkeypatch: pytest.MonkeyPatch,
    rows_a_group: int,
    per_query: int | None,
) -> None:
    monkeypatch.setattr(sampling, "ROWS", 100)
    monkeypatch.setattr(sampling, "PLACES", 5)
    written(600, rows_a_group, per_query)
    encoded, task = 0, tasks.rank_task(scorer, top_k=None, return_documents=False)

    def encode(record: Any) -> Any:
        nonlocal encoded
        encoded += record.size
        return task.encode(record)

    counted = tasks.Task(task.run, encode)
    with open_input("in.parquet", "parquet", ReadOptions()) as entries:
        told = foretold("in.parquet", entries, counted, scorer, None)
        exact = make_plan(entries, task)  # nothing was taken
    assert encoded == 100 * (1 if per_query else 2)
    groups = 600 // rows_a_group
    places = "from 100 rows at the beginnings of 5 of 12 row groups"
    assert told.endswith(f"({places if groups == 12 else 'from the first 100 rows'}){UNTIMED}")
    all_rows, records, items, tokens, saved = numbers(told)[:5]
    assert all_rows == 600
    assert (records, items) == (exact.records, exact.items)
    assert tokens == pytest.approx(exact.packed_tokens, rel=0.05)
    assert saved == pytest.approx(exact.saved_tokens, rel=0.05)


@pytest.mark.parametrize("lists", [True, False])
def test_of_other_files_the_first_records_are_scaled_by_their_bytes(
    cli: Cli, scorer: MultiItemScorer, lists: bool
) -> None:
    texts = [f"item {i % 10}" for i in range(500)]
    one_a_row = [{"query": f"q {i // 10:02d}", "item": text} for i, text in enumerate(texts)]
    records = [{"query": "q", "items": [text, "b"]} for text in texts] if lists else one_a_row
    path = cli.write("in.jsonl", records)
    task = tasks.score_task(scorer, apply_softmax=True, return_items=False)
    with open_input(path, "jsonl", ReadOptions()) as entries:
        told = foretold(path, entries, task, scorer, None)
        exact = make_plan(entries, task)
    assert f"(from the first 100, by their bytes){UNTIMED}" in told
    found, counted = numbers(told)[:4], [exact.records, exact.items, exact.packed_tokens]
    assert found == pytest.approx([*counted, exact.saved_tokens], rel=0.02)


def test_what_nothing_tells_is_unknown(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "LOOKED_AT_RECORDS", 5)
    lines = "".join(f"{json.dumps(RECORDS[1])}\n" for _ in range(6)).encode()
    Path("in.jsonl.gz").write_bytes(gzip.compress(lines))
    row = '{"query": "q", "item": "x"}\n'
    Path("one.jsonl").write_text(row * 8)
    unknown = "unknown, for nothing says how many records there are; --dry-run reads them all"
    for path in ("in.jsonl.gz", "one.jsonl"):
        assert plan_in(cli("rank", path, "-o", f"{path}.out.jsonl", *MODEL)) == unknown
    done = cli("rank", "-", "-o", "-", *MODEL, stdin=lines)
    assert "plan: " not in done.err


def test_the_first_records_are_timed_and_priced_once(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(look, "LOOKED_AT_RECORDS", 1)
    path = cli.write("in.jsonl", RECORDS * 3)
    done = cli("score", path, "-o", "out.jsonl", *MODEL, "--price-per-hour", "7.5")
    (told,) = re.findall(r"packscore: (.*) items took .* s; in all about (.*)", done.err)
    assert told[0] == "3"  # behind the second record: the first warms up
    assert re.fullmatch(r"\d+\.\d s, cost \d+\.\d\d at 7\.5 an hour", told[1])
    assert "items took" not in cli("score", path, "-o", "b.jsonl", *MODEL, "--quiet").err
    for price in ("-1", "nan", "inf"):
        done = cli("score", path, "-o", "c.jsonl", *MODEL, "--price-per-hour", price)
        assert done.code == 2
        assert "--price-per-hour" in done.err


def test_costs_that_somebody_measured_tell_the_time(
    cli: Cli, scorer: MultiItemScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks.score_task(scorer, apply_softmax=True, return_items=False)
    path = cli.write("in.jsonl", [{"query": "q", "items": ["a", "b", "c"]}] * 50)
    engine = scorer._core.engine
    assert engine.costs.source == FROM_SHAPE
    with open_input(path, "jsonl", ReadOptions()) as entries:
        plan = make_plan(entries, task)
    assert predicted_seconds(plan, scorer) is None
    before = engine.costs
    try:
        scorer.calibrate(seconds=0.01)
        found = predicted_seconds(plan, scorer)
        assert found is not None
        request = scorer.encode("q", ["a", "b", "c"])
        flows = scorer._core.runner.explain(request).plans
        (packed,) = (one.cost_ms for one in flows if one.flow == "packed")
        assert found == (pytest.approx(50 * packed / 1e3, rel=0.1), "measured on this machine")
        with open_input(path, "jsonl", ReadOptions()) as entries:
            told = foretold(path, entries, task, scorer, 36.0)
    finally:
        engine.costs = before
    assert re.search(r"; about .* s, cost .* at 36 an hour, costs measured on this machine$", told)


def test_decisions_have_a_plan_and_are_written_as_parquet(cli: Cli) -> None:
    (cli.folder / "q.json").write_text(json.dumps(QUESTIONS))
    columns = {"state": [f"s {i}" for i in range(3)], "key": [1, 2, 3], "ranking": ["a", "b", None]}
    parquet.write_table(pa.table(columns), "in.parquet")
    outputs = {}
    for output in ("out.jsonl", "out.parquet"):
        done = cli("decide", "in.parquet", "-o", output, "--questions", "q.json", *MODEL)
        assert done.code == 0, done.err
        assert plan_in(done).startswith("3 records, 3 questions; ")
        outputs[output] = done
    found = parquet.read_table("out.parquet").to_pylist()
    of_json = ("answers", "usage", "diagnostics")
    assert [{k: json.loads(v) if k in of_json else v for k, v in row.items()} for row in found] == (
        cli.read("out.jsonl")
    )
    assert "JSON is in" not in outputs["out.parquet"].err


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.04, "0.0 s"), (119, "119.0 s"), (120, "2.0 min"), (7200, "2.0 h"), (4e5, "4.6 days")],
)
def test_times_are_told_in_the_unit_that_suits_them(seconds: float, told: str) -> None:
    assert span(seconds) == told
    assert priced(3600.0, 2.5) == "60.0 min, cost 2.50 at 2.5 an hour"
    assert planning.UNTIMED in UNTIMED
    assert Plan("items", "queries").line() == "0 records, 0 items; 0 tokens, 0 (0%) saved"
