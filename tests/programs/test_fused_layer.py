"""The layer that runs on a TPU, interpreted: scores equal the unpatched model's, one by one."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

from helpers import LABELS, one_by_one, random_decoder, random_ids, random_qwen3
from packscore import MultiItemScorer, patch_model, program_of
from packscore.programs import fused_layer
from tolerances import (
    PROBABILITY_MAX_BFLOAT16,
    PROBABILITY_MAX_FLOAT32,
    PROBABILITY_MEAN_BFLOAT16,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

KERNELS = {"project_qkv", "project_out", "gated_mlp"}
PREFIX, ITEMS = random_ids(150, seed=1), [random_ids(n, seed=n) for n in (5, 40, 1, 0, 9)]


SIZES = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "hidden_size": 128}


def model_of(dtype: torch.dtype) -> PreTrainedModel:
    return random_qwen3(**SIZES, intermediate_size=512).to(dtype)


def interpreted(model: PreTrainedModel) -> MultiItemScorer:
    scorer = MultiItemScorer(patch_model(model, device="jax"), label_token_ids=LABELS)
    program: Any = program_of(model)
    program._executables.implementation = "pallas_interpret"
    return scorer


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)], ids=str
)
def test_packed_and_extend_equal_one_by_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(dtype)
    expected = one_by_one(model, PREFIX, ITEMS, LABELS)
    traced = set()

    def watch(name: str) -> None:
        own = getattr(fused_layer, name)
        watched = functools.wraps(own)(lambda *args, **kw: (traced.add(name), own(*args, **kw))[1])
        monkeypatch.setattr(fused_layer, name, watched)

    for name in KERNELS:
        watch(name)
    scorer = interpreted(model)
    for flow in ("packed", "extend"):
        found = scorer.score(PREFIX, ITEMS, return_usage=True)
        assert found.usage.flow == flow
        error = np.abs(np.array(found.scores) - expected.numpy())
        if dtype == torch.float32:
            assert error.max() <= PROBABILITY_MAX_FLOAT32
        else:
            assert error.max() <= PROBABILITY_MAX_BFLOAT16
            assert error.mean() <= PROBABILITY_MEAN_BFLOAT16
    assert traced == KERNELS  # they were in the programs


def test_other_layers_stay_as_they_are() -> None:
    layer = model_of(torch.float32).model.layers[0]
    assert fused_layer.can_fuse(layer, "pallas", 2)
    assert not fused_layer.can_fuse(layer, "xla", 2)
    assert not fused_layer.can_fuse(
        random_qwen3(head_dim=64, hidden_size=128).model.layers[0], "pallas", 2
    )


def test_other_mlps_stay_as_they_are() -> None:
    mlp = model_of(torch.float32).model.layers[0].mlp
    assert fused_layer.can_fuse_mlp(mlp, 4)
    dense = Qwen3MoeMLP(Qwen3MoeConfig(hidden_size=128), intermediate_size=512)
    assert fused_layer.can_fuse_mlp(dense, 4)
    # a width that no pass divides, another activation, another module
    narrow = random_qwen3(**SIZES, intermediate_size=320).model.layers[0].mlp
    assert not fused_layer.can_fuse_mlp(narrow, 4)
    other = random_qwen3(**SIZES, intermediate_size=512, hidden_act="gelu").model.layers[0].mlp
    assert not fused_layer.can_fuse_mlp(other, 4)
    assert not fused_layer.can_fuse_mlp(torch.nn.Identity(), 4)


def test_a_layer_with_another_mlp_is_exact() -> None:
    model = random_qwen3(**SIZES, intermediate_size=320)
    expected = one_by_one(model, PREFIX, ITEMS, LABELS)
    found = interpreted(model).score(PREFIX, ITEMS)
    assert np.abs(np.array(found) - expected.numpy()).max() <= PROBABILITY_MAX_FLOAT32


@pytest.mark.long
def test_a_mixture_is_exact() -> None:
    """Its attention and its experts through kernels."""
    sizes = {"head_dim": 128, "hidden_size": 128, "num_attention_heads": 2}
    mixture = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    options = {**sizes, **mixture, "num_key_value_heads": 1, "norm_topk_prob": True}
    model = random_decoder("qwen3_moe", **options)
    expected = one_by_one(model, PREFIX, ITEMS, LABELS)
    scorer = interpreted(model)
    for _ in ("packed", "extend"):
        found = scorer.score(PREFIX, ITEMS)
        assert np.abs(np.array(found) - expected.numpy()).max() <= PROBABILITY_MAX_FLOAT32
