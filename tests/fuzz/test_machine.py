"""A short run of the machine, the same every time; tests/fuzz/run.py runs it for longer."""

from __future__ import annotations

from typing import Any

import pytest
from controls import CONTROLS, examples_until_found
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from ledger import Ledger
from machine import ModelMachine

EXAMPLES = {"torch": 8, "dense": 4, "jax": 2}


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("engine", EXAMPLES)
def test_scores_are_the_unpatched_models_whatever_happens(engine: str) -> None:
    ledger = Ledger()
    machine: Any = type("Machine", (ModelMachine,), {"engine": engine, "ledger": ledger})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES[engine],
            stateful_step_count=15,
            derandomize=True,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert ledger.scores > 100


@pytest.mark.long
@pytest.mark.parametrize("name", CONTROLS)
def test_a_mend_that_is_taken_out_is_missed(name: str) -> None:
    _, fault = examples_until_found(name)
    assert fault is not None
