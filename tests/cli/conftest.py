"""The command line inside the test's process, on the shipped model."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_helpers import Cli


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs commands in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return Cli(tmp_path)
