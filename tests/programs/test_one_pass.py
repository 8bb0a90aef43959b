"""Programs on a CPU that multiplies as a TPU does: what asks for no precision gets one pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax._src.interpreters import mlir
from transformers import PreTrainedModel

from helpers import LABELS, FrozenCase, one_by_one, random_decoder, random_ids
from packscore import MultiItemScorer, patch_model
from packscore.programs import compiling
from tolerances import PROBABILITY_MAX_FLOAT32

pytestmark = pytest.mark.usefixtures("quick_programs", "one_pass")

PREFIX, ITEMS = random_ids(60, seed=1), [random_ids(n, seed=n) for n in (5, 40, 1, 0, 9)]
HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


@pytest.fixture
def one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands of float32 products keep bfloat16's bits where the highest is not asked for."""
    rules, dot = mlir._platform_specific_lowerings["cpu"], jax.lax.dot_general_p
    own: Any = rules[dot]

    def rounded(x: jax.Array, y: jax.Array, **params: Any) -> jax.Array:
        x, y = (jax.lax.reduce_precision(z, exponent_bits=8, mantissa_bits=7) for z in (x, y))
        return dot.bind(x, y, **{**params, "precision": HIGHEST})

    def lowered(context: Any, *operands: Any, **params: Any) -> Any:
        in_float32 = all(x.dtype == np.float32 for x in context.avals_in)
        if in_float32 and params["precision"] != HIGHEST:
            return mlir.lower_fun(rounded, multiple_results=False)(context, *operands, **params)
        return own.rule(context, *operands, **params)

    monkeypatch.setitem(rules, dot, replace(own, rule=lowered))


@contextmanager
def no_word_of_precision(mesh: jax.sharding.AbstractMesh) -> Iterator[None]:
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def error(model: PreTrainedModel, prefix: list[int], items: list[list[int]], labels: Any) -> float:
    expected = one_by_one(model, prefix, items, labels)
    scores = MultiItemScorer(patch_model(model, device="jax"), label_token_ids=labels).score(
        prefix, items
    )
    return float((torch.tensor(scores) - expected).abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_float32_is_exact(family: str) -> None:
    assert error(random_decoder(family), PREFIX, ITEMS, LABELS) <= PROBABILITY_MAX_FLOAT32


def test_float32_of_the_shipped_model_is_exact(fresh: PreTrainedModel, case: FrozenCase) -> None:
    assert error(fresh, case.prefix, case.items, case.labels) <= PROBABILITY_MAX_FLOAT32


def test_with_no_word_of_precision_it_is_not(
    fresh: PreTrainedModel, case: FrozenCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "tracing_on", no_word_of_precision)
    for found in (
        error(random_decoder("llama"), PREFIX, ITEMS, LABELS),
        error(fresh, case.prefix, case.items, case.labels),
    ):
        assert found > 20 * PROBABILITY_MAX_FLOAT32
