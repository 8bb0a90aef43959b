"""A query that nothing was found for: no items give no scores, and cost no forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import packscore.torch_engine.engine
from helpers import random_classifier, random_qwen3
from packscore import InputError, InputTypeError, MultiItemScorer, ScoreResult, patch_model
from tolerances import PROBABILITY_REORDERED


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(packscore.torch_engine.engine, "scored_rows", fail)


@pytest.fixture(params=["labels", "several-tokens", "classes", "dense"])
def scorer(request: pytest.FixtureRequest) -> MultiItemScorer:
    options: dict[str, Any] = {"label_token_ids": [1, 2]}
    if request.param == "classes":
        return MultiItemScorer(patch_model(random_classifier()))
    if request.param == "several-tokens":
        options = {"label_token_ids": [[1, 3], [2, 4]]}
    if request.param == "dense":
        return MultiItemScorer(random_qwen3(), mask_impl="dense", **options)
    return MultiItemScorer(patch_model(random_qwen3()), **options)


def check_nothing(found: ScoreResult[Any]) -> None:
    assert len(found.scores) == 0
    usage = found.usage
    assert usage.prompt_tokens == usage.computed_tokens == usage.computed_prefix_tokens == 0
    assert usage.prefix_tokens_saved == usage.padding_tokens == 0
    assert usage.truncated_items == usage.special_token_items == usage.non_finite_items == ()


@pytest.mark.usefixtures("no_forward")
def test_no_items_give_no_scores(scorer: MultiItemScorer) -> None:
    assert scorer.score([1, 2], []) == []
    assert scorer.score([1, 2], iter(()), apply_softmax=True, item_first=True) == []
    assert scorer.rank([1, 2], (), top_k=3, return_documents=True) == []
    scores = scorer.predict([])
    assert scores.shape == (0,)
    assert scores.dtype == np.float32
    assert scorer.score_many([]) == []
    assert scorer.score_many([([1], []), ([2], [])]) == [[], []]
    assert list(scorer.score_stream([1], [])) == []
    check_nothing(scorer.score([1, 2], [], return_usage=True))
    check_nothing(scorer.rank([1, 2], [], return_usage=True))
    check_nothing(scorer.predict([], return_usage=True))
    check_nothing(scorer.score_many([([1], [])], return_usage=True)[0])


def test_requests_without_items_stop_no_other(scorer: MultiItemScorer) -> None:
    requests: Any = [([5], []), ([5, 6], [[7], [8, 9]]), ([6], []), ([5], [[7]])]
    found = scorer.score_many(requests)
    assert [len(scores) for scores in found] == [0, 2, 0, 1]
    expected = scorer.score_many([requests[1], requests[3]])
    assert torch.allclose(
        torch.tensor([*found[1], *found[3]]),
        torch.tensor([*expected[0], *expected[1]]),
        rtol=0,
        atol=PROBABILITY_REORDERED,
    )


def test_a_held_prefix_scores_no_items() -> None:
    scorer = MultiItemScorer(patch_model(random_qwen3()), label_token_ids=[1, 2])
    with scorer.prefix([1, 2, 3]) as prefix:
        assert prefix.score([]) == []
        check_nothing(prefix.score([], return_usage=True))
        assert len(prefix.score([[4]])) == 1


def test_the_rest_is_looked_at_all_the_same(scorer: MultiItemScorer) -> None:
    with pytest.raises(InputTypeError, match="query=None is a NoneType"):
        scorer.score(None, [])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="requests\\[0\\]\\[0\\]"):
        scorer.score_many([([10**6], [])])
    for missing in (None, "", 3):
        with pytest.raises(InputTypeError, match="items="):
            scorer.score([1], missing)  # type: ignore[arg-type]


def test_an_instruction_without_a_place_is_refused(shipped: Any, tokenizer: Any) -> None:
    for prompt in ("plain", None):
        with pytest.raises(InputError, match=r"instruction='Find' has no place in this prompt; u"):
            MultiItemScorer(shipped, tokenizer, prompt=prompt, instruction="Find")
    MultiItemScorer(shipped, tokenizer, prompt="yes-no", instruction="Find")
