"""What JevBench 0.1.0 asks and gets, through `benchmarks/jevbench_laws.py`.

JevBench is not installed for the tests. These are requests as its five BAT laws sent them about one
case, recorded with the answers; that all of its laws run, and BAT holds, the command itself shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jevbench_laws import answering, random_model, shipped, together
from packscore import shipped_model_path

RECORDED = json.loads((Path(__file__).parent / "jevbench_recorded.json").read_text())["requests"]
SAME = 1e-5


def numbers(answer: dict[str, Any]) -> list[float]:
    """What JevBench reads of an answer (jevbench.schema.read_distribution)."""
    return [answer["noul"]] if answer["type"] == "noul" else list(answer["probabilities"].values())


def test_the_adapter_answers_as_recorded() -> None:
    model = answering(shipped(str(shipped_model_path())))
    assert len(RECORDED) > 5
    for one in RECORDED:
        found = model(one["state"], one["questions"])
        assert list(found) == list(one["questions"])
        for name, question in one["questions"].items():
            options = question.get("criteria")
            if question["type"] == "choice":
                assert list(found[name]["probabilities"]) == list(options)
            elif question["type"] == "score":
                assert list(found[name]["probabilities"]) == [str(i) for i in range(len(options))]
            assert numbers(found[name]) == pytest.approx(numbers(one["answers"][name]), abs=SAME)


def test_the_control_breaks_what_holds() -> None:
    """The laws' own question: is an answer that of the first request, whatever else is asked?"""
    random = random_model(str(shipped_model_path()))
    for model, holds in ((answering(random), True), (together(random), False)):
        base = model(RECORDED[0]["state"], RECORDED[0]["questions"])
        moved = [
            max(abs(a - b) for a, b in zip(numbers(found[name]), numbers(base[name]), strict=True))
            for one in RECORDED[1:]
            for found in [model(one["state"], one["questions"])]
            for name in found.keys() & base.keys()
        ]
        assert (max(moved) < SAME) == holds
        assert holds or max(moved) > 0.05
