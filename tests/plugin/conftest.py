"""Fixtures of the plugin's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def quick_programs() -> Iterator[None]:
    """Programs compiled without LLVM's optimisations, which are two thirds of the work.

    What they compute is the same; test_program.py runs programs as they ship.
    """
    import jax

    compile_lowered = jax.stages.Lowered.compile

    def quickly(lowered: Any) -> Any:
        return compile_lowered(lowered, compiler_options={"xla_backend_optimization_level": 0})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", quickly)
        yield
