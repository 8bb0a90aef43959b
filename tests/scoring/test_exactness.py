"""Packed scores equal the unpatched model's, one item at a time."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from helpers import (
    FAMILIES,
    LABELS,
    FrozenCase,
    logits_one_by_one,
    one_by_one,
    probabilities,
    random_decoder,
    random_qwen3,
)
from packscore import MultiItemScorer, patched
from parity import BOUNDARIES, CASES, CONFIG_IDS, CONFIGS, cells, make_case, make_model
from tolerances import (
    PROBABILITY_MAX_BFLOAT16,
    PROBABILITY_MAX_FLOAT32,
    PROBABILITY_MEAN_BFLOAT16,
)


def differences(model: PreTrainedModel, case: FrozenCase) -> list[torch.Tensor]:
    """|P(packed) - P(one by one)| for both masks, 1, 2 and 8 labels, over vocabulary and labels."""
    logits = logits_one_by_one(model, case.prefix, case.items)
    labels = case.labels
    calls = [("segment", 1, False), ("segment", 2, True), ("segment", 8, True)]
    calls += [("segment", 8, False), ("dense", 8, False)]
    found = []
    for mask_impl, count, softmax in calls:
        with patched(model):
            scores = MultiItemScorer(model, mask_impl=mask_impl).score(
                case.prefix,
                case.items,
                label_token_ids=labels[:count],
                apply_softmax=softmax,
            )
        assert len(scores) == len(case.items)
        found.append((torch.tensor(scores) - probabilities(logits, labels[:count], softmax)).abs())
    return found


@pytest.fixture(scope="module", params=range(len(CONFIGS)), ids=CONFIG_IDS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(CONFIGS[request.param])


def table(names: Iterable[str]) -> list[Any]:
    """Every model and case."""
    return cells(itertools.product(range(len(CONFIGS)), names))


@pytest.mark.parametrize(("model", "name"), table(CASES), indirect=["model"])
def test_float32_equals_one_by_one(model: PreTrainedModel, name: str) -> None:
    for difference in differences(model, make_case(*CASES[name])):
        assert difference.max() <= PROBABILITY_MAX_FLOAT32


@pytest.mark.parametrize(
    ("model", "name"),
    table(["P1-N50-equal", "P17-N50-mixed", "P300-N10-lengths-0-to-200"]),
    indirect=["model"],
)
def test_bfloat16_equals_one_by_one(model: PreTrainedModel, name: str) -> None:
    model = copy.deepcopy(model)
    # logits of N(0, 1): at N(0, 2), Hugging Face's own sdpa and eager are 0.02 apart in bfloat16
    model.lm_head.weight.data.mul_(0.5)
    for difference in differences(model.bfloat16(), make_case(*CASES[name])):
        assert difference.max() <= PROBABILITY_MAX_BFLOAT16
        assert difference.mean() <= PROBABILITY_MEAN_BFLOAT16


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, attention: str) -> None:
    model = random_decoder(family)
    model.set_attn_implementation(attention)
    for difference in differences(model, make_case(17, BOUNDARIES)):
        assert difference.max() <= PROBABILITY_MAX_FLOAT32


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "yarn", "factor": 4.0}, {"rope_type": "linear", "factor": 2.0}],
    ids=lambda r: r["rope_type"],
)
def test_static_rope_scaling(rope: dict[str, object]) -> None:
    options = {**rope, "rope_theta": 10_000.0, "original_max_position_embeddings": 64}
    if rope["rope_type"] == "linear":
        del options["original_max_position_embeddings"]
    model = random_qwen3(rope_parameters=options)
    for difference in differences(model, make_case(100, [5, 80, 33])):
        assert difference.max() <= PROBABILITY_MAX_FLOAT32


def test_the_reference_tells_items_apart(model: PreTrainedModel) -> None:
    case = make_case(*CASES["P17-N50-mixed"])
    scores = one_by_one(model, case.prefix, case.items, LABELS[:2], apply_softmax=True)
    assert scores[:, 0].std() > 0.1


def test_plain_causal_attention_is_wrong(model: PreTrainedModel) -> None:
    """The control: what packing without the segment rule would give."""
    case = make_case(*CASES["P17-N50-equal"])
    expected = one_by_one(model, case.prefix, case.items, LABELS)
    packed = torch.tensor([[*case.prefix, *itertools.chain(*case.items)]])
    ends = [len(case.prefix) + 12 * (k + 1) - 1 for k in range(50)]
    with torch.no_grad():
        causal = model(input_ids=packed).logits[0, ends].softmax(-1)[:, LABELS]
    assert (causal[0] - expected[0]).abs().max() <= PROBABILITY_MAX_FLOAT32
    assert (causal[1:] - expected[1:]).abs().amax(1).min() > 10 * PROBABILITY_MAX_FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shipped_model(fresh: PreTrainedModel, case: FrozenCase, dtype: torch.dtype) -> None:
    for difference in differences(fresh.to(dtype), case):
        if dtype == torch.float32:
            assert difference.max() <= PROBABILITY_MAX_FLOAT32
        else:
            assert difference.max() <= PROBABILITY_MAX_BFLOAT16
            assert difference.mean() <= PROBABILITY_MEAN_BFLOAT16


def test_item_first_equals_item_then_query(
    case: FrozenCase, shipped: PreTrainedModel, unpatched: PreTrainedModel
) -> None:
    result = MultiItemScorer(shipped).score(
        case.prefix,
        case.items,
        label_token_ids=case.labels,
        apply_softmax=True,
        item_first=True,
        return_usage=True,
    )
    expected = torch.cat(
        [
            one_by_one(unpatched, item, [case.prefix], case.labels, apply_softmax=True)
            for item in case.items
        ]
    )
    assert (torch.tensor(result.scores) - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    assert result.usage.flow == "plain"
    assert result.usage.prefix_tokens_saved == 0
