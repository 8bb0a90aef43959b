"""Which packages are installed, which versions were tested together, and commands that install."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

SOURCES = Path(__file__).resolve().parents[2]
# Written by whoever runs the tests on many versions; a list of rows, see `COLUMNS`.
TESTED = Path(__file__).with_name("tested_versions.json")
VERSIONS = (
    *("python", "torch", "transformers", "accelerate", "jax", "jaxlib", "torchax"),
    "sentence_transformers",
)
COLUMNS = (*VERSIONS, "date", "result")
# Packages that come with an extra; those of one have to fit each other.
EXTRA_OF = {"jax": "jax", "jaxlib": "jax", "torchax": "jax", "libtpu": "tpu"}

Row = Mapping[str, str | None]


def version_of(package: str) -> str | None:
    """The installed version of a package, or of Python."""
    if package == "python":
        return platform.python_version()
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def install_command(extra: str = "") -> str:
    """The command that installs packscore again, with an extra, from where it is from.

    PEP 610 keeps what `pip install` was given; without it, it was a name. Sources that run without
    being installed are named by their folder.
    """
    brackets = f"[{extra}]" if extra else ""
    try:
        told = metadata.distribution("packscore").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        folder = str(SOURCES) if (SOURCES / "pyproject.toml").is_file() else "."
        return _pip(folder + brackets)
    if told is None:
        return _pip(f"packscore{brackets}")
    found = json.loads(told)
    url, vcs = found["url"], found.get("vcs_info")
    if found.get("dir_info", {}).get("editable"):
        return _pip(unquote(urlsplit(url).path) + brackets, option="--editable ")
    if vcs:
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return _pip(f"packscore{brackets} @ {url}")


def _pip(*wanted: str, option: str = "") -> str:
    # quoted also where a shell would not need it: one form, whatever a path holds
    quoted = (f"'{name}'" if shlex.quote(name) == name else shlex.quote(name) for name in wanted)
    return f"pip install {option}{' '.join(quoted)}"


def tested_rows() -> list[Row]:
    """What was run, a row for each combination; nothing where no table is shipped."""
    rows: list[Row] = json.loads(TESTED.read_text()) if TESTED.is_file() else []
    return rows


def is_installed(row: Row) -> bool:
    """Whether a row names the versions that are installed here."""
    return all(_is_same(name, row.get(name)) for name in VERSIONS)


def _is_same(column: str, told: str | None) -> bool:
    found = version_of(column.replace("_", "-"))
    if not told or not found:
        return not told and not found
    if column == "python":  # "3.11" stands for all of them
        return found == told or found.startswith(f"{told}.")
    return _public(found) == _public(told)


def _public(version: str) -> str:
    return version.partition("+")[0]  # without "+cpu"


def _passed() -> list[Row]:
    """Rows that passed, the one most like what is installed first."""
    rows = [row for row in tested_rows() if str(row.get("result")).startswith("pass")]
    return sorted(rows, key=lambda row: -sum(_is_same(name, row.get(name)) for name in VERSIONS))


def tested(package: str) -> str:
    """Versions of a package that passed, or those that packscore asks for."""
    found = {_public(version) for row in _passed() if (version := row.get(package))}
    if found:
        return f"tested with {', '.join(sorted(found))}"
    return f"packscore asks for {_specifier(package) or 'another version'}"


def _specifier(package: str) -> str:
    """What packscore's metadata asks of a package; "" where it runs from its sources."""
    # imported here: only where something is missing
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("packscore") or []
    except metadata.PackageNotFoundError:
        return ""
    return next((str(r.specifier) for r in map(Requirement, lines) if r.name == package), "")


def remedy(package: str, again: bool = False) -> str:
    """A command that puts a version in place which packscore was tested with, or asks for.

    Args:
      package: which one.
      again: the version is not at fault, its files are.
    """
    if again:
        same = f"{package}=={version_of(package)}"
        return _pip(same, option="--force-reinstall --no-deps ")
    extra = EXTRA_OF.get(package)
    together = [name for name, other in EXTRA_OF.items() if other == extra] if extra else [package]
    for row in _passed():
        wanted = [f"{name}=={_public(version)}" for name in together if (version := row.get(name))]
        # what is here already does not help, whatever it passed with
        if any(not _is_same(name, row[name]) for name in together if row.get(name)):
            return _pip(*wanted)
    if extra:
        return install_command(extra)
    specifier = _specifier(package)
    return _pip(package + specifier) if specifier else install_command()
