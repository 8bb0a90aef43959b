"""`packscore selftest`: its report, what makes it fail, and what it refuses before it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import measured
from cli_helpers import Cli, with_command
from helpers import QWEN3
from packscore import MultiItemScorer, shipped_model_path
from packscore.cli import doctor
from packscore.cli import selftest as command
from packscore.flows.costs import predicted_parts, tpu_cost_model
from packscore.model.sizes import ModelSizes
from packscore.programs.profile import REST, SCOPES, parts_of, self_ms
from packscore.selftest.report import Planned, Report
from packscore.selftest.subjects import REFERENCE
from packscore_kernels.hardware import CHIPS, KNOWN_ERROR

pytestmark = pytest.mark.usefixtures("quick_programs")

TINY = ("--query", "9", "--items", "4x3", "--warmup", "1", "--runs", "3")
SHIPPED = ("--model", str(shipped_model_path()))
FLOWS = {"packed", "prefill + extend", "chunked", "plain"}


def report_of(cli: Cli, *options: str, code: int = 0) -> dict[str, Any]:
    done = cli("selftest", *TINY, *SHIPPED, *options, "--json", "-")
    assert done.code == code, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_every_way_is_checked_timed_and_profiled(cli: Cli) -> None:
    done = cli("selftest", *TINY, *SHIPPED, "--device", "cpu", "--ab", "--json", "report.json")
    assert done.code == 0, done.out
    found = json.loads(Path("report.json").read_text())
    assert found["passed"]
    ways = {(x["runs"], x["mask"], x["flow"]) for x in found["checks"] if not x["refused"]}
    in_programs = {("programs", mask, flow) for mask in ("dense", "segment") for flow in FLOWS}
    assert ways >= in_programs | {("torch", "segment", flow) for flow in FLOWS}
    cells = {(x["runs"], x["mask"], x["flow"]): x for x in found["cells"]}
    timed = {
        (*way, flow)
        for way in (("programs", "dense"), ("programs", "segment"), ("torch", "segment"))
        for flow in ("packed", "prefill + extend")
    }
    assert set(cells) >= timed
    for cell in cells.values():
        assert cell["ms_low"] <= cell["ms"] <= cell["ms_high"]
        assert cell["items_per_s"] * cell["ms"] == pytest.approx(4e3)
        assert cell["num_runs"] == 3
    assert cells["torch", "segment", "packed"]["predicted_ms"] > 0
    parts = {x["part"]: x["ms"] for x in found["parts"] if x["runs"] == "programs"}
    assert set(parts) <= {*SCOPES, REST}
    assert min(parts["attention"], parts["products"]) > 0
    assert {x["runs"] for x in found["planned"]} == {"torch", "programs"}
    assert found["compiled"]["programs"] > 4
    for line in ("verdict: exact", "segment prefill + extend", "planner, programs"):
        assert line in done.out


def test_one_wrong_score_fails_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    score = MultiItemScorer.score

    def off(self: MultiItemScorer, *args: Any, **options: Any) -> Any:
        found = score(self, *args, **options)
        if options.get("flow") == "chunked":
            found[-1][0] += 1e-4
        return found

    monkeypatch.setattr(MultiItemScorer, "score", off)
    monkeypatch.setattr(command, "has_jax", lambda: False)  # torch alone, which is soon done
    found = report_of(cli, "--device", "cpu", code=1)
    assert not found["passed"]
    bad = [x for x in found["checks"] if not x["refused"] and x["max_difference"] > x["bound"]]
    assert {(x["flow"], x["mask"]) for x in bad} == {("chunked", "segment")}
    assert {x["runs"] for x in found["cells"]} == {"torch"}


REFUSED = {
    "--device cuda": "--device='cuda' cannot be used",
    "--device tpu": "--device=tpu: this machine has no TPU",
    "--device gpu": "--device='gpu' must be one of auto, tpu, cuda, mps, cpu, jax",
    "--items 500": "--items='500' must be a number of items and their tokens: --items 500x20",
    "--items 0x20": "--items='0x20' must be",
    "--json nowhere/report.json": "--json=nowhere/report.json: there is no such folder",
    "--dtype int8": "--dtype='int8' must be one of auto, float32, bfloat16, float16",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_cannot_run_is_said_in_one_line(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.setattr(command, "tpu_is_plugged_in", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = cli("selftest", *options.split())
    assert done.code == 2
    assert REFUSED[options] in done.err
    assert len(done.err.splitlines()) == 1
    assert os.listdir() == []


def test_an_occupied_chip_is_told(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "tpu_is_plugged_in", lambda: True)
    monkeypatch.setattr(doctor, "ask_jax", lambda: ([], "The TPU is already in use by process 7"))
    done = cli("selftest", "--device", "tpu")
    assert done.code == 2
    assert "already in use by process 7" in done.err


def test_killed_it_leaves_no_report(tmp_path: Path) -> None:
    script = [sys.executable, "-m", "packscore", "selftest", "--device", "cpu"]
    folder = tmp_path / "empty"
    folder.mkdir()
    running = subprocess.Popen(
        script, cwd=folder, env=with_command(tmp_path), stderr=subprocess.PIPE, text=True
    )
    assert running.stderr is not None
    assert any("every flow" in line for line in running.stderr)
    running.send_signal(signal.SIGKILL)
    running.wait()
    running.stderr.close()
    assert os.listdir(folder) == []


def test_a_report_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_text("before")

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        command._write(path, "half")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["report.json"]


HLO = """
ENTRY %main {
  %fusion.1 = bf16[8]{0} fusion(%p), kind=kLoop, metadata={op_name="jit(program)/add" id=1}
  %while.2 = (s32[], bf16[8]{0}) while(%t), metadata={op_name="jit(program)/while"}
  %segment_paged_attention.3 = bf16[8]{0:T(8)S(1)} custom-call(%f), metadata={op_name="a/KERNEL/b"}
  ROOT %dot.4 = f32[8]{0} dot(%a, %b), metadata={op_name="jit(program)/linear/dot_general"}
  %gated_mlp.6 = bf16[8]{0} custom-call(%f), metadata={op_name="a/gated_mlp/dot_general"}
  write_kv_pages.5 = bf16[8]{0} custom-call(%f), metadata={op_name="a/write_kv_pages/x"}
}
""".replace("KERNEL", "segment_paged_attention")


def test_operations_are_known_by_their_scopes() -> None:
    assert parts_of(HLO) == {
        "fusion.1": REST,
        "segment_paged_attention.3": "attention",
        "dot.4": "products",
        "gated_mlp.6": "gated_mlp",
        "write_kv_pages.5": "pages",
    }


def test_time_is_that_of_the_innermost_operation() -> None:
    def event(name: str, start: float, end: float) -> Any:
        return SimpleNamespace(name=name, start_ns=1e6 * start, duration_ns=1e6 * (end - start))

    events = [
        event("%fusion.1 = bf16[8]{0} fusion(...)", 0, 10),  # as a TPU's profile names it
        event("dot.4", 2, 5),
        event("segment_paged_attention.3", 3, 4),
        event("while.2", 0, 100),  # unknown: what it calls is counted
        event("dot.4", 10, 11),
    ]
    found = sorted(self_ms(events, parts_of(HLO)))
    assert found == [
        ("dot.4", 1),
        ("dot.4", 2),
        ("fusion.1", 7),
        ("segment_paged_attention.3", 1),
    ]


def test_the_page_of_what_was_measured_is_made_from_the_reports() -> None:
    reports = measured.reports()
    assert reports
    text = measured.PAGE.read_text()
    assert measured.page(text, reports) == text
    # and would not, were a report another
    name, found = next(iter(reports.items()))
    assert measured.page(text, {name: {**found, "dtype": "float8"}}) != text
    assert all(found["passed"] for found in reports.values())


def test_a_prediction_for_a_tpu_is_told_with_its_known_error() -> None:
    report = Report({}, {"query_len": 1, "num_items": 1, "item_len": 1}, "tiny", "float32")
    report.planned += [
        Planned("torch", "measured on this machine", 1.0, None, 1.0),
        Planned("programs", "from the compiler's schedule", 1.0, None, 1.0, KNOWN_ERROR),
    ]
    assert report.text().count(KNOWN_ERROR) == 1
    assert json.loads(report.json())["planned"][1]["known_error"] == KNOWN_ERROR
    # on the page too, and a report from before it was there has none
    planned = json.loads(report.json())["planned"]
    assert KNOWN_ERROR[1:] in measured.planned({"planned": planned})
    del planned[1]["known_error"]
    assert KNOWN_ERROR[1:] not in measured.planned({"planned": planned})


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_predicted_parts_are_the_planners_milliseconds(chip: str) -> None:
    sizes = ModelSizes.of(QWEN3)
    items = REFERENCE.num_items * REFERENCE.item_len
    tokens = REFERENCE.query_len + items
    pairs = items * (REFERENCE.query_len + REFERENCE.item_len / 2), REFERENCE.query_len**2 / 2
    parts = predicted_parts(sizes, chip, tokens, *pairs)
    assert sum(parts.values()) == pytest.approx(
        tpu_cost_model(sizes, chip, 2).launch(tokens, *pairs)
    )
    assert predicted_parts(sizes, "v4", tokens, *pairs) == {}
    assert "v4" in CHIPS
