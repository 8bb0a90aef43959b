"""Compiled programs that the command line keeps: where, for whom, and what it says of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cli_helpers import RECORDS, Cli, with_command
from packscore import shipped_model_path
from packscore.cli import cache
from packscore.cli.cache import folder_of, open_cache

WARMUP = ("warmup", "-m", str(shipped_model_path()), "--max-tokens", "128", "--quiet")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the folders that nobody names; the suite's own is for the other tests."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("PACKSCORE_CACHE_DIR", str(tmp_path / "root"))
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("asked", "jaxs", "own", "xdg", "found"),
    [
        (None, None, None, None, "/home/me/.cache/packscore/programs/versions"),
        (None, None, None, "/xdg", "/xdg/packscore/programs/versions"),
        (None, None, None, "not/absolute", "/home/me/.cache/packscore/programs/versions"),
        (None, None, "/own", "/xdg", "/own/programs/versions"),
        (None, None, "none", "/xdg", None),
        (None, "/jaxs", "/own", "/xdg", "/jaxs"),
        (None, "/jaxs", "none", None, "/jaxs"),
        ("/asked", "/jaxs", "none", "/xdg", "/asked"),
        ("none", "/jaxs", "/own", "/xdg", None),
    ],
)
def test_the_folder_is_the_one_that_is_named_closest(
    monkeypatch: pytest.MonkeyPatch,
    asked: str | None,
    jaxs: str | None,
    own: str | None,
    xdg: str | None,
    found: str | None,
) -> None:
    named = {"JAX_COMPILATION_CACHE_DIR": jaxs, "PACKSCORE_CACHE_DIR": own, "XDG_CACHE_HOME": xdg}
    for name, value in named.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    monkeypatch.setattr(cache, "_made_by", lambda: "versions")
    assert folder_of(asked) == (None if found is None else Path(found))


@pytest.mark.parametrize("package", ["packscore", "jax", "jaxlib", "libtpu", "the processor"])
def test_another_version_or_processor_has_another_folder(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    versions = {"jax": "1", "jaxlib": "2", "libtpu": "3"}
    monkeypatch.setattr("importlib.metadata.version", versions.__getitem__)
    before = folder_of(None)
    assert folder_of(None) == before
    if package == "packscore":
        monkeypatch.setattr("packscore.__version__", "9")
    elif package in versions:
        versions[package] = "9"
    else:
        monkeypatch.setattr(cache, "_processor", lambda: "another")
    assert folder_of(None) != before


@pytest.mark.usefixtures("quick_programs")
def test_what_warmup_kept_rank_finds(cli: Cli, root: Path) -> None:
    done = cli(*WARMUP)
    assert done.code == 0, done.err
    (folder,) = (root / "programs").iterdir()
    entries = [*folder.glob("*-cache")]
    assert "kept 1 compiled program (" in done.err
    assert f"MiB) in {folder}; rm -r {folder} deletes them" in done.err
    assert len(entries) == 1
    cli.write("in.jsonl", [{"query": "open", "items": ["Open a file."]}])
    options = ("--prompt", "yes-no", "--device", "jax", "-m", str(shipped_model_path()))
    done = cli("rank", "in.jsonl", "-o", "out.jsonl", *options)
    assert done.code == 0, done.err
    assert "compiled programs" not in done.err
    assert {*folder.glob("*-cache")} == {*entries}


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert open_cache(str(tmp_path / "file" / "folder")).folder is None
    told = capsys.readouterr().err
    assert told.startswith("packscore: warning: compiled programs are not kept, for ")
    assert "(Not a directory); name another folder, --cache-dir FOLDER, or none" in told
    assert len(told.splitlines()) == 1


def test_scores_in_torch_make_no_folder(cli: Cli, root: Path) -> None:
    cli.write("in.jsonl", RECORDS[:1])
    model = ("-m", str(shipped_model_path()), "--device", "cpu")
    assert cli("rank", "in.jsonl", "-o", "out.jsonl", *model).code == 0
    assert not root.exists()


@pytest.mark.long
def test_two_processes_may_write_at_once(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-m", "packscore", *WARMUP]
    environment = with_command(tmp_path / "bin")
    both = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "kept" not in again.stderr
    assert "Error reading" not in again.stderr
