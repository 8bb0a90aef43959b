"""No item sees another: poison, permutation, mutation; plain causal attention is the control."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from helpers import LABELS, random_ids, random_qwen3
from packscore import MultiItemScorer, patch_model
from packscore.flows.packing import Share, pack
from packscore.torch_engine.attention import SegmentPlan
from packscore_kernels import SegmentLayout
from tolerances import PROBABILITY_REORDERED

PREFIX = random_ids(33, 300, seed=1)
ITEMS = [random_ids(n, 300, seed=k) for k, n in enumerate((40, 3, 17, 17, 0, 65, 1))]
POISON = range(300, 300 + len(ITEMS))  # tokens that only the tests' other items use, one each

Score = Callable[[list[list[int]]], np.ndarray]


def scores_of(model: PreTrainedModel, mask_impl: str) -> Score:
    # no pages: the control would leave causal keys in them
    scorer = MultiItemScorer(
        model, mask_impl=mask_impl, prefix_cache_bytes=0, on_non_finite="report"
    )
    return lambda items: np.array(scorer.score(PREFIX, items, label_token_ids=LABELS))


@pytest.fixture
def model() -> PreTrainedModel:
    # untied: poison in the embedding must not be in the head as well
    return patch_model(random_qwen3(num_layers=3, tied=False))


@contextmanager
def plain_causal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packed tokens under plain causal attention, as a packing without the segment rule has."""

    def one_sequence(layout: SegmentLayout, *args: object) -> SegmentPlan:
        return build(SegmentLayout.single(layout.num_tokens, []))

    build = SegmentPlan.build
    with monkeypatch.context() as patch:
        patch.setattr(SegmentPlan, "build", one_sequence)
        yield


def poison_reaches_a_score(model: PreTrainedModel, score: Score) -> bool:
    clean = score(ITEMS)
    with torch.no_grad():
        model.get_input_embeddings().weight[list(POISON)] = torch.nan
    for kept in range(len(ITEMS)):
        items = [ids if k == kept else [POISON[k]] * len(ids) for k, ids in enumerate(ITEMS)]
        if not np.array_equal(score(items)[kept], clean[kept]):
            return True
    return False


def permutation_changes_a_score(score: Score) -> bool:
    order = np.arange(len(ITEMS))[::-1]
    permuted = score([ITEMS[k] for k in order])
    return bool(np.abs(permuted - score(ITEMS)[order]).max() > PROBABILITY_REORDERED)


def mutation_reaches_another_score(score: Score) -> bool:
    before = score(ITEMS)
    for changed, ids in enumerate(ITEMS):
        if not ids:
            continue
        mutated = [
            random_ids(len(ids), 300, seed=99) if k == changed else x for k, x in enumerate(ITEMS)
        ]
        after = score(mutated)
        assert not np.array_equal(after[changed], before[changed])
        others = [k for k in range(len(ITEMS)) if k != changed]
        if not np.array_equal(after[others], before[others]):  # bit for bit
            return True
    return False


def test_nan_in_other_items_reaches_no_score(model: PreTrainedModel) -> None:
    # the dense mask adds to scores, and zero times NaN is NaN: poison is a test of segment alone
    assert not poison_reaches_a_score(model, scores_of(model, "segment"))


@pytest.mark.parametrize("mask_impl", ["segment", "dense"])
def test_permuted_items_have_permuted_scores(model: PreTrainedModel, mask_impl: str) -> None:
    assert not permutation_changes_a_score(scores_of(model, mask_impl))


@pytest.mark.parametrize("mask_impl", ["segment", "dense"])
def test_a_changed_item_leaves_the_others_bit_identical(
    model: PreTrainedModel, mask_impl: str
) -> None:
    assert not mutation_reaches_another_score(scores_of(model, mask_impl))


def test_a_changed_query_changes_every_score(model: PreTrainedModel) -> None:
    before = scores_of(model, "segment")(ITEMS)
    scorer = MultiItemScorer(model)
    after = np.array(scorer.score([*PREFIX[:5], 7, *PREFIX[6:]], ITEMS, label_token_ids=LABELS))
    assert (after != before).any(axis=1).all()


def test_control_plain_causal_attention_fails_each_of_these(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = scores_of(model, "segment")
    with plain_causal(monkeypatch):
        assert permutation_changes_a_score(score)
        assert mutation_reaches_another_score(score)
        assert poison_reaches_a_score(model, score)


def test_control_is_not_the_path_under_test() -> None:
    prefix, item, index = np.zeros(1, np.int64), np.ones(2, np.int64), np.arange(2)
    assert pack([Share(0, prefix, [item], index[:1])]).is_causal
    two = pack([Share(0, prefix, [item, item], index)])
    assert not two.is_causal
    assert len(SegmentPlan.build(two.layout).parts) == 1
