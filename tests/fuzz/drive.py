"""Examples of the machine on one engine, with the settings that all its runs share."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from ledger import Ledger
from machine import ModelMachine


def drive(engine: str, ledger: Ledger, number: int | None = None, **options: Any) -> None:
    """Run examples until one fails.

    Args:
      engine: of every model.
      ledger: takes what was compared.
      number: the seed; None leaves it to hypothesis.
      **options: of hypothesis' settings, how many examples and steps among them.
    """
    machine: Any = type("Machine", (ModelMachine,), {"engine": engine, "ledger": ledger})
    chosen = settings(
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        **options,
    )
    seeded = machine if number is None else seed(number)(machine)
    run_state_machine_as_test(seeded, settings=chosen)
