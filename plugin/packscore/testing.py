"""For your own tests: one line that fails where packed scores are not the model's.

In `conftest.py`:

    pytest_plugins = ["packscore.testing"]

and in a test:

    def test_my_reranker_packs_exactly(assert_parity):
        assert_parity(model, tokenizer, my_samples, prompt="qwen3-reranker")

Needs pytest. Nothing is registered for projects that do not ask for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import pytest

from packscore.verify import ParityReport, verify_parity

P = ParamSpec("P")


def _checked(verify: Callable[P, ParityReport]) -> Callable[P, ParityReport]:
    @functools.wraps(verify)
    def check(*args: P.args, **kwargs: P.kwargs) -> ParityReport:
        report = verify(*args, **kwargs)
        if not report.passed:
            raise AssertionError(f"packed scores are not verified\n{report.table()}")
        return report

    return check


# `verify_parity` that raises AssertionError, with the table, unless the verdict is "equal"
check_parity = _checked(verify_parity)


@pytest.fixture
def assert_parity() -> Callable[..., ParityReport]:
    """`check_parity` as a fixture."""
    return check_parity
