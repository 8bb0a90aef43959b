"""Commands that install, and what was tested: from where packscore is from, and what is here."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from packscore import MissingPackageError, installed
from packscore.cli.doctor import Findings
from packscore.installed import install_command, is_installed, remedy, version_of


class Distribution:
    def __init__(self, told: Any) -> None:
        self.told = told

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.told is None else json.dumps(self.told)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (None, "pip install 'packscore[jax]'"),
        (
            {"url": "file:///home/me/packscore", "dir_info": {}},
            "pip install 'packscore[jax] @ file:///home/me/packscore'",
        ),
        (
            {"url": "file:///tmp/packscore-0.1.0-py3-none-any.whl", "archive_info": {}},
            "pip install 'packscore[jax] @ file:///tmp/packscore-0.1.0-py3-none-any.whl'",
        ),
        (
            {"url": "file:///home/my%20own/packscore", "dir_info": {"editable": True}},
            "pip install --editable '/home/my own/packscore[jax]'",
        ),
        (
            {"url": "https://e.org/p.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "pip install 'packscore[jax] @ git+https://e.org/p.git@abc'",
        ),
    ],
    ids=["index", "folder", "wheel", "editable", "git"],
)
def test_the_command_is_of_where_packscore_is_from(
    told: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda _: Distribution(told))
    assert install_command("jax") == expected
    assert len(shlex.split(expected)) in (3, 4)
    assert expected in str(MissingPackageError("this", "jax"))


def test_sources_are_named_by_their_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none(_: str) -> Any:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "distribution", none)
    root = Path(__file__).resolve().parents[1]
    monkeypatch.setattr(installed, "SOURCES", root)
    assert install_command("tpu") == f"pip install '{root}[tpu]'"
    monkeypatch.setattr(installed, "SOURCES", tmp_path)  # no clone: the command is for one
    assert install_command("tpu") == "pip install '.[tpu]'"
    assert install_command() == "pip install '.'"


def row(result: str = "passed", **other: str) -> dict[str, str | None]:
    here = {name: version_of(name.replace("_", "-")) for name in installed.VERSIONS}
    return {**here, **other, "date": "2026-11-20", "result": result}


def write(rows: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "tested_versions.json"
    path.write_text(json.dumps(rows))
    monkeypatch.setattr(installed, "TESTED", path)


def test_a_row_is_installed_when_all_its_versions_are() -> None:
    assert is_installed(row())
    assert is_installed(row(python="3.11"))
    assert is_installed(row(torch=str(version_of("torch")).partition("+")[0]))
    assert not is_installed(row(python="3.1"))
    for name in installed.VERSIONS:
        assert not is_installed(row(**{name: "0.0.1"}))
        assert is_installed(row(**{name: ""})) == (version_of(name.replace("_", "-")) is None)


def test_a_remedy_names_versions_that_passed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [
        row(
            torch="2.11.0+cpu", accelerate="1.10.0", jax="0.10.0", jaxlib="0.10.0", torchax="0.0.13"
        ),
        row("failed", torch="2.15.0"),
        row(transformers="5.9.0", jax="0.12.0", jaxlib="0.12.0", torchax="0.0.14"),
    ]
    write(rows, tmp_path, monkeypatch)
    # of what passed, the row that is most like what is here
    assert remedy("transformers") == "pip install 'transformers==5.9.0'"
    jax = "pip install 'jax==0.12.0' 'jaxlib==0.12.0' 'torchax==0.0.14'"
    assert remedy("torchax") == remedy("jaxlib") == jax
    assert remedy("libtpu") == install_command("tpu")
    assert installed.tested("transformers") == f"tested with {version_of('transformers')}, 5.9.0"
    assert "2.15" not in installed.tested("torch")
    write([], tmp_path, monkeypatch)
    assert remedy("torchax") == install_command("jax")
    monkeypatch.setattr(metadata, "requires", lambda _: ["torch<2.16,>=2.11", "jax"])
    assert remedy("torch") == "pip install 'torch<2.16,>=2.11'"
    assert installed.tested("torch") == "packscore asks for <2.16,>=2.11"


def test_the_doctor_marks_the_row_that_is_installed() -> None:
    def text(*rows: Any) -> str:
        marked = [{**one, "is_installed": is_installed(one)} for one in rows]
        return Findings({}, {}, [], [], {}, tested=marked).text()

    other = row("failed", torch="2.11.0", sentence_transformers="")
    lines = text(other, row()).splitlines()
    (header,) = (k for k, line in enumerate(lines) if line.split() == list(installed.COLUMNS))
    cells = (version_of(name.replace("_", "-")) or "-" for name in installed.VERSIONS)
    assert lines[header + 1].split()[1] == "2.11.0"
    assert lines[header + 1].split()[-3:] == ["-", "2026-11-20", "failed"]
    assert lines[header + 2].split() == ["*", *cells, "2026-11-20", "passed"]
    assert "this combination was not run" not in text(other, row())
    assert "this combination was not run" in text(other)
    assert "none are recorded" in text()
