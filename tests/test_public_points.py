"""What others measured beside our counts: page, sentence, and a count worked out by hand."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

import public_points
from packscore_kernels.hardware import KNOWN_ERROR
from tpu_compiler.schedule import Region


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(public_points.RESULTS.read_text())
    return found


def test_every_point_is_there_and_says_where_it_comes_from(results: dict[str, Any]) -> None:
    assert [row["name"] for row in results["rows"]] == [*public_points.POINTS]
    for row in results["rows"]:
        assert row == public_points.row(row["name"], row["predicted_ms"])
        # an address that names a commit, or none: what moves proves nothing
        assert row["source"] is None or re.search(r"/blob/[0-9a-f]{40}/", row["source"])
    assert {row["kind"] for row in results["rows"]} == set(public_points.KINDS)
    made = results["made"]
    assert re.fullmatch(r"[0-9a-f]{7,}\+?", made["commit"])
    assert {"jax", "libtpu"} <= set(made["versions"])


def test_the_sentence_printed_with_every_prediction_is_that_of_the_results(
    results: dict[str, Any],
) -> None:
    rows = results["rows"]
    assert public_points.known_error(rows) == KNOWN_ERROR
    # and would not be, were one count another
    off = [{**row, "error": 0.5} if row["name"] == "matmul" else row for row in rows]
    assert public_points.known_error(off) != KNOWN_ERROR


def test_the_page_shows_the_results(results: dict[str, Any]) -> None:
    text, rows = public_points.PAGE.read_text(), results["rows"]
    assert public_points.page(text, rows) == text
    assert public_points.page(text, [{**rows[0], "predicted_ms": 1.0}, *rows[1:]]) != text


def test_flash_attention_is_counted_as_its_source_says(monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, Any] = {"start": 0, "end": 0, "label": "", "use": {}, "exits": [], "notes": []}
    # copies, clearing, guard, body, guard, the tile's end, the loop's
    bundles = [100, 20, 3, 500, 2, 10, 30]
    pieces = [Region(bundles=n, depth=1, text="vmatmul" * (n == 500), **facts) for n in bundles]
    outside = Region(bundles=7000, depth=0, text="", **facts)
    monkeypatch.setattr(public_points, "regions", lambda path: iter([outside, *pieces]))
    # two heads of 4 x 4 blocks: 8 tiles of queries; 2 x (1 + 2 + 3 + 4) of 32 steps see something
    expected = 32 * (100 + 3 + 2 + 30) + 8 * (20 + 10) + 20 * 500
    assert public_points.flash_cycles("", 4, 32) == expected
