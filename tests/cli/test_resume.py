"""A run that was killed goes on where it stopped, and ends as if it had never been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from cli_helpers import MODEL, RECORDS, Cli
from cli_stand_in import plan_of, run_stand_in
from packscore import Usage, shipped_model_path
from packscore.cli import tasks
from packscore.cli.exits import ExitCode
from packscore.files.failures import RunError, UsageError
from packscore.files.file_plan import plan_files
from packscore.files.locks import locked
from packscore.files.records import Record


@pytest.mark.parametrize(
    ("num_records", "num_kills"), [(1000, 5), pytest.param(10_000, 20, marks=pytest.mark.long)]
)
def test_thousands_of_records_killed_many_times(
    num_records: int, num_kills: int, tmp_path: Path
) -> None:
    config = Qwen3Config(
        vocab_size=3072,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )
    model = tmp_path / "model"
    Qwen3ForCausalLM(config).save_pretrained(model)
    AutoTokenizer.from_pretrained(shipped_model_path()).save_pretrained(model)
    broken = range(num_records // 20, num_records, num_records // 10 - 3)
    lines = [
        "broken" if i in broken else json.dumps({"id": i, "query": f"{i}", "items": ["a"]})
        for i in range(num_records)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    script = Path(__file__).with_name("kill_and_resume.py")
    command = [sys.executable, str(script), str(tmp_path), str(model), "--kills", str(num_kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    bad = int(ExitCode.BAD_RECORDS)
    assert report["codes"] == [bad, *[-signal.SIGKILL] * num_kills, bad], done.stderr
    assert len(set(report["records_at_kill"])) == num_kills
    for name in ("{}.jsonl", "{}.jsonl.errors.jsonl"):
        unbroken = (tmp_path / name.format("unbroken")).read_bytes()
        assert (tmp_path / name.format("killed")).read_bytes() == unbroken
    ids = [json.loads(line)["id"] for line in (tmp_path / "killed.jsonl").open()]
    assert ids == [i for i in range(num_records) if i not in broken]


# bad lines first, last, and two in a row
MIXED = ["bad", RECORDS[0], RECORDS[1], "bad", "", "bad", RECORDS[2], RECORDS[0], "bad"]
FILES = ("out.jsonl", "out.jsonl.errors.jsonl")


@pytest.fixture
def unbroken(cli: Cli) -> dict[str, bytes]:
    """The files of a run that nothing stopped."""
    cli.write("in.jsonl", MIXED)
    assert run_stand_in(plan_of("out.jsonl")) == [2, 3, 7, 8]
    return {name: Path(name).read_bytes() for name in FILES}


def torn_states(unbroken: dict[str, bytes]) -> list[tuple[bytes, bytes]]:
    """Every pair of (output, errors) that a killed run can leave: each cut at any byte."""
    results, errors = (unbroken[name] for name in FILES)
    result_lines, error_lines = results.splitlines(True), errors.splitlines(True)
    order = [error_lines, result_lines, result_lines, error_lines, error_lines]
    order += [result_lines, result_lines, error_lines]
    written = {id(result_lines): b"", id(error_lines): b""}
    left = {id(result_lines): list(result_lines), id(error_lines): list(error_lines)}
    states = []
    for lines in order:
        line = left[id(lines)].pop(0)
        before = written[id(lines)]
        for size in range(len(line) + 1):
            written[id(lines)] = before + line[:size]
            states.append((written[id(result_lines)], written[id(error_lines)]))
    return states


def test_a_run_cut_at_any_byte_ends_the_same(
    cli: Cli, unbroken: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", bool)  # a thousand runs, none of which loses power
    note = json.loads(Path("out.jsonl.packscore.json").read_text())
    states = torn_states(unbroken)
    assert len(states) > sum(map(len, unbroken.values()))
    for results, errors in states:
        Path("out.jsonl").write_bytes(results)
        Path("out.jsonl.errors.jsonl").write_bytes(errors)
        Path("out.jsonl.packscore.json").write_text(json.dumps({**note, "complete": False}))
        calls = run_stand_in(plan_of("out.jsonl"))
        assert {name: Path(name).read_bytes() for name in FILES} == unbroken
        assert len(calls) == 4 - results.count(b"\n")


def test_lines_lost_to_a_power_cut_are_written_again(cli: Cli, unbroken: dict[str, bytes]) -> None:
    """Blocks that never reached the disk read as zeros, and end in no line or in a whole one."""
    note = Path("out.jsonl.packscore.json")
    for tail in (b"\0" * 40, b"\0" * 40 + b"\n", b'{"id": 7, "que\0\0\n'):
        first = unbroken["out.jsonl"].splitlines(True)[0]
        Path("out.jsonl").write_bytes(first + tail)
        note.write_text(note.read_text().replace("true", "false"))
        assert run_stand_in(plan_of("out.jsonl")) == [3, 7, 8]
        assert Path("out.jsonl").read_bytes() == unbroken["out.jsonl"]


def test_a_complete_run_is_not_run_again(cli: Cli, unbroken: dict[str, bytes]) -> None:
    assert run_stand_in(plan_of("out.jsonl")) == []
    assert {name: Path(name).read_bytes() for name in FILES} == unbroken


@pytest.mark.parametrize("output", ["out.csv", "out.parquet"])
def test_converted_outputs_go_on_from_their_part_file(cli: Cli, output: str) -> None:
    # parquet has one type for a column
    mixed = [{**x, "id": "b"} if isinstance(x, dict) else x for x in MIXED]
    cli.write("in.jsonl", mixed)
    run_stand_in(plan_of(output))
    expected = Path(output).read_bytes()
    part, note = Path(f"{output}.part.jsonl"), Path(f"{output}.packscore.json")
    assert not part.exists()
    cli.write("half.jsonl", mixed[:3])
    half = plan_files(
        "half.jsonl", "half.jsonl.out", None, None, "jsonl", resume=True, overwrite=False
    )
    run_stand_in(half)
    part.write_bytes(Path("half.jsonl.out").read_bytes()[:-1])
    note.write_text(note.read_text().replace("true", "false"))
    Path(output).unlink()
    assert run_stand_in(plan_of(output)) == [3, 7, 8]
    assert Path(output).read_bytes() == expected
    assert not part.exists()


def edit_output(cli: Cli) -> None:
    text = Path("out.jsonl").read_text().replace("delete", "remove")
    Path("out.jsonl").write_text(text)


def append_to_output(cli: Cli) -> None:
    with Path("out.jsonl").open("a") as file:
        file.write('{"query": "more"}\n')


def change_input(cli: Cli) -> None:
    cli.write("in.jsonl", [*MIXED[:-1], RECORDS[1]])


def spoil_errors(cli: Cli) -> None:
    Path("out.jsonl.errors.jsonl").write_text('{"line": 1}\n[]\n{"line": 3}\n')


def spoil_note(cli: Cli) -> None:
    Path("out.jsonl.packscore.json").write_text("{")


def remove_note(cli: Cli) -> None:
    Path("out.jsonl.packscore.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit_output, "out.jsonl does not hold the record of line 2 of INPUT"),
        (append_to_output, "holds more records than INPUT"),
        (change_input, "was made with input='sha256:"),
        (spoil_errors, "which is no error of a run"),
        (spoil_note, "out.jsonl.packscore.json cannot be read"),
        (remove_note, "nothing says what made out.jsonl"),
    ],
)
def test_an_output_that_does_not_match_is_refused(
    cli: Cli, unbroken: dict[str, bytes], change: Any, message: str
) -> None:
    note = Path("out.jsonl.packscore.json")
    note.write_text(note.read_text().replace("true", "false"))
    change(cli)
    before = {path.name: path.read_bytes() for path in cli.folder.iterdir()}
    with pytest.raises(RunError, match=message):
        run_stand_in(plan_of("out.jsonl"))
    assert {path.name: path.read_bytes() for path in cli.folder.iterdir()} == before
    assert run_stand_in(plan_of("out.jsonl", resume=False, overwrite=True))


def test_other_options_are_named(cli: Cli, unbroken: dict[str, bytes]) -> None:
    with pytest.raises(RunError, match="was made with softmax=False, and now it is True"):
        run_stand_in(plan_of("out.jsonl"), {"softmax": True})


def test_two_runs_on_one_output_are_refused(cli: Cli, unbroken: dict[str, bytes]) -> None:
    note = Path("out.jsonl.packscore.json")
    note.write_text(note.read_text().replace("true", "false"))
    with locked([Path("out.jsonl")]), pytest.raises(RunError, match="written by another process"):
        run_stand_in(plan_of("out.jsonl"))


def test_every_option_of_the_command_line_is_compared(cli: Cli) -> None:
    path = cli.write("in.jsonl", RECORDS)
    base = ("score", path, "-o", "out.jsonl", *MODEL, "--resume")
    assert cli(*base).code == 0
    for option in (
        ("--apply-softmax",),
        ("--dtype", "float32"),
        ("--prompt", "yes-no"),
        ("--labels", "yes,no"),
        ("--instruction", "x"),
        ("--max-tokens", "512"),
        ("--on-long", "error"),
        ("--max-line-bytes", "100000"),
        ("--errors", "elsewhere.jsonl"),
    ):
        done = cli(*base, *option)
        assert done.code == 1, option
        assert "--resume: out.jsonl was made with" in done.err, option
    done = cli("rank", *base[1:])
    assert done.code == 1
    assert cli(*base).code == 0


def test_another_checkpoint_in_the_same_folder_is_noticed(cli: Cli) -> None:
    import shutil

    shutil.copytree(shipped_model_path(), cli.folder / "model")
    base = ("score", cli.write("in.jsonl", RECORDS), "-o", "out.jsonl", "--resume")
    assert cli(*base, "-m", "model", "--device", "cpu").code == 0
    assert cli(*base, *MODEL).code == 0  # the same weights somewhere else
    weights = bytearray((cli.folder / "model/model.safetensors").read_bytes())
    weights[-1] ^= 1
    (cli.folder / "model/model.safetensors").write_bytes(weights)
    done = cli(*base, "-m", "model", "--device", "cpu")
    assert done.code == 1
    assert "was made with model='sha256:" in done.err


def test_ctrl_c_leaves_an_output_to_go_on_with(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cli.write("in.jsonl", RECORDS)
    assert cli("score", path, "-o", "whole.jsonl", *MODEL).code == 0
    made = tasks.TASKS["score"]

    def interrupted(*args: Any, **kwargs: Any) -> tasks.Task:
        task = made(*args, **kwargs)

        def run(record: Record) -> tuple[dict[str, Any], Usage]:
            if record.line == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return task.run(record)

        return replace(task, run=run)

    # as in a terminal: a shell's background job would ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setitem(tasks.TASKS, "score", interrupted)
            done = cli("score", path, "-o", "out.jsonl", *MODEL)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.code == 130
    assert "the same command with --resume goes on" in done.err
    assert len(cli.read("out.jsonl")) == 2
    assert cli("score", path, "-o", "out.jsonl", *MODEL, "--resume").code == 0
    assert cli.read("out.jsonl") == cli.read("whole.jsonl")


def test_a_model_that_fails_stops_the_run_and_keeps_what_is_done(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cli.write("in.jsonl", RECORDS)
    made = tasks.TASKS["score"]

    def failing(*args: Any, **kwargs: Any) -> tasks.Task:
        task = made(*args, **kwargs)

        def run(record: Record) -> tuple[dict[str, Any], Usage]:
            if record.line == 2:
                raise RuntimeError("the device is gone")
            return task.run(record)

        return replace(task, run=run)

    with monkeypatch.context() as patch:
        patch.setitem(tasks.TASKS, "score", failing)
        done = cli("score", path, "-o", "out.jsonl", *MODEL)
    assert done.code == 1
    assert "line 2 of INPUT: RuntimeError: the device is gone" in done.err
    assert len(cli.read("out.jsonl")) == 1


CHANGES = {
    ("--id-field", "other"): "id_field=None",
    ("--delimiter", "comma"): "delimiter=None",
    ("--group",): "group=None",
    ("--no-group",): "group=None",
}


@pytest.mark.parametrize("options", CHANGES)
def test_options_of_reading_are_compared(cli: Cli, options: tuple[str, ...]) -> None:
    Path("in.csv").write_text("query,item,other\na,b,1\n")
    base = ("rank", "in.csv", "-o", "out.jsonl", *MODEL, "--resume")
    assert cli(*base).code == 0
    done = cli(*base, *options)
    assert done.code == 1
    assert f"was made with {CHANGES[options]}" in done.err


def test_a_plan_without_choice_refuses_what_is_there(cli: Cli) -> None:
    cli.write("in.jsonl", RECORDS)
    Path("out.csv.part.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"out\.csv\.part\.jsonl exists; pass --resume"):
        plan_of("out.csv", resume=False)
