"""Runs that are killed at any moment end, when they are resumed, as if they had not been."""

from __future__ import annotations

import functools
import gzip
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli_helpers import RECORDS, Cli, fork
from cli_stand_in import OUTPUTS, plan_of, rows_of, run_stand_in
from packscore.files.failures import RunError
from packscore.files.file_plan import FilePlan
from packscore.files.look import ReadOptions

ROWS = [{"query": f"q{i // 3}", "document": f"d{i}", "k": i % 5} for i in range(40)]
LISTS = [*RECORDS, "nope", *({"query": f"{i}", "items": ["a"] * (i % 4)} for i in range(30))]


# the children touch files, and nothing that has threads
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")


def exit_code(pid: int, seconds: float = 60) -> int:
    """Of a child, which is killed if it hangs."""
    end = time.monotonic() + seconds
    while not (found := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError("a forked child hangs")
        time.sleep(0.0005)
    return os.waitstatus_to_exitcode(found[1])


def die_at(moment: int, action: Callable[[], object]) -> int:
    """Run something in a forked child that kills itself at its n-th touch of a file.

    Returns:
      The number of touches, where there were fewer; 0 where it was killed.
    """
    pid = fork()
    if pid:
        code = exit_code(pid)
        assert code in (0, -signal.SIGKILL)
        return moment if code == 0 else 0
    seen = 0

    def touched(event: str, _: object) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.truncate", "fcntl.flock"):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        os.fsync = bool  # type: ignore[assignment]  # what is killed loses no power
        sys.addaudithook(touched)
        action()
    finally:
        os._exit(0 if seen < moment else 9)


def go_on_or_refuse(
    plan: FilePlan, settings: dict[str, Any], read: ReadOptions, expected: bytes
) -> None:
    """What an overwriting run left is either finished or refused: never taken for another's."""
    try:
        run_stand_in(plan, settings, read)
    except RunError as refused:
        if "--overwrite" not in str(refused):
            raise
    else:
        assert Path(plan.output).read_bytes() == expected
        assert plan.errors is not None
        errors = Path(f"expected.{plan.errors}")
        assert plan.errors.exists() == errors.exists()
        assert not errors.exists() or plan.errors.read_bytes() == errors.read_bytes()


def moments() -> list[Any]:
    every = [(output, given) for output in OUTPUTS for given in ("lists", "rows", "packed")]
    quick = {("out.jsonl", "lists"), ("out.csv", "rows"), ("out.parquet", "packed")}
    return [
        pytest.param(*one, marks=() if one in quick else pytest.mark.long, id="-".join(one))
        for one in every
    ]


@pytest.mark.parametrize(("output", "given"), moments())
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_killed_at_any_touch_of_a_file_ends_the_same(
    cli: Cli, output: str, given: str, overwrite: bool
) -> None:
    records = LISTS if given == "lists" else ROWS
    name = cli.write("in.jsonl", records)
    if given == "packed":
        name = "in.jsonl.gz"
        Path(name).write_bytes(gzip.compress(Path("in.jsonl").read_bytes()))
    read = ReadOptions(group=None if given == "lists" else True)
    run_stand_in(plan_of(f"expected.{output}", name), read=read)
    expected = Path(f"expected.{output}").read_bytes()
    killed, moment = 0, 1
    while True:
        if overwrite:
            plan, settings = plan_of(output, name, resume=False, overwrite=True), {"k": moment}
        else:
            plan, settings = plan_of(output, name), {}
        if die_at(moment, functools.partial(run_stand_in, plan, settings, read)):
            break
        killed += 1
        moment += 1
        if overwrite:
            go_on_or_refuse(plan_of(output, name), settings, read, expected)
    assert killed >= 8
    assert Path(output).read_bytes() == expected
    assert not list(Path().glob(f"{output}*.tmp"))
    assert not list(Path().glob(f"{output}*.lock"))


@pytest.mark.parametrize(
    "output", ["out.csv", pytest.param("out.jsonl.gz", marks=pytest.mark.long)]
)
def test_a_run_killed_at_twenty_moments_ends_the_same(cli: Cli, output: str) -> None:
    """Moments of time, each run a forked child that is killed from outside."""
    records = [
        {"query": f"{i}", "items": ["a"] * (1 + i % 3)} if i % 9 else "no" for i in range(3000)
    ]
    cli.write("in.jsonl", records)
    run_stand_in(plan_of(f"expected.{output}"))
    generator = random.Random(7)
    sizes = sorted(generator.sample(range(100_000), 20))
    part = Path(f"{output}.part.jsonl")
    for size in sizes:
        pid = fork()
        if not pid:
            try:
                run_stand_in(plan_of(output))
            finally:
                os._exit(0)
        while not (part.exists() and part.stat().st_size >= size):
            assert not os.waitpid(pid, os.WNOHANG)[0]
            time.sleep(0.0002)
        os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) == -signal.SIGKILL
    run_stand_in(plan_of(output))
    for name in (output, f"{output}.errors.jsonl"):
        assert Path(name).read_bytes() == Path(f"expected.{name}").read_bytes()


def test_good_records_are_complete_beside_bad_ones(cli: Cli) -> None:
    cli.write("in.jsonl", LISTS)
    for output in OUTPUTS:
        run_stand_in(plan_of(output))
        good = [one for one in LISTS if isinstance(one, dict) and one["items"]]
        count = sum(len(one["items"]) for one in good) if "sv" in output else len(good)
        assert len(rows_of(output)) == count
        assert len(cli.read(f"{output}.errors.jsonl")) == len(LISTS) - len(good)
