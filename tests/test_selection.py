"""What the suite leaves out by default, and how its processes share the rest."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from selection import LONGEST_FIRST, cover, pairwise, unit_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("sizes", [(3,), (2, 2), (4, 2, 3), (2, 5, 3, 4)], ids=str)
def test_every_pair_of_values_is_in_a_chosen_row(sizes: tuple[int, ...]) -> None:
    rows = list(itertools.product(*map(range, sizes)))
    chosen = [rows[k] for k in pairwise(rows)]
    for i, j in itertools.combinations(range(len(sizes)), 2):
        expected = set(itertools.product(range(sizes[i]), range(sizes[j])))
        assert {(row[i], row[j]) for row in chosen} == expected
    two_largest = sorted(sizes)[-2:]
    assert len(chosen) <= 2 * two_largest[0] * two_largest[-1]


def test_pairs_that_no_row_holds_are_not_asked_for() -> None:
    assert pairwise([(0, "a", True), (1, "b", True), (0, "a", True)]) == {0, 1}
    assert pairwise([(0,), (1,), (1,)]) == {0, 1}
    assert pairwise([]) == set()


def test_cases_outside_the_cover_are_long() -> None:
    cases = [("first", (1, "x"), (0, 0)), ("again", (2, "y"), (0, 0)), ("other", (3, "z"), (0, 1))]
    first, again, other = cover(cases)
    assert [found.id for found in (first, again, other)] == ["first", "again", "other"]
    assert again.values == (2, "y")
    assert [mark.name for mark in again.marks] == ["long"]
    assert not first.marks
    assert not other.marks


def test_units_are_the_files_but_for_those_named() -> None:
    unit = LONGEST_FIRST[0]
    assert unit_of(f"{unit}[id::with-colons]") == unit
    assert unit_of("tests/cli/test_files.py::TestCase::test_method") == "tests/cli/test_files.py"
    assert len(set(LONGEST_FIRST)) == len(LONGEST_FIRST)
    for place, unit in enumerate(LONGEST_FIRST):
        path, _, test = unit.partition("::")
        assert f"def {test}" in (ROOT / path).read_text(), unit
        assert not any(unit.startswith(before) for before in LONGEST_FIRST[:place]), unit
