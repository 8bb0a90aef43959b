"""Hooks inside the decoder: those that look cost nothing, those that mix tokens mix no items."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from helpers import LABELS, one_by_one, random_ids, random_qwen3
from packscore import MultiItemScorer, StalePrefixError, patch_model

PREFIX = random_ids(20, seed=1)
ITEMS = [random_ids(n, 300, seed=k) for k, n in enumerate((5, 6, 1, 0, 9, 3))]


def mean_over_the_sequence(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
    return out + out.mean(1, keepdim=True)


def last_token_in_place(_: Any, __: Any, out: torch.Tensor) -> None:
    out[:, -1] += 0.3


def last_token_of_the_input(_: Any, given: Any) -> None:
    given[0][:, -1] *= 1.5


def reversed_input(_: Any, given: Any) -> Any:
    return (given[0].flip(1), *given[1:])


def first_token_by_keyword(_: Any, given: Any, named: Any) -> Any:
    named["hidden_states"][:, 0] += 0.3


MIXING = {
    "mean": lambda model: model.model.layers[0].mlp.register_forward_hook(mean_over_the_sequence),
    "in place": lambda model: model.model.layers[1].register_forward_hook(last_token_in_place),
    "input": lambda model: model.model.layers[1].register_forward_pre_hook(last_token_of_the_input),
    "reversed": lambda model: model.model.norm.register_forward_pre_hook(reversed_input),
    "keyword": lambda model: model.model.layers[0].self_attn.register_forward_pre_hook(
        first_token_by_keyword, with_kwargs=True
    ),
    "of the embedding": lambda model: model.model.embed_tokens.register_forward_hook(
        mean_over_the_sequence
    ),
}


@pytest.mark.parametrize("mask_impl", ["segment", "dense"])
@pytest.mark.parametrize("kind", [*MIXING])
@pytest.mark.parametrize("keep", [True, False], ids=["pages kept", "no pages"])
def test_a_hook_that_mixes_tokens_gets_each_item_alone(
    kind: str, mask_impl: Any, keep: bool
) -> None:
    model = patch_model(random_qwen3(tied=False))
    scorer = MultiItemScorer(model, label_token_ids=LABELS, mask_impl=mask_impl)
    before = torch.tensor(scorer.score(PREFIX, ITEMS))
    if not keep:
        scorer.clear_prefixes()
    hook = MIXING[kind](model)
    expected = one_by_one(copy.deepcopy(model), PREFIX, ITEMS, LABELS)
    assert (expected - before).abs().max() > 1e-3
    for flow in (None, "packed"):
        found = torch.tensor(scorer.score(PREFIX, ITEMS, flow=flow))
        assert (found - expected).abs().max() <= 1e-5
    many = scorer.score_many([(PREFIX, ITEMS), (PREFIX[:9], ITEMS), (PREFIX, ITEMS)])
    assert (torch.tensor(many[2]) - expected).abs().max() <= 1e-5
    rows = list(scorer.score_stream(PREFIX, ITEMS, max_items=2))
    assert (torch.tensor(rows) - expected).abs().max() <= 1e-5
    if mask_impl == "segment":
        with scorer.prefix(PREFIX) as held:
            assert (torch.tensor(held.score(ITEMS)) - expected).abs().max() <= 1e-5
    hook.remove()
    again = scorer.score(PREFIX, ITEMS, return_usage=True)
    assert (torch.tensor(again.scores) - before).abs().max() <= 1e-5
    assert again.usage.flow == "packed"


def test_a_hook_that_begins_to_mix_makes_what_is_held_stale() -> None:
    model = patch_model(random_qwen3(tied=False))
    scorer = MultiItemScorer(model, label_token_ids=[5])
    is_on = False
    model.model.layers[0].register_forward_hook(
        lambda _, __, out: mean_over_the_sequence(_, __, out) if is_on else None
    )
    with scorer.prefix(PREFIX) as held:
        assert held.score(ITEMS, return_usage=True).usage.flow == "extend"
        is_on = True
        with pytest.raises(StalePrefixError):
            held.score(ITEMS)
    expected = one_by_one(copy.deepcopy(model), PREFIX, ITEMS, [5])
    with scorer.prefix(PREFIX) as held:
        assert (torch.tensor(held.score(ITEMS)) - expected).abs().max() <= 1e-5


def test_labels_of_several_tokens_behind_a_hook_that_mixes() -> None:
    model = patch_model(random_qwen3(tied=False))
    scorer = MultiItemScorer(model, label_token_ids=[[5, 6], [17]])
    MIXING["mean"](model)
    scores = torch.tensor(scorer.score(PREFIX, ITEMS))
    first = one_by_one(copy.deepcopy(model), PREFIX, ITEMS, [5, 17])
    second = one_by_one(copy.deepcopy(model), PREFIX, [[*item, 5] for item in ITEMS], [6])
    assert (scores[:, 1] - first[:, 1]).abs().max() <= 1e-5
    assert (scores[:, 0] - first[:, 0] * second[:, 0]).abs().max() <= 1e-5


@pytest.mark.parametrize("mask_impl", ["segment", "dense"])
def test_hooks_that_only_look_cost_no_packing(mask_impl: Any) -> None:
    model = patch_model(random_qwen3(tied=False))
    scorer = MultiItemScorer(model, label_token_ids=LABELS, mask_impl=mask_impl)
    seen: list[int] = []

    def count(_: Any, given: Any, out: Any = None) -> Any:
        seen.append(given[0].shape[1])
        return out  # the same, or None

    for layer in model.model.layers:
        layer.register_forward_hook(count)
        layer.register_forward_pre_hook(count)
    found = scorer.score(PREFIX, ITEMS, return_usage=True)
    assert found.usage.flow == "packed"
    assert seen == 4 * [found.usage.computed_tokens]
    assert all(len(layer._forward_hooks) == 1 for layer in model.model.layers)
