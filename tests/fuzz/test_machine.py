"""A short run of the machine, the same every time; tests/fuzz/run.py runs it for longer."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from machine import ModelMachine

EXAMPLES = {"torch": 20, "dense": 6, "jax": 3}


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("engine", EXAMPLES)
def test_scores_are_the_unpatched_models_whatever_happens(engine: str) -> None:
    machine = type("Machine", (ModelMachine,), {"engine": engine})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES[engine],
            stateful_step_count=20,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
