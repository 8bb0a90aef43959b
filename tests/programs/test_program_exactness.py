"""The torch path's table of shapes on compiled programs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from helpers import logits_one_by_one, probabilities
from packscore import MultiItemScorer, patch_model
from parity import CASES, CONFIGS, cells, make_case, make_model
from tolerances import PROBABILITY_MAX_FLOAT32

pytestmark = pytest.mark.usefixtures("quick_programs")

# Every case on one shape of each group size; the other shapes on the two cases with most to them.
WHOLE_TABLE = (0, 3, 6)
FULLEST = ("P0-N50-mixed", "P17-N50-mixed")
TABLE = cells(
    (row, name)
    for row in range(len(CONFIGS))
    for name in (CASES if row in WHOLE_TABLE else FULLEST)
)


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """(a model with programs, its unpatched copy)."""
    model: Any = make_model(CONFIGS[request.param])
    reference = copy.deepcopy(model)
    return patch_model(model, device="jax"), reference


@pytest.mark.parametrize(("served", "name"), TABLE, indirect=["served"])
def test_programs_equal_one_by_one(served: tuple[Any, Any], name: str) -> None:
    model, reference = served
    case = make_case(*CASES[name])
    logits = logits_one_by_one(reference, case.prefix, case.items)
    scores = MultiItemScorer(model).score(case.prefix, case.items, label_token_ids=case.labels)
    difference = torch.tensor(scores) - probabilities(logits, case.labels, False)
    assert difference.abs().max() <= PROBABILITY_MAX_FLOAT32
