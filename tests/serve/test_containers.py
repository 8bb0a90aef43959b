"""What can be said of the Dockerfiles where nothing builds them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from packscore.cli.app import app

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.tpu"])
def test_a_dockerfile_names_what_is_there_and_says_that_it_is_untried(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "untried" in text.splitlines()[0]
    for line in re.findall(r"(?m)^COPY (.+) \S+$", text):
        assert [part for part in line.split() if not (ROOT / part).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"/src\[([\w,]+)\]", text)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    (torch,) = re.findall(r"'(torch<[\d.]+)'", text)
    assert any(
        one.startswith("torch>") and one.endswith(torch[5:]) for one in project["dependencies"]
    )


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.tpu", "docs/serve.md"])
def test_every_variable_is_an_option_of_serve(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    options = get_command(app).commands["serve"].params  # type: ignore[attr-defined]  # a group has them
    known = {f"PACKSCORE_SERVE_{(param.name or '').upper()}" for param in options}
    named = set(re.findall(r"PACKSCORE_SERVE_[A-Z_]*[A-Z]", text))
    assert named
    assert named <= known
