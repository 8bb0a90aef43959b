"""A mixture's experts as grouped products, against one token after the other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from packscore_kernels.layer.experts import columns_of_step, grouped_experts

LAYERS, EXPERTS, CHOSEN, HIDDEN, COLUMNS = 3, 5, 2, 128, 64
RNG = np.random.default_rng(0)
GATE_UP = RNG.standard_normal((LAYERS, EXPERTS, 2 * COLUMNS, HIDDEN)) * 0.1
DOWN = RNG.standard_normal((LAYERS, EXPERTS, HIDDEN, COLUMNS)) * 0.1
NUM_TOKENS = 40  # in rows of two choices: no tile of them is whole


def one_by_one(hidden: np.ndarray, index: np.ndarray, shares: np.ndarray, layer: int) -> np.ndarray:
    out = np.zeros(hidden.shape)
    for row, (x, chosen, own) in enumerate(zip(hidden, index, shares, strict=True)):
        for expert, share in zip(chosen, own, strict=True):
            gate, up = np.split(GATE_UP[layer, expert] @ x, 2)
            out[row] += share * (DOWN[layer, expert] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@pytest.fixture(scope="module")
def experts() -> Any:
    @jax.jit
    def run(hidden: Any, index: Any, shares: Any, layer: Any, count: Any) -> jax.Array:
        stacks = (jnp.asarray(x, jnp.float32) for x in (GATE_UP, DOWN))
        return grouped_experts(
            *(hidden, index, shares, *stacks, layer, jax.nn.silu, count, pltpu.InterpretParams())
        )

    return run


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("count", [0, 1, 17, NUM_TOKENS])
def test_rows_that_are_no_tokens_meet_no_expert(experts: Any, count: int, layer: int) -> None:
    """They are NaN, and choose what they like; how many there are is data."""
    hidden = RNG.standard_normal((NUM_TOKENS, HIDDEN)).astype(np.float32)
    # expert 3 is nobody's
    index = RNG.choice([0, 1, 2, 4], (NUM_TOKENS, CHOSEN))
    shares = RNG.random((NUM_TOKENS, CHOSEN)).astype(np.float32)
    want = one_by_one(hidden[:count], index[:count], shares[:count], layer)
    hidden[count:], shares[count:] = np.nan, np.nan
    found = np.asarray(experts(hidden, index, shares, layer, count))
    np.testing.assert_allclose(found[:count], want, rtol=1e-5, atol=1e-5)
    assert not found[count:].any()
    assert experts._cache_size() == 1


def test_steps_have_whole_registers_of_columns() -> None:
    assert columns_of_step(1536, 768) == 768
    assert columns_of_step(1536, 700) == 512
    assert columns_of_step(2048, 4096) == 2048
    assert columns_of_step(128, 1) == 128
    assert columns_of_step(96, 1) == 96
