"""Readouts against the plain model, one row at a time: contents of labels, hidden states, heads."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers import random_classifier, random_ids, random_qwen3
from packscore import (
    Content,
    Hidden,
    InputError,
    InputTypeError,
    Label,
    MultiItemScorer,
    NonFiniteScoreError,
    ScoreRequest,
    ScoringError,
    UnsupportedModelError,
    patch_model,
    program_of,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

DEVICES = [None, "jax"]
PREFIX = random_ids(140, seed=1)
ITEMS = [random_ids(n, seed=n) for n in (1, 2, 17, 300, 0, 64, 17)]
# of one token, of several, one that begins another, and more tokens than a program reads at once
OF_ITEMS = [
    [[5], [6]],
    [[7, 8], [9]],
    [[10, 11, 12], [10, 11, 13], [3]],
    [[1]],
    [[4, 4, 4], [4]],
    [*([i] for i in range(20, 90)), [1, 2]],
    [[5], [6]],
]
FLOWS = ["packed", "extend", "chunked", "plain", None]
REDUCED = list(zip(FLOWS, ["sum", "mean", "mean", "sum", "mean"], strict=True))


@pytest.fixture(scope="module", params=DEVICES, ids=str)
def served(request: pytest.FixtureRequest) -> tuple[MultiItemScorer, Any]:
    """(a scorer, the plain model)."""
    model: Any = random_qwen3()
    patched = patch_model(copy.deepcopy(model), device=request.param)
    return MultiItemScorer(patched, prefix_cache_bytes=2**21), model


def in_flow(scorer: MultiItemScorer, flow: Any) -> Any:
    """`score` in a flow, with pages as it needs them."""
    scorer.clear_prefixes()
    if flow == "extend":
        scorer.prefix(PREFIX).release()
    return lambda *args, **options: scorer.score(*args, flow=flow, **options)


@torch.no_grad()
def hidden_of(model: Any, ids: list[int]) -> torch.Tensor:
    found: torch.Tensor = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return found


@torch.no_grad()
def content(model: Any, before: list[int], label: list[int], reduce: str) -> float:
    """Of a label behind some ids, a row at a time."""
    each = []
    for at, token in enumerate(label):
        logits = model(input_ids=torch.tensor([[*before, *label[:at]]])).logits[0, -1]
        each.append(float(logits.log_softmax(-1)[token]))
    return sum(each) / (len(each) if reduce == "mean" else 1)


@pytest.mark.parametrize(("flow", "reduce"), REDUCED)
def test_contents_of_labels_that_differ_from_item_to_item(
    served: tuple[Any, Any], flow: Any, reduce: Any
) -> None:
    scorer, model = served
    found = in_flow(scorer, flow)(
        PREFIX, ITEMS, item_label_token_ids=OF_ITEMS, readout=Content(reduce)
    )
    for item, labels, scores in zip(ITEMS, OF_ITEMS, found, strict=True):
        some = labels[:3]  # of many labels a few
        expected = [content(model, [*PREFIX, *item], label, reduce) for label in some]
        assert np.log(scores[: len(some)]) == pytest.approx(expected, abs=1e-5, rel=1e-5)
        assert len(scores) == len(labels)


def test_label_is_the_sum(served: tuple[Any, Any]) -> None:
    scorer, _ = served
    labels = [[7, 8], [9]]
    by_default = scorer.score(PREFIX, ITEMS, label_token_ids=labels, flow="packed")
    for readout in (Label(), Content("sum")):
        assert by_default == scorer.score(
            PREFIX, ITEMS, label_token_ids=labels, readout=readout, flow="packed"
        )


def test_softmax_is_over_the_items_own_labels(served: tuple[Any, Any]) -> None:
    scorer, _ = served
    found = scorer.score(PREFIX, ITEMS[:2], item_label_token_ids=[[1, 2], [3, 4, 5]])
    over = scorer.score(
        PREFIX, ITEMS[:2], item_label_token_ids=[[1, 2], [3, 4, 5]], apply_softmax=True
    )
    for raw, normed in zip(found, over, strict=True):
        assert normed == pytest.approx(np.array(raw) / sum(raw), abs=1e-6)


def rows_of(ids: Any) -> list[int]:
    """The first, the middle, the last, and the first again."""
    return [0, len(ids) // 2, len(ids) - 1, 0] if len(ids) else []


@pytest.mark.parametrize("flow", FLOWS)
def test_hidden_states_at_named_rows(served: tuple[Any, Any], flow: Any) -> None:
    scorer, model = served
    seen: list[torch.Tensor] = []

    def head(hidden: list[torch.Tensor]) -> list[float]:
        seen.extend(hidden)
        return [float(len(rows)) for rows in hidden]

    assert in_flow(scorer, flow)(PREFIX, ITEMS, readout=Hidden(head, rows_of)) == [
        [float(len(rows_of(item)))] for item in ITEMS
    ]
    for item, hidden in zip(ITEMS, seen, strict=True):
        own = hidden_of(model, [*PREFIX, *item])[len(PREFIX) :]
        assert torch.allclose(hidden, own[rows_of(item)], atol=1e-5)


class Pointer(nn.Module):
    """A head that points from an item's last row to the others, as a user writes it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(size, 16), nn.Linear(size, 16)

    def forward(self, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        points = [self.k(rows[:-1]) @ self.q(rows[-1]) / 4 for rows in hidden]
        return [each.softmax(-1) for each in points]


OPTION_END, DECIDE = 301, 302


def pointed(ids: Any) -> Any:
    return np.flatnonzero(np.isin(ids, [OPTION_END, DECIDE]))


def test_a_pointer_head_in_ten_lines(served: tuple[Any, Any]) -> None:
    """Every question alone, with others, from pages and streamed, and by the plain model."""
    scorer, model = served
    questions = [
        [*random_ids(n, seed=n), *(x for k in range(n) for x in (40 + k, OPTION_END)), DECIDE]
        for n in (2, 5, 3)
    ]
    head = Pointer(model.config.hidden_size)
    readout = Hidden(head, pointed)
    found = scorer.score(PREFIX, questions, readout=readout)
    for question, scores in zip(questions, found, strict=True):
        own = hidden_of(model, [*PREFIX, *question])[len(PREFIX) :][pointed(np.array(question))]
        with torch.no_grad():
            assert scores == pytest.approx(head([own])[0].tolist(), abs=1e-5)
        assert scores == pytest.approx(
            scorer.score(PREFIX, [question], readout=readout)[0], abs=2e-6
        )
    with scorer.prefix(PREFIX) as prefix:
        held = prefix.score(questions, readout=readout, return_usage=True)
    assert held.usage.computed_tokens == sum(map(len, questions))
    streamed = list(scorer.score_stream(PREFIX, iter(questions), readout=readout, max_items=2))
    for one in (held.scores, streamed):
        for scores, expected in zip(one, found, strict=True):
            assert scores == pytest.approx(expected, abs=2e-6)


def test_a_head_sees_all_items_of_its_request(served: tuple[Any, Any]) -> None:
    scorer, _ = served
    items = [ITEMS[1], ITEMS[2], ITEMS[1]]

    def share(hidden: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([rows[0, 0] for rows in hidden]).softmax(0)

    found = scorer.score(PREFIX, items, readout=Hidden(share))
    assert sum(row[0] for row in found) == pytest.approx(1, abs=1e-6)
    assert found[0] == found[2]


def test_an_equal_item_of_other_rows_is_another(served: tuple[Any, Any]) -> None:
    scorer, model = served
    rows = iter([[0], [16], [0]])
    found = scorer.score(
        PREFIX, [ITEMS[2]] * 3, readout=Hidden(lambda h: [x[0, 0] for x in h], lambda _: next(rows))
    )
    own = hidden_of(model, [*PREFIX, *ITEMS[2]])[len(PREFIX) :, 0]
    assert [row[0] for row in found] == pytest.approx(own[[0, 16, 0]].tolist(), abs=1e-5)


def test_the_wrong_row_is_seen(served: tuple[Any, Any]) -> None:
    """The control: the rows beside those that are read are others by far."""
    _, model = served
    own = hidden_of(model, [*PREFIX, *ITEMS[3]])[len(PREFIX) :]
    assert (own[1:] - own[:-1]).abs().amax(-1).min() > 0.1


def test_requests_of_their_own_options_share_a_launch(
    served: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, _ = served
    first = Hidden(lambda hidden: [rows[-1, 0] for rows in hidden])
    requests = [
        (PREFIX, ITEMS[:3]),
        ScoreRequest(PREFIX[:50], ITEMS, readout=first),
        ScoreRequest(PREFIX, ITEMS[:2], item_label_token_ids=[[1], [2, 3]], apply_softmax=True),
        ScoreRequest(PREFIX[:60], ITEMS[:2], label_token_ids=[[5, 6], [7]], readout=Content()),
    ]
    scorer.clear_prefixes()
    engine = scorer._core.copies.first
    launches: list[Any] = []
    launch = engine.launch
    monkeypatch.setattr(engine, "launch", lambda *args: launches.append(args) or launch(*args))
    found = scorer.score_many(requests, label_token_ids=[5, 6])
    assert len(launches) <= 2
    monkeypatch.undo()
    alone: list[Any] = [
        scorer.score(PREFIX, ITEMS[:3], label_token_ids=[5, 6]),
        scorer.score(PREFIX[:50], ITEMS, readout=first),
        scorer.score(PREFIX, ITEMS[:2], item_label_token_ids=[[1], [2, 3]], apply_softmax=True),
        scorer.score(PREFIX[:60], ITEMS[:2], label_token_ids=[[5, 6], [7]], readout=Content()),
    ]
    for one, expected in zip(found, alone, strict=True):
        for scores, own in zip(one, expected, strict=True):
            assert scores == pytest.approx(own, abs=2e-6)


def test_each_request_has_its_own_error(served: tuple[Any, Any]) -> None:
    scorer, _ = served
    requests = [
        (PREFIX, ITEMS[:2]),
        ScoreRequest(PREFIX, [[10**9]]),
        ScoreRequest([], [[]]),
        ScoreRequest(PREFIX, ITEMS[:1], labels=["text"]),
        ScoreRequest(PREFIX, ITEMS[:2], item_label_token_ids=[[1]]),
        ScoreRequest(PREFIX, ITEMS[:1], readout=Hidden(lambda hidden: 1 / 0)),
        ScoreRequest(PREFIX, ITEMS[:1], readout=Hidden(lambda hidden: [float("nan")])),
        (PREFIX, ITEMS[2:3]),
    ]
    found = scorer.score_many(requests, label_token_ids=[5, 6], return_exceptions=True)
    kinds = [InputError, InputError, InputError, InputError, ZeroDivisionError, NonFiniteScoreError]
    assert [type(one) for one in found[1:-1]] == kinds
    assert all(f"requests[{i}]" in str(found[i]) for i in (1, 2, 3, 4, 6))
    ends = scorer.score_many([requests[0], requests[-1]], label_token_ids=[5, 6])
    for one, own in zip((found[0], found[-1]), ends, strict=True):
        assert np.array(one) == pytest.approx(np.array(own), abs=2e-6)
    with pytest.raises(InputError, match=r"^requests\[1\]\[1\]\[0\]"):
        scorer.score_many(requests, label_token_ids=[5, 6])
    with pytest.raises(ScoringError, match=r"1 of 2 requests failed.*requests\[1\]") as info:
        scorer.score_many([requests[0], requests[5]], label_token_ids=[5, 6])
    assert info.value.scores[1] is None
    assert np.array(info.value.scores[0]) == pytest.approx(np.array(found[0]), abs=2e-6)


def nothing(hidden: Any) -> Any:
    return [0.0 for _ in hidden]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "labels beside a head": (
        {"readout": Hidden(nothing), "label_token_ids": [1]},
        "label_token_ids has no meaning beside readout=Hidden",
    ),
    "softmax beside a head": (
        {"readout": Hidden(nothing), "apply_softmax": True},
        "apply_softmax has no meaning beside readout=Hidden",
    ),
    "no readout": ({"readout": "hidden"}, r"readout='hidden' must be Label\(\), Content"),
    "labels twice": (
        {"label_token_ids": [1], "item_label_token_ids": [[1], [1]]},
        "label_token_ids and item_label_token_ids are two ways",
    ),
    "too few": ({"item_label_token_ids": [[1]]}, "has 1 entries for 2 items"),
    "no label": ({"item_label_token_ids": [[1], []]}, r"item_label_token_ids\[1\]: "),
    "null": ({"item_label_token_ids": [[1], None]}, r"item_label_token_ids\[1\]: None must be"),
    "beyond": ({"item_label_token_ids": [[1], [9999]]}, r"item_label_token_ids\[1\]: .*9999"),
    "a row beyond": (
        {"readout": Hidden(nothing, lambda ids: [len(ids)])},
        r"rows gives \[1\] for items\[0\], which has 1 tokens",
    ),
    "a row before": ({"readout": Hidden(nothing, lambda _: [-1])}, r"rows gives \[-1\] for items"),
    "no rows": ({"readout": Hidden(nothing, lambda _: [0.5])}, r"must give a list of indices"),
    "one result": ({"readout": Hidden(lambda _: [1.0])}, "head gives 1 results for 2 items"),
    "no results": ({"readout": Hidden(lambda _: None)}, "head gives None; it must give"),
    "texts": ({"readout": Hidden(lambda h: ["a" for _ in h])}, "head gives .*; it must give"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused(served: tuple[Any, Any], case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises((InputError, InputTypeError), match=message):
        served[0].score(PREFIX[:5], ITEMS[:2], **options)


def test_readouts_that_cannot_be() -> None:
    content_of: Any = Content
    hidden_of_any: Any = Hidden
    with pytest.raises(InputError, match="reduce='max' must be one of 'sum', 'mean'"):
        content_of("max")
    with pytest.raises(InputTypeError, match="head=3 must be a function"):
        hidden_of_any(3)
    with pytest.raises(InputTypeError, match=r"rows=.* must be a function"):
        hidden_of_any(nothing, rows=[1])


def make_foreign(model: Any) -> None:
    """A forward set by hand, which nothing knows."""
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(hidden)


def test_a_foreign_forward_gives_no_hidden_states() -> None:
    model: Any = random_qwen3()
    patch_model(model)
    make_foreign(model)
    scorer = MultiItemScorer(model)
    with pytest.raises(UnsupportedModelError, match=r"readout=Hidden\(...\): this model runs as"):
        scorer.score(PREFIX[:5], ITEMS[:2], readout=Hidden(nothing))


def test_contents_where_the_model_runs_whole() -> None:
    plain: Any = random_qwen3()
    model = patch_model(copy.deepcopy(plain))
    make_foreign(model)
    found = MultiItemScorer(model).score(
        PREFIX[:9], ITEMS[:3], item_label_token_ids=OF_ITEMS[:3], readout=Content()
    )
    for item, labels, scores in zip(ITEMS, OF_ITEMS, found, strict=False):
        expected = [content(plain, [*PREFIX[:9], *item], label, "mean") for label in labels]
        assert np.log(scores) == pytest.approx(expected, abs=1e-5)


def test_under_a_dense_mask() -> None:
    plain: Any = random_qwen3()
    scorer = MultiItemScorer(copy.deepcopy(plain), mask_impl="dense")
    found = scorer.score(PREFIX[:9], ITEMS[:3], item_label_token_ids=OF_ITEMS[:3])
    for item, labels, scores in zip(ITEMS, OF_ITEMS, found, strict=False):
        expected = [content(plain, [*PREFIX[:9], *item], label, "sum") for label in labels]
        assert np.log(scores) == pytest.approx(expected, abs=1e-5)
    first = scorer.score(PREFIX[:9], ITEMS[:3], readout=Hidden(lambda h: [x[0, 0] for x in h]))
    own = [float(hidden_of(plain, [*PREFIX[:9], *item])[-1, 0]) for item in ITEMS[:3]]
    assert [row[0] for row in first] == pytest.approx(own, abs=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_of_a_classifier(device: str | None) -> None:
    model: Any = random_classifier(num_labels=3)
    scorer = MultiItemScorer(patch_model(model, device=device))
    names = list(model.config.id2label.values())
    whole = scorer.score(PREFIX[:9], ITEMS[:2])
    some = scorer.score(PREFIX[:9], ITEMS[:2], item_labels=[names[:1], names[1:]])
    assert some[0] == pytest.approx(whole[0][:1], abs=1e-6)
    assert some[1] == pytest.approx(whole[1][1:], abs=1e-6)
    hidden = scorer.score(PREFIX[:9], ITEMS[:2], readout=Hidden(nothing))
    assert hidden == [[0.0], [0.0]]


@pytest.mark.jax
def test_a_warm_up_serves_every_readout() -> None:
    scorer = MultiItemScorer(patch_model(random_qwen3(), device="jax"), prefix_cache_bytes=2**21)
    program: Any = program_of(scorer.model)
    program.warmup(max_tokens=1024, prefix_cache_bytes=2**21, hidden_states=True)
    program.strict = True
    count = program.compile_count
    scorer.score(PREFIX, ITEMS, item_label_token_ids=OF_ITEMS, readout=Content())
    scorer.score(PREFIX, ITEMS, readout=Hidden(lambda h: [float(len(x)) for x in h], rows_of))
    scorer.score(PREFIX, ITEMS, label_token_ids=list(range(200)))
    assert program.compile_count == count
