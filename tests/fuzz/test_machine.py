"""A short run of the machine, the same every time; tests/fuzz/run.py runs it for longer."""

from __future__ import annotations

import pytest
from controls import CONTROLS, examples_until_found
from drive import drive
from ledger import Ledger

EXAMPLES = {"torch": 8, "dense": 4, "jax": 2}


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("engine", EXAMPLES)
def test_scores_are_the_unpatched_models_whatever_happens(engine: str) -> None:
    ledger = Ledger()
    drive(
        engine,
        ledger,
        max_examples=EXAMPLES[engine],
        stateful_step_count=15,
        derandomize=True,
    )
    assert ledger.scores > 100


@pytest.mark.long
@pytest.mark.parametrize("name", CONTROLS)
def test_a_mend_that_is_taken_out_is_missed(name: str) -> None:
    _, fault = examples_until_found(name)
    assert fault is not None
