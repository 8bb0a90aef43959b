"""How often a kernel in interpret mode passes each place of its code that calls a function."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import pytest


class Executions:
    """Counts while it is in place; `runs` has a number for each place, as they were traced.

    Args:
      patch: puts the function back.
      name: the function.
      modules: whose global it is.
    """

    def __init__(self, patch: pytest.MonkeyPatch, name: str, *modules: ModuleType) -> None:
        self._runs: list[int] = []
        assert modules
        for module in modules:
            patch.setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def traced(*args: Any, **options: Any) -> Any:
            place = len(self._runs)
            self._runs.append(0)
            jax.debug.callback(lambda: self._add(place))
            return function(*args, **options)

        return traced

    def _add(self, place: int) -> None:
        self._runs[place] += 1

    def take(self) -> list[int]:
        """The runs of each place since the last time."""
        jax.effects_barrier()
        found = list(self._runs)
        self._runs[:] = [0] * len(found)
        return found
