"""Equal items of a request are computed once: equal bits wherever they lie, counted in usage."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from helpers import (
    LABELS,
    engine_of,
    one_by_one,
    random_classifier,
    random_ids,
    random_qwen3,
)
from packscore import MultiItemScorer, patch_model
from packscore.flows.engine import Limits
from packscore.flows.packing import first_equal
from tolerances import PROBABILITY_MAX_FLOAT32

PREFIX = random_ids(70, seed=1)
DISTINCT = [random_ids(n, seed=k) for k, n in enumerate((5, 60, 1, 0, 9, 33))]
# each kind twice or more, far apart: also an empty one, and one of a single token
ORDER = [0, 1, 2, 3, 4, 5, 4, 3, 0, 2, 1, 1]
ITEMS = [DISTINCT[k] for k in ORDER]
DISTINCT_TOKENS = sum(map(len, DISTINCT))
DEVICES = [None, "jax"]


def scorer_on(device: str | None, **options: Any) -> MultiItemScorer:
    model = patch_model(random_qwen3(), device=device)
    return MultiItemScorer(model, **{"label_token_ids": LABELS, **options})


def check_equal_bits(rows: Any) -> None:
    for i, k in enumerate(ORDER):
        assert np.array_equal(rows[i], rows[ORDER.index(k)]), i


def test_first_equal() -> None:
    items = [np.array(ids, np.int64) for ids in ([1, 2], [1], [1, 2], [], [2, 1], [], [1])]
    assert first_equal(items).tolist() == [0, 1, 0, 3, 4, 3, 1]
    assert first_equal([]).tolist() == []


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("flow", [None, "packed", "chunked", "extend", "plain"])
@pytest.mark.parametrize("device", DEVICES)
def test_every_flow_computes_them_once(device: str | None, flow: Any) -> None:
    scorer = scorer_on(device)
    if flow == "extend":
        scorer.prefix(PREFIX).release()
    result = scorer.score(PREFIX, ITEMS, flow=flow, return_usage=True)
    expected = one_by_one(random_qwen3(), PREFIX, ITEMS, LABELS)
    assert (torch.tensor(result.scores) - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    check_equal_bits(result.scores)
    usage = result.usage
    assert usage.prompt_tokens == len(ITEMS) * len(PREFIX) + sum(map(len, ITEMS))
    assert usage.computed_tokens - usage.computed_prefix_tokens == DISTINCT_TOKENS
    assert usage.prefix_tokens_saved == usage.prompt_tokens - usage.computed_tokens
    alone = scorer_on(device).score(PREFIX, DISTINCT, flow="packed", return_usage=True).usage
    explained = scorer.explain(PREFIX, ITEMS).workload
    assert explained.item_lens.tolist() == sorted(map(len, DISTINCT))
    if flow == "packed":
        assert usage.computed_tokens == alone.computed_tokens


@pytest.mark.parametrize("max_tokens", [1, 60, 131])
def test_in_launches_of_any_size(max_tokens: int) -> None:
    scorer = scorer_on(None)
    engine_of(scorer).most = Limits(max_tokens, max_tokens, 64)
    result = scorer.score(PREFIX, ITEMS, return_usage=True)
    check_equal_bits(result.scores)
    usage = result.usage
    assert usage.computed_tokens - usage.computed_prefix_tokens == DISTINCT_TOKENS


def test_ties_are_ranked_in_the_order_given() -> None:
    scorer = scorer_on(None, label_token_ids=[5, 17])
    ranked = scorer.rank(PREFIX, ITEMS)
    for before, after in itertools.pairwise(ranked):
        if before["score"] == after["score"]:
            assert before["corpus_id"] < after["corpus_id"]
    assert len({entry["score"] for entry in ranked}) == len(DISTINCT)
    scores = scorer.predict([(PREFIX, item) for item in ITEMS])
    check_equal_bits(scores)
    assert [entry["corpus_id"] for entry in ranked] == np.argsort(-scores, kind="stable").tolist()


def test_every_item_the_same() -> None:
    scorer = scorer_on(None)
    result = scorer.score(PREFIX, [DISTINCT[1]] * 50, return_usage=True)
    assert len({tuple(row) for row in result.scores}) == 1
    assert result.usage.computed_tokens == len(PREFIX) + len(DISTINCT[1])
    assert result.usage.flow == "plain"


@pytest.mark.parametrize("prefix", [PREFIX, []], ids=["prefix", "no-prefix"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "copied"])
def test_under_labels_of_several_tokens(
    monkeypatch: pytest.MonkeyPatch, nested: bool, prefix: list[int]
) -> None:
    monkeypatch.setattr("packscore.flows.reads._nesting_pays", lambda *_: nested)
    labels = [[5], [17, 300], [17, 2, 44]]
    items = [item for item in ITEMS if item or prefix]
    scorer = scorer_on(None, label_token_ids=labels)
    result = scorer.score(prefix, items, return_usage=True)
    distinct = [item for item in DISTINCT if item or prefix]
    alone = scorer_on(None, label_token_ids=labels).score(prefix, distinct, return_usage=True)
    assert (
        np.abs(
            np.array(result.scores) - np.array(alone.scores)[[distinct.index(x) for x in items]]
        ).max()
        <= PROBABILITY_MAX_FLOAT32
    )
    for item, row in zip(items, result.scores, strict=True):
        assert row == result.scores[items.index(item)]
    assert result.usage.computed_tokens == alone.usage.computed_tokens
    # the one leaf, 17 and 2, behind every item, each with the query before it
    assert result.usage.prompt_tokens == sum(len(prefix) + len(item) + 2 for item in items)


def test_classes_of_items_that_differ_in_padding_alone() -> None:
    """What is cut before the classes are read is no difference."""
    model = random_classifier(num_labels=1)
    scorer = MultiItemScorer(patch_model(model))
    items = [[7, 8, 9], [7, 8, 9, 0, 0], [9], [7, 8, 9, 0]]
    result = scorer.score([3, 4], items, return_usage=True)
    assert result.scores[0] == result.scores[1] == result.scores[3] != result.scores[2]
    assert result.usage.computed_tokens == 2 + 3 + 1
