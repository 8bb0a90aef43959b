"""Logits that are NaN or infinite: never a score, never ranked above one, and nothing else lost."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers import random_classifier, random_ids, random_qwen3
from packscore import (
    InputError,
    MissingPackageError,
    MultiItemScorer,
    NonFiniteScoreError,
    ScoringError,
    patch_model,
)

NAN, HUGE = 7, 8  # tokens whose embedding is NaN, and so large that its square overflows
QUERY = [ids + 9 for ids in random_ids(20, 250, seed=1)]
# equal lengths and others, an empty one, the same one twice; 1 and 4 are not finite
ITEMS = [[11, 12, 13], [14, NAN, 15], [19], [], [HUGE], [11, 12, 19], [19]]
GAPS = (1, 4)
FINITE = [i for i in range(len(ITEMS)) if i not in GAPS]
ENGINES = [(None, "segment"), (None, "dense"), ("jax", "segment"), ("jax", "dense")]


def broken_model() -> Any:
    model = random_qwen3(tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[NAN, 3] = math.nan
        model.model.embed_tokens.weight[HUGE] = math.inf
    return model


def scorer_of(engine: tuple[str | None, str], **options: Any) -> MultiItemScorer:
    device, mask_impl = engine
    options = {"label_token_ids": [5, 17], "mask_impl": mask_impl, **options}
    return MultiItemScorer(patch_model(broken_model(), device=device), **options)


@pytest.fixture(params=ENGINES, ids=["torch", "dense", "jax", "jax-dense"], scope="module")
def engine(request: pytest.FixtureRequest) -> tuple[str | None, str]:
    found: tuple[str | None, str] = request.param
    return found


@pytest.fixture(scope="module")
def raising(engine: tuple[str | None, str]) -> MultiItemScorer:
    return scorer_of(engine)


@pytest.fixture(scope="module")
def reporting(engine: tuple[str | None, str]) -> MultiItemScorer:
    return scorer_of(engine, on_non_finite="report")


def same(found: Any, expected: Any) -> None:
    """Equal, NaN to NaN; the same engine may run other launches for other items."""
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-5)


@pytest.mark.parametrize("apply_softmax", [True, False])
def test_score_keeps_the_finite_and_names_the_others(
    raising: MultiItemScorer, reporting: MultiItemScorer, apply_softmax: bool
) -> None:
    expected = raising.score(QUERY, [ITEMS[i] for i in FINITE], apply_softmax=apply_softmax)
    with pytest.raises(NonFiniteScoreError, match=r"2 scores .* at items\[1\], items\[4\]") as info:
        raising.score(QUERY, ITEMS, apply_softmax=apply_softmax)
    assert info.value.indices == GAPS
    same([info.value.scores[i] for i in FINITE], expected)
    found = reporting.score(QUERY, ITEMS, apply_softmax=apply_softmax, return_usage=True)
    assert found.usage.non_finite_items == GAPS
    same(found.scores, info.value.scores)
    assert all(math.isnan(p) for i in GAPS for p in found.scores[i])


@pytest.mark.parametrize("top_k", [None, 2, 6])
def test_rank_puts_no_number_below_what_is_none(
    raising: MultiItemScorer, reporting: MultiItemScorer, top_k: int | None
) -> None:
    finite = raising.rank(QUERY, [ITEMS[i] for i in FINITE])
    expected = [FINITE[entry["corpus_id"]] for entry in finite]
    with pytest.raises(NonFiniteScoreError, match=r"documents\[1\], documents\[4\]") as info:
        raising.rank(QUERY, ITEMS, top_k=top_k)
    assert [entry["corpus_id"] for entry in info.value.scores] == expected[:top_k]
    found = reporting.rank(QUERY, ITEMS, top_k=top_k, return_usage=True)
    assert [entry["corpus_id"] for entry in found.scores] == [*expected, *GAPS][:top_k]
    assert found.usage.non_finite_items == GAPS


@pytest.mark.parametrize(
    "activation_fn",
    [None, nn.Identity(), torch.nan_to_num, lambda x: (x > 0).float()],
    ids=["sigmoid", "identity", "nan_to_num", "sign"],
)
def test_predict_says_which_pairs(
    raising: MultiItemScorer,
    reporting: MultiItemScorer,
    activation_fn: Callable[[torch.Tensor], torch.Tensor] | None,
) -> None:
    pairs = [(QUERY[: 9 + i % 2], item) for i, item in enumerate(ITEMS)]
    with pytest.raises(NonFiniteScoreError, match=r"pairs\[1\], pairs\[4\]") as info:
        raising.predict(pairs, activation_fn=activation_fn)
    found = reporting.predict(pairs, activation_fn=activation_fn, return_usage=True)
    assert found.usage.non_finite_items == info.value.indices == GAPS
    same(found.scores, info.value.scores)
    expected = raising.predict([pairs[i] for i in FINITE], activation_fn=activation_fn)
    same(found.scores[FINITE], expected)
    assert np.isnan(found.scores[list(GAPS)]).all()


def test_score_many_says_which_request(
    raising: MultiItemScorer, reporting: MultiItemScorer
) -> None:
    requests = [(QUERY, [ITEMS[2]]), (QUERY, ITEMS), ([NAN], [ITEMS[2]])]
    with pytest.raises(NonFiniteScoreError, match=r"requests\[1\]\[1\]\[1\]") as info:
        raising.score_many(requests)
    assert info.value.indices == ((1, 1), (1, 4), (2, 0))
    found = reporting.score_many(requests, return_usage=True)
    assert [one.usage.non_finite_items for one in found] == [(), GAPS, (0,)]
    for one, kept in zip(found, info.value.scores, strict=True):
        same(one.scores, kept)


def test_a_stream_yields_what_comes_before(
    raising: MultiItemScorer, reporting: MultiItemScorer
) -> None:
    items = [ITEMS[2], ITEMS[0], *ITEMS]
    expected = reporting.score_stream(QUERY, items, max_items=4)
    rows = raising.score_stream(QUERY, items, max_items=4)
    found = [next(rows) for _ in range(3)]
    with pytest.raises(NonFiniteScoreError, match=r"items\[3\]") as info:
        next(rows)
    assert info.value.indices == (3,)
    same([*found, *info.value.scores], [next(expected) for _ in range(4)])
    same(list(expected), reporting.score(QUERY, items[4:]))


def test_a_held_prefix(raising: MultiItemScorer, reporting: MultiItemScorer) -> None:
    with raising.prefix(QUERY) as held, pytest.raises(NonFiniteScoreError):
        held.score(ITEMS)
    with reporting.prefix(QUERY) as held:
        assert held.score(ITEMS, return_usage=True).usage.non_finite_items == GAPS


def test_labels_of_several_tokens(engine: tuple[str | None, str]) -> None:
    scorer = scorer_of(engine, label_token_ids=[[5, 6], [17]], on_non_finite="report")
    found = scorer.score(QUERY, ITEMS, return_usage=True)
    assert found.usage.non_finite_items == GAPS
    # behind a label's first token, which only that label reads
    scorer = scorer_of(engine, label_token_ids=[[NAN, 6], [17]])
    with pytest.raises(NonFiniteScoreError) as info:
        scorer.score(QUERY, [ITEMS[0], ITEMS[2]])
    assert info.value.indices == (0, 1)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_head_that_is_not_finite(value: float) -> None:
    model = random_qwen3(tied=False)
    scorer = MultiItemScorer(patch_model(model), label_token_ids=[5, 17])
    with torch.no_grad():
        model.lm_head.weight[5, 0] = value
    with pytest.raises(NonFiniteScoreError):
        scorer.score(QUERY, [ITEMS[2]], apply_softmax=True)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = 0.1
        model.lm_head.weight[99, 0] = value  # the normaliser's alone
    assert scorer.score(QUERY, [ITEMS[2]], apply_softmax=True)
    if math.isnan(value):
        with pytest.raises(NonFiniteScoreError):
            scorer.score(QUERY, [ITEMS[2]])


def test_a_probability_of_zero_is_a_number() -> None:
    model = random_qwen3(tied=False)
    model.lm_head = nn.Linear(64, 320)
    with torch.no_grad():
        model.lm_head.bias[5] = -1e6
    found = MultiItemScorer(patch_model(model), label_token_ids=[5, 17]).score(QUERY, [ITEMS[2]])
    assert found[0][0] == 0.0 < found[0][1]


def test_a_classifier() -> None:
    model = random_classifier(num_labels=1)
    scorer = MultiItemScorer(patch_model(model), on_non_finite="report")
    with torch.no_grad():
        model.model.embed_tokens.weight[NAN] = math.nan
    found = scorer.rank(QUERY, [ITEMS[1], ITEMS[0]], return_usage=True)
    assert [entry["corpus_id"] for entry in found.scores] == [1, 0]
    assert found.usage.non_finite_items == (0,)


def test_the_option_has_two_values() -> None:
    with pytest.raises(InputError, match="on_non_finite='skip' must be one of 'raise', 'report'"):
        scorer_of((None, "segment"), on_non_finite="skip")


@pytest.mark.parametrize(
    "error",
    [
        ScoringError("failed", [1.0]),
        NonFiniteScoreError.at([1], [1.0, math.nan], "items[{}]".format),
        MissingPackageError("reading", "parquet"),
    ],
)
def test_errors_come_whole_out_of_other_processes(error: Exception) -> None:
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert repr(vars(other)) == repr(vars(error))
