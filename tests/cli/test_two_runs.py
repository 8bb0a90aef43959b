"""Two runs on one file, and outputs that somebody changed: nothing is lost."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cli_helpers import MODEL, RECORDS, Cli
from cli_stand_in import OUTPUTS, plan_of, run_stand_in
from packscore.files.failures import RunError, UsageError
from packscore.files.file_plan import FilePlan, plan_files
from packscore.files.locks import locked
from packscore.files.records import Record


def fresh(output: str, **options: Any) -> FilePlan:
    return plan_of(output, resume=False, overwrite=True, **options)


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
@pytest.mark.parametrize("output", ["out.jsonl", "out.csv"])
def test_the_second_of_two_runs_is_refused_and_the_first_is_whole(
    cli: Cli, output: str, option: str
) -> None:
    cli.write("in.jsonl", RECORDS * 67)
    run_stand_in(plan_of(f"expected.{output}"))
    half, go_on = threading.Event(), threading.Event()

    def pause(record: Record) -> None:
        if record.line == 100:
            half.set()
            assert go_on.wait(60)

    first = threading.Thread(target=lambda: run_stand_in(fresh(output), before=pause))
    first.start()
    assert half.wait(60)
    done = cli("score", "in.jsonl", "-o", output, *MODEL, option)
    assert done.code == 1
    assert f"{output} is being written by another process" in done.err
    with pytest.raises(UsageError, match="exists; pass --resume"):
        plan_of(output, resume=False)
    go_on.set()
    first.join()
    assert Path(output).read_bytes() == Path(f"expected.{output}").read_bytes()
    assert list(Path().glob("*.lock")) == []


def test_a_lock_is_of_the_file_and_not_of_its_name(cli: Cli) -> None:
    cli.write("in.jsonl", RECORDS)
    Path("real").mkdir()
    Path("real/out.jsonl").write_text("")
    Path("link.jsonl").symlink_to("real/out.jsonl")
    for path in ("link.jsonl", "real/../real/out.jsonl"):
        with locked([Path(path)]), pytest.raises(RunError, match="by another process"):
            run_stand_in(fresh("link.jsonl"))
    plan = plan_files("in.jsonl", "b.jsonl", Path("e"), None, None, resume=False, overwrite=True)
    with locked([Path("e")]), pytest.raises(RunError, match="/e is being written by another"):
        run_stand_in(plan)
    run_stand_in(fresh("link.jsonl"))
    assert Path("link.jsonl").is_symlink()
    assert len(cli.read("real/out.jsonl")) == len(RECORDS)


def test_a_lock_that_a_killed_run_left_holds_nobody(cli: Cli) -> None:
    cli.write("in.jsonl", RECORDS)
    Path("out.jsonl.packscore.lock").write_text("")
    run_stand_in(plan_of("out.jsonl"))
    assert not Path("out.jsonl.packscore.lock").exists()


def test_many_who_want_one_lock_have_it_one_after_another(cli: Cli) -> None:
    inside, most, taken = [0], [0], [0]

    def take() -> None:
        while True:
            try:
                with locked([Path("x")]):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    taken[0] += 1
                    time.sleep(0.0005)
                    inside[0] -= 1
                    return
            except RunError:
                time.sleep(0)

    threads = [threading.Thread(target=take) for _ in range(23)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, taken) == ([1], [23])


def test_what_came_meanwhile_is_not_written_over(cli: Cli) -> None:
    """Both saw no output; the second got the lock when the first was done."""
    cli.write("in.jsonl", RECORDS)
    for output in ("out.jsonl", "out.csv"):
        plan = plan_of(output, resume=False)
        run_stand_in(plan)
        before = Path(output).read_bytes()
        done = cli("score", "in.jsonl", "-o", output, *MODEL)
        assert done.code == 2
        assert Path(output).read_bytes() == before


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("change", ["cut", "removed"])
def test_an_output_that_lost_its_end_is_not_called_complete(
    cli: Cli, output: str, change: str
) -> None:
    cli.write("in.jsonl", RECORDS[1:])
    run_stand_in(plan_of(output))
    whole = Path(output).read_bytes()
    if change == "cut":
        Path(output).write_bytes(whole[: len(whole) // 2])
    else:
        Path(output).unlink()
    assert run_stand_in(plan_of(output))
    assert Path(output).read_bytes() == whole
    assert run_stand_in(plan_of(output)) == []
