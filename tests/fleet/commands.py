"""The command: with workers that are killed, a driver that is, a model that cannot be loaded."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from fleet.inputs import MODEL, faults, lines, pairs, rankings

NUM_QUERIES, ITEMS, NUM_KILLS = 2000, 50, 10
SECONDS = 3600


def command(
    *arguments: str, name: str = "rank", model: str = MODEL, cwd: Path, **environment: str
) -> subprocess.Popen[str]:
    """`packscore NAME ...`, begun."""
    scoring = [name, *arguments, "--model", model, "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "packscore", *scoring],
        cwd=cwd,
        # as many threads as a worker has
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )


def run(*arguments: str, code: int = 0, **options: Any) -> str:
    """The same to its end; what it said."""
    process = command(*arguments, **options)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == code, (process.returncode, said[-3000:])
    return said


def workers_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that have a model, or load it."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(driver.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "MapWorker(MapBatches(PartWorker))" in " ".join(process.cmdline()):
                    found.append(process)
    return found


def check_kills(folder: Path) -> str:
    """Ten workers killed at random moments; each pair is scored once, as one process does it."""
    pairs(folder / "in.parquet", NUM_QUERIES, ITEMS)
    driver = command(
        *("in.parquet", "-o", "out", "--ray", "--workers", "2", "--part-rows", "1000"), cwd=folder
    )
    killed: list[int] = []
    try:
        # in the work and not on the clock: a busy machine would see them all before the first part
        for parts in sorted(random.sample(range(90), NUM_KILLS)):
            if wait_for(driver, folder, parts):
                time.sleep(random.uniform(0, 3))
            if wait_for(driver, folder, parts) and (found := workers_of(driver)):
                random.choice(found).kill()
                killed.append(len(list((folder / "out").glob("part-*"))))
        _, said = driver.communicate(timeout=SECONDS)
    finally:
        driver.kill()
    assert driver.returncode == 0, said[-3000:]
    assert len(killed) == NUM_KILLS, f"{len(killed)} kills before the run was over"
    run("in.parquet", "-o", "one.jsonl", cwd=folder)
    expected = rankings(folder / "one.jsonl")
    assert (len(expected), sum(len(x["ranking"]) for x in expected)) == (NUM_QUERIES, 100_000)
    told = faults(rankings(folder / "out"), expected)
    assert not told, told[:5]
    assert not list((folder / "out").glob(".*")), "undone files stay"
    return f"100,000 pairs, {NUM_KILLS} kills with {killed} of 100 parts done: equal"


def wait_for(driver: subprocess.Popen[str], folder: Path, parts: int) -> bool:
    """Whether so many parts, and a worker, are there; False where the run is over."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and driver.poll() is None:
        if len(list((folder / "out").glob("part-*"))) >= parts and workers_of(driver):
            return True
        time.sleep(0.1)
    return False


def kill_driver(folder: Path, parts: int, **environment: str) -> None:
    """Begin a run, and kill its workers and its driver when so many parts are there."""
    driver = command(*ARGUMENTS, cwd=folder, **environment)
    assert wait_for(driver, folder, parts), (driver.communicate()[1] or "")[-3000:]
    others = psutil.Process(driver.pid).children(recursive=True)
    for worker in workers_of(driver):  # first: they would write to the end of a part
        worker.kill()
    driver.kill()
    driver.communicate()
    psutil.wait_procs(others, timeout=60)


ARGUMENTS = (
    *("in.parquet", "-o", "out", "--ray", "--workers", "2", "--part-rows", "100"),
    *("--output-format", "jsonl"),
)


def check_driver(folder: Path) -> str:
    """The driver killed, and the run resumed: the bytes of an unbroken run on one machine."""
    pairs(folder / "in.parquet", 200, 20)
    run("in.parquet", "-o", "one.jsonl", cwd=folder)
    kill_driver(folder, 5)
    done = {p.name: p.stat().st_mtime_ns for p in (folder / "out").glob("part-*")}
    assert "exists" not in run(*ARGUMENTS, "--resume", cwd=folder)
    kept = [n for n, at in done.items() if (folder / "out" / n).stat().st_mtime_ns == at]
    assert len(kept) == len(done), f"{len(done) - len(kept)} parts were made again"
    assert lines(folder / "out") == lines(folder / "one.jsonl")
    assert "complete" in run(*ARGUMENTS, "--resume", cwd=folder)
    said = run(*ARGUMENTS, "--resume", "--max-tokens", "90", code=1, cwd=folder)
    assert "max_tokens" in said, said
    said = run(*ARGUMENTS, code=2, cwd=folder)
    assert "--resume" in said, said
    pairs(folder / "in.parquet", 201, 20)
    said = run(*ARGUMENTS, "--resume", code=1, cwd=folder)
    assert "input" in said, said
    return f"killed with {len(done)} parts done, resumed: the same bytes"


def check_no_model(folder: Path) -> str:
    """Workers that cannot load end the run with their error, told once."""
    pairs(folder / "in.parquet", 4, 4)
    # weights that are cut short: the driver, which reads none, sees nothing of it
    copy = folder / "model"
    copy.mkdir()
    for file in Path(MODEL).iterdir():
        content = file.read_bytes()
        (copy / file.name).write_bytes(content[:1000] if file.suffix == ".safetensors" else content)
    said = run(*ARGUMENTS, model=str(copy), code=1, cwd=folder)
    assert said.count("cannot be loaded") == 1, said
    assert "Traceback" not in said, said
    return next(line for line in said.splitlines() if "cannot be loaded" in line)[:100]


def check_decide(folder: Path) -> str:
    """States by `decide`, bad ones among them: what the local command writes, row by row."""
    states = [f"State {i} wants to open a file." for i in range(60)]
    states[7] = states[41] = 200 * "too long "
    asked = {"file": {"type": "noul", "instructions": "Is it about files?"}}
    questions = [json.dumps(asked)] * len(states)
    pq.write_table(pa.table({"id": range(60), "state": states}), folder / "in.parquet")
    (folder / "asked.json").write_text(questions[0])
    given = ("in.parquet", "--questions", "asked.json", "--max-tokens", "200")
    run(*given, "-o", "one.parquet", name="decide", code=3, cwd=folder)
    run(
        *(*given, "-o", "out", "--ray", "--workers", "2", "--part-rows", "9"),
        name="decide",
        code=3,
        cwd=folder,
    )
    found, expected = rankings(folder / "out"), pq.read_table(folder / "one.parquet").to_pylist()
    assert found == expected
    errors = b"".join(p.read_bytes() for p in sorted((folder / "out").glob("errors-*.jsonl")))
    assert errors == (folder / "one.parquet.errors.jsonl").read_bytes()
    return f"{len(found)} decisions, {errors.count(b'reason')} errors: the same"
