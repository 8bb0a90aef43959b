"""Every Python snippet of the README and the docs runs; what the README prints was printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from packscore import shipped_model_path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# what cannot be downloaded while testing goes through the same code as the shipped model
HUB_NAME = "Qwen/Qwen3-Reranker-0.6B"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run_in_order(page: Path) -> None:
    scope: dict[str, Any] = {}
    for code in blocks(page, "python"):
        local = code.replace(HUB_NAME, str(shipped_model_path()))
        exec(compile(local, str(page), "exec"), scope)
    if page.name == "README.md":
        ranked = scope["scorer"].rank("delete a directory tree", scope["documents"], top_k=2)
        assert ranked[0]["corpus_id"] == 1
        assert len(ranked) == 2


def without_scores(text: str) -> list[str]:
    return re.sub(r"\b0\.\d{3}\b", "0.xxx", text).split()


def test_readme_shows_what_the_first_command_prints() -> None:
    example = [sys.executable, str(ROOT / "examples/rerank.py")]
    done = subprocess.run(example, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (shown,) = blocks(ROOT / "README.md", "text")
    assert without_scores(shown) == without_scores(done.stdout)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_shipped_model_tells_relevant_documents_apart() -> None:
    command = [sys.executable, str(ROOT / "examples/train_reranker.py"), "--evaluate"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    accuracy = float(re.search(r"pairwise accuracy: (\d\.\d+)", done.stdout)[1])
    assert accuracy >= 0.9
