"""How often a call looks whether the model changed: once, for each run of launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers import LABELS, random_ids, random_qwen3
from packscore import MultiItemScorer, StalePrefixError, patch_model
from packscore.model.weight_watch import WeightWatch

PREFIX = random_ids(200, seed=1)
ITEMS = [random_ids(n, seed=k) for k, n in enumerate((5, 6, 1, 9, 3))]
PAIRS = [(query, item) for query in ([1, 2, 3], [4, 5], [6]) for item in ITEMS]
CONTEXTS = {"label_token_ids": [[5, 6], [7, 8]]}

CALLS: dict[str, tuple[Callable[[MultiItemScorer], object], int]] = {
    "score": (lambda s: s.score(PREFIX, ITEMS), 1),
    "score-plain": (lambda s: s.score(PREFIX, ITEMS, flow="plain"), 1),
    "rank": (lambda s: s.rank(PREFIX, ITEMS), 1),
    "predict": (lambda s: s.predict(PAIRS), 1),
    "score_many": (lambda s: s.score_many([(PREFIX, ITEMS), ([1, 2], ITEMS)]), 1),
    "explain": (lambda s: s.explain(PREFIX, ITEMS), 1),
    # the query that all items go on from is put into pages by a run of its own
    "score-labels-of-two": (lambda s: s.score(PREFIX, ITEMS, **CONTEXTS), 2),
    "stream": (lambda s: list(s.score_stream(PREFIX, iter(ITEMS), max_items=1)), 1 + len(ITEMS)),
    "stream-without-query": (lambda s: list(s.score_stream([], iter(ITEMS))), 1),
}


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What every look at a model found."""
    found: list[bool] = []
    sees_change = WeightWatch.sees_change

    def counted(self: WeightWatch, model: Any) -> bool:
        found.append(sees_change(self, model))
        return found[-1]

    monkeypatch.setattr(WeightWatch, "sees_change", counted)
    return found


def scorer_on(device: str | None, labels: list[int] = LABELS[:2]) -> MultiItemScorer:
    model = patch_model(random_qwen3(tied=False), device=device)
    return MultiItemScorer(model, label_token_ids=labels)


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("device", [None, "jax"])
def test_a_call_looks_at_the_model_once(device: str | None, looks: list[bool]) -> None:
    scorer = scorer_on(device)
    for name, (call, expected) in CALLS.items():
        looks.clear()
        call(scorer)
        assert looks == [False] * expected, name
    with scorer.prefix(PREFIX) as held:
        for _ in range(2):
            looks.clear()
            held.score(ITEMS)
            assert looks == [False]
        looks.clear()
        held.check()
        assert looks == [False]


def test_a_stream_without_room_for_its_query_looks_once_a_launch(looks: list[bool]) -> None:
    scorer = MultiItemScorer(
        patch_model(random_qwen3()), label_token_ids=LABELS, prefix_cache_bytes=0
    )
    assert len(list(scorer.score_stream(PREFIX, iter(ITEMS), max_items=1))) == len(ITEMS)
    assert looks == [False] * len(ITEMS)


@pytest.mark.parametrize("labels", [{}, CONTEXTS], ids=["labels-of-one", "labels-of-two"])
def test_the_one_look_of_a_held_query_sees_the_change(
    looks: list[bool], labels: dict[str, Any]
) -> None:
    scorer = scorer_on(None)
    held = scorer.prefix(PREFIX)
    with torch.no_grad():
        scorer.model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    looks.clear()
    with pytest.raises(StalePrefixError, match="other weights"):
        held.score(ITEMS, **labels)
    assert looks == [True]
    with pytest.raises(StalePrefixError, match="other weights"):
        held.score(ITEMS, **labels)
