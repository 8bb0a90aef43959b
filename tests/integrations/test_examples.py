"""The examples of integrations and the command line run as they are and say what they should."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import logging

from cli_helpers import with_command
from processes import QUICK_PROGRAMS
from tolerances import LOG_ODDS_FLOAT32

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """Examples hide progress bars and register a task; other tests share this process."""
    tasks = dict(PIPELINE_REGISTRY.supported_tasks)
    yield
    logging.enable_progress_bar()
    PIPELINE_REGISTRY.supported_tasks.clear()
    PIPELINE_REGISTRY.supported_tasks.update(tasks)


def run(name: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("pipeline.py", capsys)
    assert lines[0] == "delete a directory tree"
    assert re.fullmatch(r"  0\.\d{3}  Recursively delete a directory tree\.", lines[1])
    assert re.fullmatch(r"  0\.\d{3}  Shuffle list x in place, and return None\.", lines[4])
    assert [line.split()[0] for line in lines[-3:]] == ["yes", "no", "no"]


def test_cross_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    *ranked, difference = run("cross_encoder.py", capsys)
    assert re.fullmatch(r"1  0\.\d{3}  Open a gzip-compressed file .*", ranked[0])
    assert len(ranked) == 2
    assert float(difference.rpartition(" ")[2]) < LOG_ODDS_FLOAT32


def test_langchain(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("langchain_rerank.py", capsys)
    assert lines[0] == "delete a directory tree"
    assert re.fullmatch(r"  0\.\d{3}  shutil: Recursively delete .*", lines[1])
    assert lines[3] == "shuffle a list"
    assert re.fullmatch(r"  0\.\d{3}  random: Shuffle .*", lines[4])


def test_llama_index(capsys: pytest.CaptureFixture[str]) -> None:
    best, other = run("llama_index_rerank.py", capsys)
    assert re.fullmatch(r"0\.\d{3}  shutil: Recursively delete .*", best)
    assert re.fullmatch(r"0\.\d{3}  os: Rename .*", other)


def test_rerankers(capsys: pytest.CaptureFixture[str]) -> None:
    best, other = run("rerankers_rank.py", capsys)
    assert re.fullmatch(r"1  0\.\d{3}  shutil: Recursively delete .*", best)
    assert re.fullmatch(r"2  0\.\d{3}  os: Rename .*", other)


@pytest.mark.jax
@pytest.mark.usefixtures("quick_programs")
def test_programs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rerank_tpu.py", "--device", "jax"])
    compiled, *lines = run("rerank_tpu.py", capsys)
    assert compiled == "2 programs on cpu"
    assert re.fullmatch(r"  0\.\d{3}  Recursively delete a directory tree\.", lines[1])
    assert re.fullmatch(r"  0\.\d{3}  Shuffle list x in place, and return None\.", lines[5])
    saved = [re.findall(r"\d+", line) for line in (lines[3], lines[7])]
    assert all(int(computed) < int(alone) / 2 for computed, alone in saved)


def printed(notebook: Any) -> list[list[str]]:
    """By cell of code: kinds of what it shows, and its words; numbers are those of a machine."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    for cell in cells:
        texts = [re.sub(r"\d+(\.\d+)?(e-\d+)?", "0", out.get("text", "")) for out in cell.outputs]
        kinds = [
            kind for out in cell.outputs for kind in (out.output_type, *sorted(out.get("data", ())))
        ]
        found.append([*kinds, *" ".join(texts).split()])
    return found


@pytest.mark.jax
def test_notebook_runs_and_holds_what_it_prints(tmp_path: Path) -> None:
    target = tmp_path / "ran.ipynb"
    command = [sys.executable, str(EXAMPLES / "run_notebook.py"), str(target)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, **QUICK_PROGRAMS},
    )
    assert done.returncode == 0, done.stderr  # also where a cell failed
    kept, ran = (nbformat.read(x, as_version=4) for x in (EXAMPLES / "tpu_notebook.ipynb", target))
    assert printed(ran) == printed(kept)
    for cell in ran.cells:
        for out in cell.get("outputs", ()):
            assert out.get("name") != "stderr", out
    text = "".join(out.get("text", "") for cell in ran.cells for out in cell.get("outputs", ()))
    assert "verdict: exact" in text
    assert [cell.source for cell in ran.cells] == [cell.source for cell in kept.cells]


def test_command_line(tmp_path: Path) -> None:
    command = ["sh", str(EXAMPLES / "files.sh")]
    environment = with_command(tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    header, best, *_ = done.stdout.splitlines()
    assert header == "query,corpus_id,score,text,truncated"
    assert best.startswith("delete a directory tree,1,0.")
    assert done.stdout.splitlines()[-1] == "verdict: equal"
