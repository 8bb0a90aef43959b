"""Labels of several tokens, and many of them: sums of log-probabilities, as one by one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from helpers import FAMILIES, engine_of, random_classifier, random_decoder, random_ids, random_qwen3
from packscore import InputError, MultiItemScorer, patch_model, program_of, verify_parity
from packscore.flows.page_pool import PAGE_SIZE
from packscore.text.labels import Labels
from selection import cover
from tolerances import (
    LOG_ODDS_FLOAT32,
    PROBABILITY_MAX_BFLOAT16,
    PROBABILITY_MAX_FLOAT32,
    PROBABILITY_MEAN_BFLOAT16,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

DEVICES = [None, "jax"]
ITEMS = [random_ids(n, seed=k) for k, n in enumerate((5, 60, 1, 0, 9, 130, 9, 33))]
# two that share a beginning, one token alone, one that is longest
LABELS = [[5, 17], [300], [2, 44, 45, 46], [5, 18, 9]]
# of which none is out of the question, so that a softmax over them tells items apart
EQUALLY_LONG = [[5, 17], [300, 2], [5, 18]]
NUM_LEAVES, LEAF_TOKENS = 2, 3 + 2
ONE_TOKEN = [5, 17, 300, 2, 44, 45, 46, 47, 9, 10, 11, 12, 13, 14, 15, 16, 18]
PREFIX_LENS = [0, 1, 15, 16, 17, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 300]

SERVED_PREFIXES = [(None, n) for n in PREFIX_LENS] + [("jax", n) for n in (0, 17, PAGE_SIZE + 1)]


@torch.no_grad()
def log_probs(
    model: PreTrainedModel, prefix: list[int], items: list[list[int]], labels: list[list[int]]
) -> torch.Tensor:
    """float64[num_items, num_labels]: each label behind each item, alone, through the model."""
    found = torch.zeros(len(items), len(labels), dtype=torch.float64)
    for i, item in enumerate(items):
        for j, label in enumerate(labels):
            ids = [*prefix, *item, *label]
            rows = model(torch.tensor([ids]), use_cache=False).logits[0, -1 - len(label) : -1]
            found[i, j] = (
                rows.double().log_softmax(-1).gather(1, torch.tensor(label)[:, None]).sum()
            )
    return found


def items_behind(prefix: list[int]) -> list[list[int]]:
    return ITEMS if prefix else [item or [7] for item in ITEMS]


def assert_parity(
    scorer: MultiItemScorer, reference: Any, prefix: list[int], **options: Any
) -> None:
    """Scores of LABELS over the vocabulary, and others over the labels, are the reference's."""
    items = items_behind(prefix)
    expected = log_probs(reference, prefix, items, LABELS)
    found = scorer.score(prefix, items, label_token_ids=LABELS, **options)
    scores = torch.tensor(found, dtype=torch.float64)
    assert (scores - expected.exp()).abs().max() <= PROBABILITY_MAX_FLOAT32
    # a product of four probabilities is small: its logarithm has to be right as well
    assert (scores.log() - expected).abs().max() <= LOG_ODDS_FLOAT32
    assert expected.std(0).min() > 0.5
    expected = log_probs(reference, prefix, items, EQUALLY_LONG).softmax(-1)
    options |= {"label_token_ids": EQUALLY_LONG, "apply_softmax": True}
    over_labels = torch.tensor(scorer.score(prefix, items, **options))
    assert (over_labels - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    assert expected.std(0).max() > 0.1


@pytest.fixture(scope="module", params=DEVICES, ids=str)
def served(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """(a patched model, its unpatched copy)."""
    model: Any = random_qwen3()
    return patch_model(copy.deepcopy(model), device=request.param), model


def scorer_of(served: tuple[Any, Any], **options: Any) -> MultiItemScorer:
    """With 32 pages, which are enough here and are less to copy on a CPU."""
    return MultiItemScorer(served[0], prefix_cache_bytes=2**21, **options)


@pytest.mark.parametrize(("served", "prefix_len"), SERVED_PREFIXES, indirect=["served"])
def test_labels_of_several_tokens(served: tuple[Any, Any], prefix_len: int) -> None:
    assert_parity(scorer_of(served), served[1], random_ids(prefix_len, seed=1))


@pytest.mark.parametrize("flow", ["packed", "chunked", "extend", "plain"])
def test_every_flow_by_name(served: tuple[Any, Any], flow: Any) -> None:
    scorer, prefix = scorer_of(served), random_ids(PAGE_SIZE + 3, seed=2)
    if flow == "chunked":  # whose first call leaves the query in pages
        found = scorer.score(prefix, ITEMS, label_token_ids=LABELS, flow=flow)
        expected = log_probs(served[1], prefix, ITEMS, LABELS).exp()
        assert (torch.tensor(found) - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
        return
    if flow == "extend":
        scorer.prefix(prefix).release()
    assert_parity(scorer, served[1], prefix, flow=flow)


def test_everything_is_computed_once(
    served: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The query once, every item once, and behind it the labels' beginnings once each."""
    monkeypatch.setattr("packscore.flows.reads._nesting_pays", lambda *_: True)
    scorer, prefix = scorer_of(served), random_ids(300, seed=1)
    items = [item for item in ITEMS if item]
    own = sum(map(len, items)) + len(items) * LEAF_TOKENS
    for missing, flow in ((300, "chunked"), (0, "extend")):
        usage = scorer.score(prefix, items, label_token_ids=LABELS, return_usage=True).usage
        assert (usage.computed_tokens, usage.computed_prefix_tokens) == (own + missing, missing)
        assert usage.flow == flow
        alone = NUM_LEAVES * (300 * len(items) + sum(map(len, items)))
        assert usage.prompt_tokens == alone + len(items) * LEAF_TOKENS
        assert usage.prefix_tokens_saved == usage.prompt_tokens - usage.computed_tokens
    pool = engine_of(scorer).pool
    assert pool is not None
    assert (pool.num_pinned_pages, pool.num_pages - pool.num_free_pages) == (0, 3)
    # without a query items share nothing, and keep nothing
    usage = scorer.score([], items, label_token_ids=LABELS, return_usage=True).usage
    assert (usage.computed_tokens, usage.computed_prefix_tokens) == (own, 0)
    assert pool.num_pages - pool.num_free_pages == 3


def test_where_pages_cannot_hold_the_query_items_are_copied(served: tuple[Any, Any]) -> None:
    scorer = MultiItemScorer(served[0], prefix_cache_bytes=0)
    prefix = random_ids(40, seed=1)
    assert_parity(scorer, served[1], prefix)
    usage = scorer.score(prefix, ITEMS, label_token_ids=LABELS, return_usage=True).usage
    own = NUM_LEAVES * sum(map(len, ITEMS)) + len(ITEMS) * LEAF_TOKENS
    assert usage.computed_tokens == own + 40


def test_a_token_without_the_ones_before_it_is_another(served: tuple[Any, Any]) -> None:
    """The control: tokens of a label that did not see each other."""
    prefix = random_ids(20, seed=1)
    expected = log_probs(served[1], prefix, ITEMS, EQUALLY_LONG)
    apart = torch.stack(
        [log_probs(served[1], prefix, ITEMS, [[i] for i in ids]).sum(1) for ids in EQUALLY_LONG], 1
    )
    difference = (apart.softmax(-1) - expected.softmax(-1)).abs()
    assert difference.amax(1).median() > 1000 * PROBABILITY_MAX_FLOAT32


def test_items_and_labels_do_not_see_each_other(served: tuple[Any, Any]) -> None:
    prefix, other = random_ids(140, seed=1), [random_ids(len(item), seed=9) for item in ITEMS]
    scorer = scorer_of(served)
    scorer.prefix(prefix).release()
    found = np.array(scorer.score(prefix, ITEMS, label_token_ids=LABELS))
    items = [ITEMS[0], *other[1:]]
    assert scorer.score(prefix, items, label_token_ids=LABELS)[0] == found[0].tolist()
    labels = [*LABELS[:3], [5, 18, 77]]  # the token that nothing comes behind
    again = np.array(scorer.score(prefix, ITEMS, label_token_ids=labels))
    assert np.array_equal(again[:, :3], found[:, :3])
    assert not np.array_equal(again[:, 3], found[:, 3])


def test_one_token_labels_take_their_own_path(
    served: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, as ids or as lists of one id, and without a token more."""
    scorer, prefix = scorer_of(served), random_ids(30, seed=1)
    monkeypatch.setattr("packscore.flows.reads._leaves", None)
    ids = [5, 17, 300]
    first = scorer.score(prefix, ITEMS, label_token_ids=ids, flow="packed", return_usage=True)
    lists = scorer.score(prefix, ITEMS, label_token_ids=[[i] for i in ids], flow="packed")
    assert first.scores == lists
    assert first.usage.computed_tokens == 30 + sum(map(len, ITEMS))


@pytest.mark.parametrize(
    ("served", "count", "softmax"),
    cover(
        (f"{device}-{count}-{softmax}", (device, count, softmax), (device, count, softmax))
        for device in DEVICES
        for count in (2, 3, 8, 17)
        for softmax in (False, True)
    ),
    indirect=["served"],
)
def test_k_labels(served: tuple[Any, Any], count: int, softmax: bool) -> None:
    """Of one token each, and the same number with some that have several."""
    scorer, prefix = scorer_of(served), random_ids(37, seed=1)
    for labels in ([[i] for i in ONE_TOKEN[:count]], [*LABELS, *[[i] for i in range(50, 80)]]):
        labels = labels[:count]
        expected = log_probs(served[1], prefix, ITEMS, labels)
        expected = expected.softmax(-1) if softmax else expected.exp()
        found = scorer.score(prefix, ITEMS, label_token_ids=labels, apply_softmax=softmax)
        assert (torch.tensor(found) - expected).abs().max() <= PROBABILITY_MAX_FLOAT32


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16(device: str | None) -> None:
    model: Any = random_qwen3()
    model.lm_head.weight.data.mul_(0.5)  # see test_exactness.py
    reference = copy.deepcopy(model.bfloat16())
    prefix = random_ids(130, seed=1)
    scorer = MultiItemScorer(patch_model(model, device=device))
    found = scorer.score(prefix, ITEMS, label_token_ids=EQUALLY_LONG, apply_softmax=True)
    expected = log_probs(reference, prefix, ITEMS, EQUALLY_LONG).softmax(-1)
    difference = (torch.tensor(found) - expected).abs()
    assert difference.max() <= PROBABILITY_MAX_BFLOAT16
    assert difference.mean() <= PROBABILITY_MEAN_BFLOAT16


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    model = random_decoder(family)
    reference = copy.deepcopy(model)
    assert_parity(MultiItemScorer(patch_model(model)), reference, random_ids(17, seed=1))


def test_dense_mask() -> None:
    model = random_qwen3()
    assert_parity(MultiItemScorer(model, mask_impl="dense"), model, random_ids(17, seed=1))


def test_rank_and_predict_compare_sums(served: tuple[Any, Any]) -> None:
    prefix = random_ids(25, seed=1)
    negative, positive = [5, 17, 9], [300, 2]
    scorer = scorer_of(served, label_token_ids=[negative, positive])
    assert scorer.label_token_ids == [negative, positive]
    expected = log_probs(served[1], prefix, ITEMS, [negative, positive])
    log_odds = (expected[:, 1] - expected[:, 0]).numpy()
    pairs = [(prefix, item) for item in ITEMS]
    found = scorer.predict(pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(found, log_odds, atol=LOG_ODDS_FLOAT32)
    ranked = scorer.rank(prefix, ITEMS)
    assert [entry["corpus_id"] for entry in ranked] == np.argsort(-log_odds).tolist()
    best = 1 / (1 + np.exp(-log_odds.max()))
    assert ranked[0]["score"] == pytest.approx(best, abs=PROBABILITY_MAX_FLOAT32)


def test_every_call_takes_them(served: tuple[Any, Any]) -> None:
    """score_many, score_stream, a held prefix and item_first."""
    scorer = scorer_of(served)
    prefixes = [random_ids(n, seed=n) for n in (5, 40, 200)]
    expected = [log_probs(served[1], prefix, ITEMS, LABELS).exp() for prefix in prefixes]
    requests = [(prefix, ITEMS) for prefix in prefixes]
    found = scorer.score_many(requests, label_token_ids=LABELS)
    found += [list(scorer.score_stream(prefixes[1], ITEMS, label_token_ids=LABELS, max_items=3))]
    with scorer.prefix(prefixes[2]) as held:
        result = held.score(ITEMS, label_token_ids=LABELS, return_usage=True)
        found.append(result.scores)
        assert result.usage.flow == "extend"
    for scores, wanted in zip(found, [*expected, *expected[1:]], strict=True):
        assert (torch.tensor(scores) - wanted).abs().max() <= PROBABILITY_MAX_FLOAT32
    turned = scorer.score(prefixes[0], ITEMS[:3], label_token_ids=LABELS, item_first=True)
    wanted = torch.cat(
        [log_probs(served[1], item, [prefixes[0]], LABELS).exp() for item in ITEMS[:3]]
    )
    assert (torch.tensor(turned) - wanted).abs().max() <= PROBABILITY_MAX_FLOAT32
    pool = engine_of(scorer).pool
    assert pool is not None
    assert pool.num_pinned_pages == 0


def test_progress_counts_items(served: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    scorer = scorer_of(served)
    requests = [(random_ids(30, seed=k), ITEMS[: 2 + k]) for k in range(2)]
    scorer.score_many(requests, label_token_ids=LABELS, show_progress_bar=True)
    assert "5/5" in capsys.readouterr().err


def test_more_items_than_a_launch_has_groups(
    served: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("packscore.flows.reads._nesting_pays", lambda *_: True)
    scorer, prefix = scorer_of(served), random_ids(150, seed=1)
    items = [random_ids(12 + k % 3, seed=k) for k in range(70)]
    found = scorer.score(prefix, items, label_token_ids=LABELS[:2], return_usage=True)
    expected = log_probs(served[1], prefix, items, LABELS[:2]).exp()
    assert (torch.tensor(found.scores) - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    assert found.usage.computed_tokens == 150 + sum(map(len, items)) + 70


@pytest.mark.jax
def test_one_warmup_serves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch of the query and those of the items run the same programs."""
    monkeypatch.setattr("packscore.flows.reads._nesting_pays", lambda *_: True)
    scorer = MultiItemScorer(patch_model(random_qwen3(), device="jax"))
    program: Any = program_of(scorer.model)
    labels = [[i, i + 1] for i in range(0, 20, 2)]
    program.warmup(max_tokens=256)
    program.strict = True
    result = scorer.score(
        random_ids(90, seed=1), ITEMS[:5], label_token_ids=labels, return_usage=True
    )
    assert result.usage.flow == "chunked"


def test_texts_are_tokenised_alone_and_joined_as_ids(
    shipped: PreTrainedModel, unpatched: PreTrainedModel, tokenizer: Any
) -> None:
    texts = [" very good", "very good", "\nbad"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert ids[0] != ids[1]
    assert max(map(len, ids)) > 1
    scorer = MultiItemScorer(shipped, tokenizer, labels=texts)
    assert scorer.label_token_ids == ids
    query, items = "shuffle a list", [" Shuffle list x in place.", "", " Open a file."]
    request = scorer.encode(query, items)
    expected = log_probs(
        unpatched, request.prefix.tolist(), [item.tolist() for item in request.items], ids
    )
    found = torch.tensor(scorer.score(query, items, apply_softmax=True))
    assert (found - expected.softmax(-1)).abs().max() <= PROBABILITY_MAX_FLOAT32


def test_a_label_that_begins_another() -> None:
    """Over the vocabulary it contains the other; they cannot be compared."""
    model = random_qwen3()
    scorer = MultiItemScorer(patch_model(model), label_token_ids=[[3], [3, 4]])
    prefix = random_ids(20, seed=1)
    scores = torch.tensor(scorer.score(prefix, ITEMS))
    expected = log_probs(model, prefix, ITEMS, [[3], [3, 4]]).exp()
    assert (scores - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    assert (scores[:, 0] >= scores[:, 1]).all()
    message = r"token ids \[3\] are a label and begin another one"
    for call in (
        lambda: scorer.rank(prefix, ITEMS),
        lambda: scorer.predict([(prefix, ITEMS[0])]),
        lambda: scorer.score_stream(prefix, ITEMS, apply_softmax=True),
        lambda: scorer.score_many([(prefix, ITEMS)], apply_softmax=True),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_the_models_limit_leaves_room_for_the_label() -> None:
    model = patch_model(random_qwen3(max_position_embeddings=40))
    scorer = MultiItemScorer(model)
    for labels, truncated in (([[1], [2]], ()), (LABELS, (1,))):
        result = scorer.score(
            [1] * 20, [[2] * 17, [3] * 20], label_token_ids=labels, return_usage=True
        )
        assert result.usage.truncated_items == truncated
    # a budget of the user's is for the query and the item
    scorer = MultiItemScorer(model, max_tokens=37)
    result = scorer.score([1] * 20, [[2] * 17], label_token_ids=LABELS, return_usage=True)
    assert result.usage.truncated_items == ()


def test_verify_parity_looks_at_whole_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [(random_ids(30, seed=1), ITEMS), (random_ids(9, seed=2), ITEMS[:2])]
    model = random_qwen3()
    for labels in (LABELS, [[3], [3, 4]], [3, 4]):
        assert verify_parity(model, samples=samples, label_token_ids=labels, show=False).passed
    monkeypatch.setattr(
        Labels,
        "log_probs",
        lambda labels, logits, z, **_: (logits - z[..., None])[:, 0, : len(labels)],
    )
    report = verify_parity(model, samples=samples, label_token_ids=LABELS, show=False)
    assert report.verdict == "different"


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_verify_parity_of_classifiers(num_labels: int) -> None:
    samples = [(random_ids(30, seed=1), ITEMS)]
    assert verify_parity(
        random_classifier(num_labels=num_labels), samples=samples, show=False
    ).passed
