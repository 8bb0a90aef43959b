"""The ranges of pyproject.toml, the sets that are run, and the page that shows what passed."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from versions.run import CORE, PAGE, ROOT, SETS, read_rows, table

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ASKED = {
    found.name: found.specifier
    for line in (*PROJECT["dependencies"], *EXTRAS["jax"], *EXTRAS["sentence-transformers"])
    for found in [Requirement(line)]
}


def lowest(name: str) -> Version:
    return next(Version(clause.version) for clause in ASKED[name] if clause.operator == ">=")


def test_the_oldest_set_is_where_the_ranges_begin() -> None:
    pins = {found.name: found.specifier for found in map(Requirement, SETS["oldest"].pins)}
    for name in ("torch", "transformers", "accelerate", "jax", "sentence-transformers"):
        (clause,) = pins[name]
        assert Version(clause.version).release[:2] == lowest(name).release[:2], name


@pytest.mark.parametrize("name", SETS)
def test_sets_lie_within_the_ranges_and_run_what_is_there(name: str) -> None:
    for pin in map(Requirement, SETS[name].pins):
        (clause,) = pin.specifier
        specifier = ASKED.get(pin.name)
        assert specifier is None or specifier.contains(clause.version, prereleases=True), str(pin)
    assert SpecifierSet(PROJECT["requires-python"]).contains(SETS[name].python)
    for path in (*CORE, *(test.partition("::")[0] for test in SETS[name].left_out)):
        assert (ROOT / path).exists(), path


def test_the_page_shows_what_passed() -> None:
    rows = read_rows()
    assert {row["set"] for row in rows} <= set(SETS)
    (shown,) = re.findall(r"(?m)^\| set \|.*(?:\n\|.*)*", PAGE.read_text())
    assert shown == table(rows)
    for row in rows:
        for name in ("torch", "transformers", "accelerate"):
            assert ASKED[name].contains(row[name], prereleases=True), row["set"]
