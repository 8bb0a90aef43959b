"""Records on several copies of a model: as many run at once, and are written in their order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli_helpers import RECORDS, Cli
from packscore import EncodedRequest, InputError, Usage, shipped_model_path
from packscore.cli.run import Counts, run_entries
from packscore.cli.tasks import Task
from packscore.files.failures import RunError
from packscore.files.journal import FileJournal
from packscore.files.records import BadRecord, Entry, Record

COPIES = 3
NOTHING = Usage(0, 0, 0, 0, 0, (), (), "packed", "segment")


def record(line: int) -> Record:
    return Record(line, f"query {line}", ["an item"], {"id": line}, None, "query")


def no_tokens(_: Any) -> EncodedRequest:
    raise AssertionError("nothing here asks for tokens")


def written(
    folder: Path, run: Callable[[Record], Any], entries: Iterator[Entry]
) -> tuple[list[str], list[str], Counts]:
    """Lines of results, lines of errors, counts."""
    results, errors, counts = folder / "out.jsonl", folder / "errors.jsonl", Counts()
    journal = FileJournal(results, errors)
    try:
        task = Task(run, no_tokens, at_once=COPIES)
        for _ in run_entries(entries, journal, task, frozenset(), counts):
            pass
    finally:
        journal.close()
    return results.read_text().splitlines(), errors.read_text().splitlines(), counts


def test_as_many_run_at_once_and_all_are_written_in_order(tmp_path: Path) -> None:
    together = threading.Barrier(COPIES)
    read: list[int] = []
    begun: list[int] = []

    def run(one: Record) -> Any:
        begun.append(one.line)
        ahead = read[-1] - one.line
        if one.line <= 6:
            together.wait(timeout=60)  # fails where fewer run at once
        if one.line == 5:
            raise InputError("refused")
        return {"ahead": ahead}, NOTHING

    def entries() -> Iterator[Entry]:
        for line in range(1, 41):
            read.append(line)
            yield BadRecord(line, "is bad", {}) if line % 7 == 0 else record(line)

    results, errors, counts = written(tmp_path, run, entries())
    assert [int(line.split('"id": ')[1].split(",")[0]) for line in results] == [
        line for line in range(1, 41) if line % 7 and line != 5
    ]
    assert [line.split(",")[0] for line in errors] == [
        f'{{"line": {line}' for line in (5, 7, 14, 21, 28, 35)
    ]
    assert counts.records == 34
    # of what is read ahead there are never more than two for each copy
    assert max(int(line.rsplit(":", 1)[1].strip(" }")) for line in results) <= 2 * COPIES


def test_what_ends_a_run_ends_it_with_what_was_before(tmp_path: Path) -> None:
    ran: list[int] = []

    def run(one: Record) -> Any:
        ran.append(one.line)
        if one.line == 4:
            raise ValueError("a fault")
        return {}, NOTHING

    with pytest.raises(RunError, match="line 4 of INPUT"):
        written(tmp_path, run, map(record, range(1, 100)))
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [line.split(":")[1].strip(" }") for line in lines] == ["1", "2", "3"]
    assert max(ran) <= 4 + 2 * COPIES + 1


@pytest.mark.jax
@pytest.mark.usefixtures("quick_programs")
def test_a_mesh_gives_one_chips_scores(cli: Cli) -> None:

    records = [{"id": i, **RECORDS[0], "query": f"delete directory {i}"} for i in range(5)]
    path = cli.write("in.jsonl", [*records[:3], "{bad", *records[3:]])
    model = ("--model", str(shipped_model_path()), "--device", "jax", "--dtype", "float32", "-q")
    one = cli("score", path, "-o", "one.jsonl", *model)
    two = cli("score", path, "-o", "two.jsonl", *model, "--mesh", "data=2,model=2")
    assert (one.code, two.code) == (3, 3)
    for first, second in zip(cli.read("one.jsonl"), cli.read("two.jsonl"), strict=True):
        assert first["query"] == second["query"]
        for row, other in zip(first["scores"], second["scores"], strict=True):
            assert row == pytest.approx(other, abs=1e-5)
    again = cli("score", path, "-o", "two.jsonl", *model, "--resume")
    assert again.code == 1
    assert "mesh" in again.err


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("data=2,tensor=2", "'tensor=2' must be data=N or model=N"),
        ("data=2,data=2", "each once"),
        ("data=", "data=N"),
        ("data=-1", "data=N"),
        ("8", "--mesh=auto"),
        ("", "--mesh=auto"),
    ],
)
def test_a_mesh_that_cannot_be_read_is_refused(cli: Cli, mesh: str, said: str) -> None:
    path = cli.write("in.jsonl", RECORDS)
    model = ("--model", str(shipped_model_path()), "--device", "jax")
    done = cli("score", path, "-o", "out.jsonl", *model, "--mesh", mesh)
    assert done.code == 2
    assert said in done.err
    assert not (cli.folder / "out.jsonl").exists()


def test_a_mesh_is_of_programs(cli: Cli) -> None:
    path = cli.write("in.jsonl", RECORDS)
    model = ("--model", str(shipped_model_path()), "--device", "cpu")
    done = cli("score", path, "-o", "out.jsonl", *model, "--mesh", "auto")
    assert done.code == 2
    assert "--device='cpu' is one of torch's" in done.err
