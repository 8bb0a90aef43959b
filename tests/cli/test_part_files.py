"""`--ray` without Ray: what it refuses, the folder of parts, and what a worker makes of a range."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from cli_helpers import MODEL, Cli
from packscore.cli.fleet import options as ray_options
from packscore.cli.fleet.schema import carried_type, part_schema
from packscore.files import folder as folders
from packscore.files.failures import RunError, UsageError
from packscore.files.folder import FolderPlan, begin_folder, finish_folder, put_part
from packscore.files.records import FieldNames
from packscore.fleet import Workers

ROWS: dict[str, list[Any]] = {
    "query": ["delete a tree", "delete a tree", "open a file", "open a file", None, "shuffle"],
    "document": ["Delete it.", "Open a file.", "Open a file.", None, "x", "Shuffle a list."],
    "doc_id": [1, 2, 3, 4, 5, 6],
    "when": [None, None, None, None, None, "now"],
}


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    parquet.write_table(pa.table(ROWS), "in.parquet")
    return Cli(tmp_path)


@pytest.fixture
def with_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_options, "find_spec", lambda _: True)


def plan(**changes: Any) -> FolderPlan:
    found = FolderPlan(str(Path("in.parquet").absolute()), str(Path("out").absolute()), "jsonl", 2,
                       False, False)  # fmt: skip
    return dataclasses.replace(found, **changes)


def test_it_names_the_command_that_installs_ray(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_options, "find_spec", lambda _: None)
    done = cli("rank", "in.parquet", "-o", "out", *MODEL, "--ray")
    assert done.code == 2
    assert "--ray needs Ray, which is not installed: pip install" in done.err
    assert "[ray]" in done.err
    assert not Path("out").exists()


REFUSED = {
    ("in.jsonl", "-o", "out", "--ray"): "INPUT=in.jsonl: --ray reads ranges of a parquet file",
    ("-", "-o", "out", "--ray"): "and no stream",
    ("torn.parquet", "-o", "out", "--ray"): "INPUT=torn.parquet is no parquet file",
    ("none.parquet", "-o", "out", "--ray"): "INPUT=none.parquet is not a file",
    ("in.parquet", "-o", "in.jsonl", "--ray"): "--output=in.jsonl must be a folder",
    ("in.parquet", "-o", "-", "--ray"): "--output=- must be a folder",
    ("in.parquet", "-o", "a/b", "--ray"): "there is no folder a",
    ("in.parquet", "-o", "full", "--ray"): "--output={}/full holds thing; pass --resume",
    ("in.parquet", "-o", "full", "--ray", "--resume"): "nothing says what made part-000000.jsonl",
    ("in.parquet", "-o", "out", "--ray", "--resume", "--overwrite"): "pass one",
    ("in.parquet", "-o", "out", "--ray", "--errors", "e.jsonl"): "errors-*.jsonl in --output",
    ("in.parquet", "-o", "out", "--ray", "--output-format", "csv"): "as parquet or jsonl",
    ("in.parquet", "-o", "out", "--ray", "--dry-run"): "--dry-run is for a plan of one machine",
    ("in.parquet", "-o", "out", "--ray", "--price-per-hour", "2"): "--price-per-hour is for a plan",
    ("in.parquet", "-o", "out", "--ray", "--group"): "--group brings rows from all of INPUT",
    ("in.parquet", "-o", "out", "--ray", "--worker-resources", "GPU"): "such as CPU=4,GPU=1",
    ("in.parquet", "-o", "out", "--ray", "--worker-resources", "GPU=0"): "numbers above 0",
    ("in.parquet", "-o", "out", "--workers", "2"): "--workers=2 is for --ray",
    ("in.parquet", "-o", "out", "--part-rows", "2"): "--part-rows=2 is for --ray",
    ("in.parquet", "-o", "out", "--ray-address", "auto"): "--ray-address=auto is for --ray",
}


@pytest.mark.usefixtures("with_ray")
def test_what_does_not_fit_is_refused_by_name(cli: Cli) -> None:
    cli.write("in.jsonl", [])
    Path("torn.parquet").write_bytes(Path("in.parquet").read_bytes()[:-9])
    Path("full").mkdir()
    Path("full/thing").write_text("")
    for arguments, why in REFUSED.items():
        if "full" in arguments and "--resume" in arguments:
            Path("full/part-000000.jsonl").write_text("")
        done = cli("rank", *arguments, *MODEL)
        assert why.format(Path.cwd()) in done.err, (arguments, done.err)
        assert done.code == (1 if "nothing says" in why else 2), arguments
    assert not Path("out").exists()
    asked = ("decide", *MODEL, "--state", "a", "--questions", "q.json", "--ray")
    Path("q.json").write_text('{"a": {"type": "noul", "instructions": "Is it?"}}')
    assert "--state is one state, and --ray is for a file" in cli(*asked).err


@pytest.mark.usefixtures("with_ray")
def test_a_cluster_takes_no_device_by_chance(cli: Cli) -> None:
    rank = ("rank", "in.parquet", "-o", "out", *MODEL[:2], "--ray", "--ray-address", "auto")
    done = cli(*rank, "--labels", "no,yes")
    assert "--device=auto: machines of a cluster may choose differently" in done.err
    assert done.code == 2


def test_workers_take_what_the_device_needs_and_fill_the_cluster() -> None:
    cluster = {"CPU": 16.0, "GPU": 3.0, "TPU": 8.0, "memory": 1e9}
    found = ray_options.RayOptions().workers("cuda:0", cluster, 100)
    assert found == Workers(3, num_cpus=1, num_gpus=1)
    given = ray_options.ray_options(True, None, None, "TPU=4, CPU=2", None)
    assert given is not None
    found = given.workers("tpu", cluster, 100)
    assert found == Workers(2, num_cpus=2, resources={"TPU": 4})
    assert ray_options.RayOptions(num_workers=9).workers("cpu", cluster, 4).count == 4
    assert ray_options.RayOptions().workers("tpu", {"CPU": 1.0}, 4).count == 1


@pytest.mark.usefixtures("cli")
def test_a_note_lets_only_the_same_run_go_on() -> None:
    Path("out").mkdir()
    settings = begin_folder(plan(), {"top_k": 1})
    Path("out/part-000000.jsonl").write_text("{}\n")
    assert begin_folder(plan(resume=True), {"top_k": 1}) == settings
    with pytest.raises(RunError, match="top_k=1, and now it is 2"):
        begin_folder(plan(resume=True), {"top_k": 2})
    with pytest.raises(RunError, match="part_rows=2, and now it is 3"):
        begin_folder(plan(resume=True, part_rows=3), {"top_k": 1})
    finish_folder(plan(), settings, 1)
    assert json.loads(Path("out/_packscore.json").read_text())["complete"]
    parquet.write_table(pa.table({"query": ["a"], "document": ["b"]}), "in.parquet")
    with pytest.raises(RunError, match="input="):
        begin_folder(plan(resume=True), {"top_k": 1})
    Path("out/part-mine.parquet").write_text("")
    begin_folder(plan(overwrite=True), {"top_k": 2})
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "_packscore.json",
        "part-mine.parquet",
    ]


@pytest.mark.usefixtures("cli")
def test_a_part_is_there_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out").mkdir()
    settings = begin_folder(plan(), {})
    results, errors = Path("results"), Path("errors")
    results.write_text("one\n")
    errors.write_text("bad\n")

    def killed(read: Any, written: Any) -> None:
        written.write(read.read(2))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders.shutil, "copyfileobj", killed)
        with pytest.raises(KeyboardInterrupt):
            put_part(plan(), 0, results, errors)
    assert not list(Path("out").glob("part-*")) + list(Path("out").glob("errors-*"))
    assert len(list(Path("out").glob(".*.tmp"))) == 1
    put_part(plan(), 0, results, errors)
    assert (plan().part(0).read_text(), plan().errors(0).read_text()) == ("one\n", "bad\n")
    errors.unlink()
    put_part(plan(), 0, results, errors)
    assert not plan().errors(0).exists()
    begin_folder(plan(resume=True), {})
    finish_folder(plan(), settings, 1)
    names = sorted(path.name for path in Path("out").iterdir())
    assert names == ["_packscore.json", "part-000000.jsonl"]


@pytest.mark.usefixtures("cli")
def test_columns_of_all_parts_are_the_inputs_and_the_commands() -> None:
    def columns(names: FieldNames, command: str, **options: bool) -> dict[str, str]:
        schema = part_schema("in.parquet", names, command, **options)
        return {name: str(schema.field(name).type) for name in schema.names}

    entry = "struct<corpus_id: int64, id: string, score: double>"
    notes = dict.fromkeys(("truncated_items", "non_finite_items"), "list<item: int64>")
    assert columns(FieldNames(), "rank", rows=True, texts=False) == {
        "query": "string",
        "when": "list<item: string>",
        "ranking": f"list<item: {entry}>",
        **notes,
    }
    table = {"q": [{"text": "a", "n": 1}], "docs": [[{"body": "b", "id": 1}]], "t": [None]}
    parquet.write_table(pa.table(table), "in.parquet")
    assert columns(FieldNames("q.text", "docs.body"), "score", rows=False, texts=True) == {
        "q": "struct<text: string, n: int64>",
        "t": "string",
        "items": "list<item: string>",
        "item_ids": "list<item: string>",
        "scores": "list<item: list<item: double>>",
        **notes,
    }
    for given, kept in {
        pa.timestamp("us"): pa.string(),
        pa.dictionary(pa.int8(), pa.string()): pa.string(),
        pa.large_list(pa.float16()): pa.list_(pa.float32()),
        pa.uint64(): pa.uint64(),
    }.items():
        assert carried_type(given) == kept


@pytest.mark.usefixtures("cli")
def test_parts_need_a_folder_to_go_to() -> None:
    with pytest.raises(UsageError, match="must be a folder"):
        folders.plan_folder(
            *("in.parquet", "in.parquet", None, "jsonl"),
            part_rows=1,
            resume=False,
            overwrite=False,
        )
