"""The documentation site builds strictly, fetches nothing, and a broken link stops it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import packscore
import packscore_kernels

ROOT = Path(__file__).resolve().parents[1]


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages == {path.parent.name for path in site.glob("*/index.html")}
    assert (site / "index.html").exists()
    assert not list(site.glob("*.py"))  # docs/ holds pages and pictures alone


def test_readers_fetch_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("**/*.html"):
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"([^\"]+)", text)
        loaded += re.findall(
            r"<link[^>]*rel=\"(?:stylesheet|preconnect)\"[^>]*href=\"([^\"]+)", text
        )
        assert len(loaded) > 2
        assert [url for url in loaded if "//" in url] == [], page


def test_the_api_has_every_public_name(site: Path) -> None:
    text = (site / "api/index.html").read_text()
    shown = {name.rpartition(".")[2] for name in re.findall(r'id="(packscore[\w.]*)"', text)}
    names = {*packscore.__all__, *packscore_kernels.__all__}
    assert {name for name in names if not name.isupper()} <= shown  # constants have no text


def test_a_broken_link_stops_the_build(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for name in ("plugin", "jax_kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    with (tmp_path / "docs/index.md").open("a") as page:
        page.write("\n[gone](gone.md) [no heading](cli.md#gone)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "gone.md" in done.stderr
    assert "cli.md#gone" in done.stderr
