"""LoRA adapters: active, switched, disabled, merged; on layers, vocabularies and classes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from helpers import LABELS, one_by_one, random_classifier, random_ids, random_qwen3
from packscore import (
    MultiItemScorer,
    StalePrefixError,
    UnsupportedModelError,
    patch_model,
    shipped_model_path,
)
from tolerances import PROBABILITY_MAX_FLOAT32

pytestmark = pytest.mark.usefixtures("quick_programs")

DEVICES = [None, "jax"]
PREFIX = [1 + id_ % 300 for id_ in random_ids(140, seed=1)]  # 0 is a classifier's padding
ITEMS = [[1 + id_ % 300 for id_ in random_ids(n, seed=n)] for n in (5, 60, 1, 0, 9)]
CONFIGS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear", "lora_alpha": 16},
    "lm-head": {"target_modules": ["k_proj", "lm_head"]},
    "lm-head-saved": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "up_proj"]},
    "rank-pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
}


def adapter(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "init_lora_weights": False, **options})


def adapted(name: str = "attention", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    wrapped = get_peft_model(random_qwen3(tied=False), adapter(**CONFIGS[name])).eval()
    for parameter_name, parameter in wrapped.named_parameters():
        if "modules_to_save" in parameter_name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return wrapped


def expected_scores(model: Any) -> torch.Tensor:
    return one_by_one(model, PREFIX, ITEMS, LABELS)


def assert_scores(scorer: MultiItemScorer, expected: torch.Tensor) -> None:
    found = torch.tensor(scorer.score(PREFIX, ITEMS, label_token_ids=LABELS))
    assert (found - expected).abs().max() <= PROBABILITY_MAX_FLOAT32


@pytest.mark.parametrize("name", CONFIGS)
def test_an_active_adapter(name: str) -> None:
    wrapped = adapted(name)
    expected, plain = expected_scores(wrapped), expected_scores(random_qwen3(tied=False))
    assert (expected - plain).abs().max() > 100 * PROBABILITY_MAX_FLOAT32
    scorer = MultiItemScorer(patch_model(wrapped))
    assert_scores(scorer, expected)
    with wrapped.disable_adapter():
        assert_scores(scorer, plain)
    assert_scores(scorer, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_adapter(name: str, device: str | None) -> None:
    wrapped = adapted(name)
    expected = expected_scores(wrapped)
    merged = wrapped.merge_and_unload()
    assert_scores(MultiItemScorer(patch_model(merged, device=device)), expected)


def test_an_adapter_merged_in_place_and_back() -> None:
    wrapped = patch_model(adapted())
    expected, scorer = expected_scores(copy.deepcopy(wrapped)), MultiItemScorer(wrapped)
    for change in (wrapped.merge_adapter, wrapped.unmerge_adapter):
        scorer.score(PREFIX, ITEMS[:1], label_token_ids=LABELS)
        change()
        result = scorer.score(PREFIX, ITEMS, label_token_ids=LABELS, return_usage=True)
        assert (torch.tensor(result.scores) - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
        # the sums are others now, in their last bits
        assert result.usage.computed_prefix_tokens == len(PREFIX)


def test_switching_adapters_between_calls() -> None:
    """Scores follow, and what another adapter computed is neither used nor held."""
    wrapped = adapted()
    torch.manual_seed(7)
    wrapped.add_adapter("other", adapter(target_modules=["q_proj", "v_proj"]))
    expected = {}
    for name in ("default", "other"):
        wrapped.set_adapter(name)
        expected[name] = expected_scores(wrapped)
    assert (expected["default"] - expected["other"]).abs().max() > 1e-3
    scorer = MultiItemScorer(patch_model(wrapped))
    for name in ("default", "other", "default"):
        wrapped.set_adapter(name)
        result = scorer.score(PREFIX, ITEMS, label_token_ids=LABELS, return_usage=True)
        difference = torch.tensor(result.scores) - expected[name]
        assert difference.abs().max() <= PROBABILITY_MAX_FLOAT32
        assert result.usage.computed_prefix_tokens == len(PREFIX)
        again = scorer.score(PREFIX, ITEMS[:2], label_token_ids=LABELS, return_usage=True)
        assert again.usage.computed_prefix_tokens == 0
    held = scorer.prefix(PREFIX)
    with wrapped.disable_adapter(), pytest.raises(StalePrefixError, match="with other weights"):
        held.score(ITEMS, label_token_ids=LABELS)


def test_labels_of_several_tokens_with_an_adapter() -> None:
    labels = [[5, 17], [300, 2]]
    wrapped = adapted("all-linear")
    rows = [
        [one_by_one(wrapped, [*PREFIX, *item], [[], label[:1]], label).diag() for label in labels]
        for item in ITEMS
    ]
    expected = torch.tensor([[float(steps.prod()) for steps in row] for row in rows])
    scorer = MultiItemScorer(patch_model(wrapped), label_token_ids=labels)
    with wrapped.disable_adapter():
        other = torch.tensor(scorer.score(PREFIX, ITEMS, apply_softmax=True))
    found = torch.tensor(scorer.score(PREFIX, ITEMS, apply_softmax=True))
    expected = expected / expected.sum(-1, keepdim=True)
    assert (found - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    assert (other - expected).abs().max() > 100 * PROBABILITY_MAX_FLOAT32


@pytest.mark.jax
@pytest.mark.parametrize("merge_in_place", [False, True])
def test_programs_refuse_an_adapter_that_is_there(merge_in_place: bool) -> None:
    wrapped = adapted()
    if merge_in_place:
        wrapped.merge_adapter()
    with pytest.raises(UnsupportedModelError, match=r"q_proj.*merge adapters \(merge_and_unload"):
        patch_model(wrapped, device="jax")


def class_scores(model: Any) -> torch.Tensor:
    with torch.no_grad():
        rows = [model(torch.tensor([[*PREFIX, *item]])).logits for item in ITEMS]
    return torch.cat(rows).softmax(-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [{"task_type": "SEQ_CLS"}, {"target_modules": ["q_proj", "score"]}],
    ids=["score-saved", "score-lora"],
)
def test_an_adapter_on_the_classes(options: dict[str, Any], device: str | None) -> None:
    torch.manual_seed(0)
    wrapped = get_peft_model(random_classifier(num_labels=3), adapter(**options)).eval()
    for name, parameter in wrapped.named_parameters():
        if "score.modules_to_save" in name:
            parameter.data.neg_()
    expected = class_scores(wrapped)
    assert (expected - class_scores(random_classifier(num_labels=3))).abs().max() > 0.01
    model = wrapped if device is None else wrapped.merge_and_unload()
    found = MultiItemScorer(patch_model(model, device=device)).score(PREFIX, ITEMS)
    assert (torch.tensor(found) - expected).abs().max() <= PROBABILITY_MAX_FLOAT32


def load_classifier_without_head() -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        shipped_model_path(), num_labels=2, dtype=torch.float32
    ).eval()


def test_an_adapters_copy_of_a_head_that_loading_drew(tmp_path: Path) -> None:
    """PEFT copies the head beside the adapter: random until it is trained or loaded."""
    config = adapter(task_type="SEQ_CLS")
    wrapped = get_peft_model(load_classifier_without_head(), config).eval()
    message = r"the checkpoint has no score\.weight, so the head of this Qwen3ForSequenceClass"
    with pytest.raises(UnsupportedModelError, match=message):
        MultiItemScorer(patch_model(wrapped))
    with torch.no_grad():
        wrapped.base_model.model.score.weight.add_(0.1 * torch.randn(2, 128))
    trained = MultiItemScorer(wrapped).score([1], [[2], [3]])
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_classifier_without_head(), tmp_path).eval()
    again = MultiItemScorer(patch_model(loaded)).score([1], [[2], [3]])
    assert torch.allclose(torch.tensor(again), torch.tensor(trained), atol=PROBABILITY_MAX_FLOAT32)
