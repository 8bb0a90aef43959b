"""A worker of `--ray` without Ray: its parts are what the local command writes of the whole."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from cli_helpers import Cli
from packscore import shipped_model_path
from packscore.cli.fleet import command, work
from packscore.cli.fleet.options import RayOptions
from packscore.cli.options import ModelOptions, read_options
from packscore.files.folder import FolderPlan, begin_folder
from packscore.files.parts import cut
from packscore.loading import Place

MODEL = str(shipped_model_path())
QUERIES = ["delete a tree"] * 3 + ["open a file"] * 2 + [None] + ["shuffle"] * 2 + ["sort"] * 2
ITEMS = [
    "Delete it.",
    "Open a file.",
    "x",
    "Open a file.",
    None,
    "x",
    "Shuffle a list.",
    "No.",
    "a",
    "b",
]
CHOSEN = ModelOptions(MODEL, None, "cpu", "auto", "qwen3-reranker", None, None, None, None,
                      "truncate")  # fmt: skip
READ = read_options("query", None, None, 1 << 20, None, None, once=True)
TASK: dict[str, Any] = {"command": "rank", "top_k": None, "return_documents": False}


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    carried = {"n": [None] * 8 + [1.5, 2.5]}
    parquet.write_table(pa.table({"query": QUERIES, "document": ITEMS, **carried}), "in.parquet")
    Path("out").mkdir()
    return Cli(tmp_path)


def job_of(output_format: str = "jsonl", chosen: ModelOptions = CHOSEN) -> work.Job:
    paths = (str(Path("in.parquet").absolute()), str(Path("out").absolute()))
    folder = FolderPlan(*paths, output_format, 2, False, True)
    settings = begin_folder(folder, command._settings(chosen, READ, TASK))
    return work.Job(folder, READ, chosen, TASK, settings)


def told(worker: work.PartWorker, parts: Iterator[range]) -> list[dict[str, Any]]:
    rows = [{"part": i, "start": r.start, "stop": r.stop} for i, r in enumerate(parts)]
    return [json.loads(one["told"]) for one in worker(pa.Table.from_pylist(rows)).to_pylist()]


def test_parts_are_the_local_commands_lines(cli: Cli) -> None:
    done = cli("rank", "in.parquet", "-o", "one.jsonl", "-m", MODEL, "--device", "cpu")
    assert done.code == 3, done.err
    job = job_of()
    worker = work.PartWorker(job)
    counts = told(worker, cut(job.folder.input, READ, 2))
    assert [(one["items"], one["bad"]) for one in counts] == [(3, 0), (3, 2), (2, 0)]
    parts, errors = sorted(Path("out").glob("part-*")), sorted(Path("out").glob("errors-*"))
    assert [p.name for p in parts] == [f"part-00000{i}.jsonl" for i in range(3)]
    assert b"".join(p.read_bytes() for p in parts) == Path("one.jsonl").read_bytes()
    assert [p.name for p in errors] == ["errors-000001.jsonl"]
    assert errors[0].read_bytes() == Path("one.jsonl.errors.jsonl").read_bytes()

    # in any order, and again: the same files
    before = {p.name: p.read_bytes() for p in Path("out").iterdir()}
    told(worker, cut(job.folder.input, READ, 2))
    assert {p.name: p.read_bytes() for p in Path("out").iterdir()} == before


@pytest.mark.usefixtures("cli")
def test_parquet_parts_are_one_dataset_and_others_runs_are_refused() -> None:
    """A column that is null in one part has the type of the others."""
    chosen = dataclasses.replace(CHOSEN, dtype="float32")
    job = job_of("parquet", chosen)
    worker = work.PartWorker(job)
    told(worker, cut(job.folder.input, READ, 2))
    found = parquet.ParquetDataset(sorted(Path("out").glob("part-*"))).read()
    assert found.column("n").to_pylist() == [[None] * 3, [None], [None] * 2, [1.5, 2.5]]
    assert [len(one) for one in found.column("ranking").to_pylist()] == [3, 1, 2, 2]
    assert found.schema.field("n").type == pa.list_(pa.float64())

    class Broken:
        counted, at_once = "items", 1

        def run(self, record: Any) -> Any:
            raise ValueError("a fault of ours")

    worker._task = Broken()  # type: ignore[assignment]  # a stand-in that only runs
    (failed,) = told(worker, iter([range(3)]))
    assert failed["failure"].startswith(
        "rows 1 to 3 of INPUT: line 1 of INPUT: ValueError: a fault"
    )

    others = dataclasses.replace(job, settings={**job.settings, "model": "sha256:0"})
    (failed,) = told(work.PartWorker(others), iter([range(3)]))
    assert "was made with model=" in failed["failure"]
    job.folder.note.unlink()
    (failed,) = told(work.PartWorker(job), iter([range(3)]))
    assert "is not the same folder on every machine" in failed["failure"]


@pytest.mark.usefixtures("cli")
def test_a_model_that_cannot_be_loaded_is_told_and_not_raised() -> None:
    copy = Path("model")
    copy.mkdir()
    for file in Path(MODEL).iterdir():
        content = file.read_bytes()
        (copy / file.name).write_bytes(content[:99] if file.suffix == ".safetensors" else content)
    job = job_of(chosen=dataclasses.replace(CHOSEN, model=str(copy.absolute())))
    (failed,) = told(work.PartWorker(job), iter([range(3)]))
    assert "cannot be loaded" in failed["failure"]


@pytest.mark.usefixtures("cli")
def test_workers_find_the_drivers_files_and_take_one_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("p.json").write_text("{}")
    given = dataclasses.replace(CHOSEN, device="auto", prompt="p.json")
    monkeypatch.setattr(command, "place_for", lambda _: Place("cpu"))
    found = command._for_all_machines(given, RayOptions())
    assert (found.device, found.prompt) == ("cpu", str(Path("p.json").absolute()))
