"""States in, decisions out: the bodies of the Python API, in files that can be gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli_helpers import MODEL, Cli, Done
from packscore import MultiItemScorer, shipped_model_path

QUESTIONS: dict[str, Any] = {
    "angry": {"type": "noul", "instructions": "Is the customer angry?"},
    "topic": {"type": "choice", "instructions": "What about?", "criteria": {"a": "x", "b": None}},
    "urgent": {"type": "score", "instructions": "How urgent?", "criteria": ["low", "high"]},
}
OPENAI = [{"type": "predicate", "instructions": "It is late."}]
RECORDS: list[dict[str, Any]] = [
    {"id": "a", "state": {"subject": "é 🐼", "n": [1, None]}, "questions": QUESTIONS, "gold": 1},
    {"state": "The parcel never came.", "questions": OPENAI},
    {"id": 7, "state": ["x"], "questions": {"angry": QUESTIONS["angry"]}},
]
# bad ones, with what is said of each
BAD = {
    '{"id": 1, "questions": {}}': "field 'state' is missing",
    '{"id": 2, "state": "x"}': "field 'questions' is missing; name it with --questions-field",
    '{"id": 3, "state": "x", "questions": 5}': "questions is a number; it must be an object",
    '{"id": 4, "state": "x", "questions": {}}': "questions={} is empty",
    '{"id": 5, "state": "x", "questions": {"a": {"type": "box"}}}': "questions['a'].type='box'",
    '{"id": 6, "state": "x", "questions": {}, "answers": 1}': "which the output needs; rename them",
    "[]": "is a list; it must be an object",
    "{": "is not JSON",
}
REFUSED: dict[tuple[str, ...], str] = {
    (): "decide needs INPUT and --output, or one --state with --questions",
    ("in.jsonl",): "decide needs INPUT and --output",
    ("in.jsonl", "-o", "out.csv"): "decisions are written as jsonl or parquet, not as csv",
    ("in.jsonl", "-o", "out.jsonl", "--format", "csv"): "--format='csv' must be one of systemone",
    ("in.jsonl", "-o", "out.jsonl", "--json"): "--json prints the body of one --state",
    ("in.jsonl", "-o", "out.jsonl", "--questions", "no.json"): "cannot be read as JSON",
    ("in.jsonl", "-o", "out.jsonl", "--questions", "bad.json"): "questions['a'].type='box'",
    ("in.jsonl", "-o", "out.jsonl", "--questions", "q.json"): "has a field 'questions' of its own",
    ("in.jsonl", "-o", "out.jsonl", "--state-field", "questions"): "must be different fields",
    ("in.jsonl", "-o", "out.jsonl", "--state-field", "gone"): "field 'gone' is missing",
    ("--state", "x"): "--state needs --questions",
    ("in.jsonl", "--state", "x", "--questions", "q.json"): "INPUT is for a file of them",
    ("--state", "x", "--questions", "q.json", "--resume"): "--resume is for a file of them",
}


@pytest.fixture(scope="module")
def scorer() -> MultiItemScorer:
    return MultiItemScorer.from_pretrained(shipped_model_path(), device="cpu", prefix_cache_bytes=0)


def run(cli: Cli, *args: str, **stdin: Any) -> Done:
    return cli("decide", *args, *MODEL, **stdin)


def expected(scorer: MultiItemScorer, record: dict[str, Any], shape: str) -> dict[str, Any]:
    found = scorer.decide(record["state"], record["questions"], flow="packed", permutations=2)
    body = found.to_systemone() if shape == "systemone" else found.to_decisions()
    carried = {name: record[name] for name in record if name not in ("state", "questions")}
    return {**carried, **body}


@pytest.mark.parametrize("shape", ["systemone", "decisions"])
def test_decide_writes_what_the_api_gives(cli: Cli, scorer: MultiItemScorer, shape: str) -> None:
    path = cli.write("in.jsonl", RECORDS)
    done = run(cli, path, "-o", "out.jsonl", "--format", shape, "--permutations", "2")
    assert done.code == 0, done.err
    bodies = [expected(scorer, record, shape) for record in RECORDS]
    assert cli.read("out.jsonl") == json.loads(json.dumps(bodies))
    assert "state in 'state'; questions in 'questions' (looked at 3)" in done.err
    assert "3 records, 5 questions in" in done.err


def test_the_same_questions_of_every_line_and_row(cli: Cli, scorer: MultiItemScorer) -> None:
    (cli.folder / "q.json").write_text(json.dumps(QUESTIONS))
    states = ["The parcel, again.", "Thanks"]
    cli.write("in.jsonl", [{"id": i, "m": {"state": s}} for i, s in enumerate(states)])
    (cli.folder / "in.csv").write_text("id;text\n0;The parcel, again.\n1;Thanks\n")
    lines = run(
        cli, "in.jsonl", "-o", "a.jsonl", "--questions", "q.json", "--state-field", "m.state"
    )
    rows = run(cli, "in.csv", "-o", "b.jsonl", "--questions", "q.json", "--state-field", "text")
    assert (lines.code, rows.code) == (0, 0), lines.err + rows.err
    found = cli.read("a.jsonl")
    assert [{**one, "id": int(one["id"])} for one in cli.read("b.jsonl")] == found
    for i, state in enumerate(states):
        body = scorer.decide(state, QUESTIONS, flow="packed").to_systemone()
        assert found[i] == {"id": i, **body}


def test_a_torn_run_goes_on_to_the_bytes_of_a_whole_one(cli: Cli) -> None:
    path = cli.write("in.jsonl", [RECORDS[1], "broken", *RECORDS])  # the first carries nothing
    assert run(cli, path, "-o", "whole.jsonl").code == 3
    whole = Path("whole.jsonl").read_bytes()
    for kept in (0, 1, len(whole) // 2, len(whole) - 1):
        (cli.folder / "torn.jsonl").write_bytes(whole[:kept])
        note = json.loads(Path("whole.jsonl.packscore.json").read_text()) | {"complete": False}
        note["settings"]["errors"] = "torn.jsonl.errors.jsonl"
        (cli.folder / "torn.jsonl.packscore.json").write_text(json.dumps(note))
        assert run(cli, path, "-o", "torn.jsonl", "--resume").code == 3
        assert Path("torn.jsonl").read_bytes() == whole
        (reported,) = cli.read("torn.jsonl.errors.jsonl")
        assert reported["line"] == 2
    assert "exists; pass --resume" in run(cli, path, "-o", "whole.jsonl").err
    assert "is complete; nothing to do" in run(cli, path, "-o", "whole.jsonl", "--resume").err
    changes = {("--permutations", "2"): "permutations=1", ("--format", "decisions"): "body="}
    for change, told in changes.items():
        done = run(cli, path, "-o", "whole.jsonl", "--resume", *change)
        assert done.code == 1
        assert f"was made with {told}" in done.err


def test_bad_records_are_told_line_by_line(cli: Cli) -> None:
    path = cli.write("in.jsonl", [RECORDS[0], *BAD, RECORDS[2]])
    done = run(cli, path, "-o", "out.jsonl")
    assert done.code == 3, done.err
    assert [one["id"] for one in cli.read("out.jsonl")] == ["a", 7]
    reported = {one["line"]: one["reason"] for one in cli.read("out.jsonl.errors.jsonl")}
    for line, reason in enumerate(BAD.values(), 2):
        assert reason in reported[line]
    long = {"state": "word " * 300, "questions": QUESTIONS}
    done = run(cli, cli.write("long.jsonl", [long]), "-o", "l.jsonl", "--max-tokens", "200")
    assert done.code == 3
    assert "over max_tokens=200" in cli.read("l.jsonl.errors.jsonl")[0]["reason"]


def test_stdin_to_stdout(cli: Cli) -> None:
    path = cli.write("in.jsonl", RECORDS)
    assert run(cli, path, "-o", "out.jsonl").code == 0
    done = run(cli, "-", "-o", "-", "--quiet", stdin=Path(path).read_bytes())
    assert done.code == 0, done.err
    assert done.out.encode() == Path("out.jsonl").read_bytes()


def test_a_dry_run_counts_what_decide_computes(cli: Cli, scorer: MultiItemScorer) -> None:
    path = cli.write("in.jsonl", [*RECORDS, {"state": "x", "questions": {}}])
    done = run(cli, path, "-o", "out.jsonl", "--dry-run", "--permutations", "2")
    assert done.code == 3
    told = {line[:20].strip(): line[20:].strip() for line in done.out.splitlines()}
    usages = [
        scorer.decide(r["state"], r["questions"], permutations=2, flow="packed").usage
        for r in RECORDS
    ]
    assert told["tokens packed"] == str(sum(one.computed_tokens for one in usages))
    assert told["tokens one by one"] == str(sum(one.prompt_tokens for one in usages))
    assert (told["records"], told["bad records"], told["questions"]) == ("3", "1", "5")
    assert not Path("out.jsonl").exists()


def test_one_state_prints_bars_or_the_body(cli: Cli, scorer: MultiItemScorer) -> None:
    odd = {**QUESTIONS, "tricky [red]\x1b[2J": {"type": "choice", "criteria": {"[b]x\x07": None}}}
    (cli.folder / "q.json").write_text(json.dumps(odd))
    one = ("--questions", "q.json")
    done = run(cli, "--state", "Where is it?", *one)
    assert done.code == 0, done.err
    body = scorer.decide("Where is it?", odd).to_systemone()
    lines = done.out.splitlines()
    noul = body["answers"]["angry"]["noul"]
    for name, p in (("yes", noul), ("no", 1 - noul)):
        (line,) = (x for x in lines if x.split()[:2] == [name, f"{p:.3f}"])
        assert abs(line.count("█") - 24 * p) <= 1
    assert "\x1b" not in done.out
    assert "\x07" not in done.out
    assert '"[b]x\\u0007"' in done.out
    done = run(cli, "--state", "-", *one, "--json", stdin=b"Where is it?")
    assert json.loads(done.out) == body
    done = run(cli, "--state", "x", *one, "--json", "--format", "decisions")
    assert [x["type"] for x in json.loads(done.out)["answers"]][:2] == ["predicate", "choice"]


@pytest.mark.parametrize("args", REFUSED, ids=" ".join)
def test_what_does_not_fit_is_told_before_the_model_is_loaded(
    cli: Cli, args: tuple[str, ...]
) -> None:
    cli.write("in.jsonl", RECORDS)
    (cli.folder / "q.json").write_text(json.dumps(QUESTIONS))
    (cli.folder / "bad.json").write_text('{"a": {"type": "box"}}')
    done = cli("decide", *args, "--model", "nowhere")
    assert done.code == 2, done.err
    assert REFUSED[args] in done.err
    assert sorted(path.name for path in cli.folder.iterdir()) == ["bad.json", "in.jsonl", "q.json"]
