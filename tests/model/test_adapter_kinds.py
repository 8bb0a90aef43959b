"""Adapters that act on one token's vector are scored exactly; others are refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PolyConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)

from helpers import LABELS, one_by_one, random_decoder, random_ids, random_qwen3
from packscore import MultiItemScorer, UnsupportedModelError, patch_model, unpatch_model
from tolerances import PROBABILITY_MAX_FLOAT32

PREFIX = random_ids(20, seed=1)
ITEMS = [random_ids(n, 300, seed=k) for k, n in enumerate((5, 6, 1, 0, 9, 3))]
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
ACT_ON_A_TOKEN = {
    "lora": LoraConfig(**TARGETS),
    "dora": LoraConfig(use_dora=True, **TARGETS),
    "rslora": LoraConfig(use_rslora=True, **TARGETS),
    "lora-on-the-head": LoraConfig(target_modules=["v_proj", "lm_head"]),
    "lora-and-a-saved-head": LoraConfig(modules_to_save=["lm_head"], **TARGETS),
    "trained-tokens": LoraConfig(trainable_token_indices=[1, 2, 3], **TARGETS),
    "adalora": AdaLoraConfig(total_step=10, **TARGETS),
    "ia3": IA3Config(feedforward_modules=["down_proj"], **TARGETS),
    "loha": LoHaConfig(**TARGETS),
    "lokr": LoKrConfig(**TARGETS),
    "oft": OFTConfig(oft_block_size=4, r=0, **TARGETS),
    "hra": HRAConfig(**TARGETS),
    "vera": VeraConfig(target_modules=["q_proj"]),
    "layer-norms": LNTuningConfig(target_modules=["input_layernorm"]),
}


def shaken(model: Any) -> Any:
    """Trainable weights that change the scores, as training would leave them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("name", ACT_ON_A_TOKEN)
def test_adapters_that_act_on_one_token(name: str) -> None:
    base = random_qwen3(tied=False)
    plain = one_by_one(base, PREFIX, ITEMS, LABELS)
    model = shaken(get_peft_model(base, copy.deepcopy(ACT_ON_A_TOKEN[name])))
    scorer = MultiItemScorer(patch_model(model), label_token_ids=LABELS)
    found = [torch.tensor(scorer.score(PREFIX, ITEMS)) for _ in range(2)]
    expected = one_by_one(unpatch_model(model), PREFIX, ITEMS, LABELS)
    assert (expected - plain).abs().max() > 1e-4, "the adapter does nothing"
    for scores in found:
        assert (scores - expected).abs().max() <= PROBABILITY_MAX_FLOAT32


def test_replicated_layers() -> None:
    """They share weights, and the numbers they bear, but not their pages."""
    replicating = LoraConfig(layer_replication=[[0, 2], [0, 2]], **TARGETS)
    model = shaken(get_peft_model(random_decoder("llama"), replicating))
    scorer = MultiItemScorer(patch_model(model), label_token_ids=LABELS)
    found = [torch.tensor(scorer.score(PREFIX, ITEMS)) for _ in range(2)]
    expected = one_by_one(unpatch_model(model), PREFIX, ITEMS, LABELS)
    for scores in found:
        assert (scores - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    qwen3 = get_peft_model(random_qwen3(), replicating)
    with pytest.raises(UnsupportedModelError, match="layer_types names 2 of num_hidden_layers=4"):
        patch_model(qwen3)


REFUSED = {
    "activated-lora": (LoraConfig(alora_invocation_tokens=[1, 2], **TARGETS), "ALoraLinearVariant"),
    "poly": (PolyConfig(**TARGETS), "peft.tuners.poly"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused(name: str) -> None:
    config, says = REFUSED[name]
    model = get_peft_model(random_qwen3(tied=False), config)
    with pytest.raises(UnsupportedModelError, match=says):
        patch_model(model)
    assert "packscore" not in model.config._attn_implementation


def test_an_adapter_that_comes_later_is_looked_at_too() -> None:
    """Put into the model itself, without PEFT's wrapper around it."""
    model = patch_model(random_qwen3(tied=False))
    scorer = MultiItemScorer(model, label_token_ids=LABELS)
    scorer.score(PREFIX, ITEMS)
    lora = LoraConfig(init_lora_weights=False, **TARGETS)
    shaken(inject_adapter_in_model(lora, model))
    expected = one_by_one(unpatch_model(copy.deepcopy(model)), PREFIX, ITEMS, LABELS)
    scores = torch.tensor(scorer.score(PREFIX, ITEMS))
    assert (scores - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    activated, says = REFUSED["activated-lora"]
    inject_adapter_in_model(activated, model, adapter_name="other")
    with pytest.raises(UnsupportedModelError, match=says):
        scorer.score(PREFIX, ITEMS)
