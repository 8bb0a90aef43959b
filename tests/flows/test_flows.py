"""Every flow gives the same scores; what is in pages is not computed again; nothing is too big."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from helpers import LABELS, engine_of, lease_of, one_by_one, random_ids, random_qwen3
from packscore import InputError, MultiItemScorer, ScoringError, StalePrefixError, patch_model
from packscore.flows.engine import Limits
from packscore.flows.page_pool import PAGE_SIZE
from tolerances import PROBABILITY_MAX_FLOAT32

ITEMS = [random_ids(n, seed=k) for k, n in enumerate((5, 60, 1, 0, 9, 130, 9, 33))]
NUM_ITEM_TOKENS = sum(map(len, ITEMS))
PREFIX_LENS = [1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 3 * PAGE_SIZE + 40]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return patch_model(random_qwen3())


@pytest.fixture
def scorer(model: PreTrainedModel) -> MultiItemScorer:
    return MultiItemScorer(model, label_token_ids=LABELS)


def difference(
    model: PreTrainedModel, scores: list[list[float]], prefix: list[int], items: list[list[int]]
) -> float:
    expected = one_by_one(model, prefix, items, LABELS)
    return float((torch.tensor(scores) - expected).abs().max())


def limit(scorer: MultiItemScorer, max_tokens: int, target_tokens: int | None = None) -> None:
    engine = engine_of(scorer)
    engine.most = Limits(max_tokens, target_tokens or max_tokens, 64)


@pytest.mark.parametrize("prefix_len", PREFIX_LENS)
@pytest.mark.parametrize("flow", ["packed", "chunked", "extend", "plain"])
def test_every_flow_equals_one_by_one(
    model: PreTrainedModel, scorer: MultiItemScorer, flow: Any, prefix_len: int
) -> None:
    prefix = random_ids(prefix_len, seed=1)
    limit(scorer, 2048 if flow == "packed" else 150)
    if flow == "extend":
        scorer.score(prefix, ITEMS[:2], flow="plain")  # which keeps nothing
        with pytest.raises(InputError, match=rf"flow='extend': {prefix_len} prefix tokens are not"):
            scorer.score(prefix, ITEMS, flow="extend")
        scorer.prefix(prefix).release()
    result = scorer.score(prefix, ITEMS, flow=flow, return_usage=True)
    assert result.usage.flow == flow
    assert difference(model, result.scores, prefix, ITEMS) <= PROBABILITY_MAX_FLOAT32
    again = scorer.score(prefix, ITEMS, return_usage=True)
    assert difference(model, again.scores, prefix, ITEMS) <= PROBABILITY_MAX_FLOAT32


@pytest.mark.parametrize("max_tokens", [1, 60, 131, 200, 10_000])
def test_any_chunk_boundary_gives_the_same_scores(
    model: PreTrainedModel, scorer: MultiItemScorer, max_tokens: int
) -> None:
    prefix = random_ids(70, seed=2)
    limit(scorer, max_tokens)
    for cached in (False, True):
        result = scorer.score(prefix, ITEMS, return_usage=True)
        assert difference(model, result.scores, prefix, ITEMS) <= PROBABILITY_MAX_FLOAT32
        # the prefix ran once, whatever the number of launches; its last token again, for the item
        # that is empty
        assert result.usage.computed_prefix_tokens == (1 if cached else 70)
        assert result.usage.computed_tokens == NUM_ITEM_TOKENS + (1 if cached else 70)


def test_the_second_call_computes_no_prefix_token(scorer: MultiItemScorer) -> None:
    prefix, items = random_ids(300, seed=1), ITEMS[:3]
    first = scorer.score(prefix, items, return_usage=True).usage
    second = scorer.score(prefix, items, return_usage=True).usage
    assert (first.flow, first.computed_prefix_tokens) == ("packed", 300)
    assert (second.flow, second.computed_prefix_tokens) == ("extend", 0)
    assert second.computed_tokens == sum(map(len, items))
    assert second.prefix_tokens_saved == 900


def test_without_pages_nothing_is_kept(model: PreTrainedModel) -> None:
    scorer = MultiItemScorer(model, label_token_ids=LABELS, prefix_cache_bytes=0)
    limit(scorer, 500)
    prefix = random_ids(300, seed=1)
    for _ in range(2):
        result = scorer.score(prefix, ITEMS, return_usage=True)
        # two launches, each with the prefix
        assert result.usage.computed_prefix_tokens == 600
        assert difference(model, result.scores, prefix, ITEMS) <= PROBABILITY_MAX_FLOAT32
    with pytest.raises(InputError, match=r"query has 300 tokens .* prefix_cache_bytes=0 has room"):
        scorer.prefix(prefix)


def test_twenty_queries_share_one_system_prompt(
    model: PreTrainedModel, scorer: MultiItemScorer
) -> None:
    system = random_ids(1000, seed=3)
    queries = [[*system, k, *random_ids(5 + k, seed=k)] for k in range(20)]
    results = scorer.score_many([(query, ITEMS[:3]) for query in queries], return_usage=True)
    computed = sum(result.usage.computed_prefix_tokens for result in results)
    assert computed == 1000 + sum(len(query) - 1000 for query in queries)
    for query, result in zip(queries[::5], results[::5], strict=True):
        assert difference(model, result.scores, query, ITEMS[:3]) <= PROBABILITY_MAX_FLOAT32


@pytest.mark.parametrize("target_tokens", [1, 300, 4096])
def test_one_among_others_is_as_alone(
    model: PreTrainedModel, scorer: MultiItemScorer, target_tokens: int
) -> None:
    limit(scorer, 4096, target_tokens)
    rng = np.random.default_rng(0)
    requests = []
    for k in range(21):
        prefix = random_ids(int(rng.integers(1, 300)), seed=k % 15)  # some come twice
        lens = rng.integers(0, 30, rng.integers(1, 6)).tolist()
        requests.append((prefix, [random_ids(n, seed=n) for n in lens]))
    launches: list[int] = []
    engine = engine_of(scorer)
    launch = engine.launch
    engine.launch = lambda batch, *rest: (launches.append(len(batch.shares)), launch(batch, *rest))[
        1
    ]
    results = scorer.score_many(requests)
    assert [len(scores) for scores in results] == [len(items) for _, items in requests]
    for (prefix, items), scores in zip(requests, results, strict=True):
        assert difference(model, scores, prefix, items) <= PROBABILITY_MAX_FLOAT32
    assert sum(launches) == 21
    assert (len(launches) == 21) == (target_tokens == 1)


def test_many_keeps_the_results_of_the_others(
    scorer: MultiItemScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(scorer)
    launch = engine.launch

    def fails(batch: Any, *rest: Any) -> Any:
        if any(share.prefix[0] == 7 for share in batch.shares):
            raise RuntimeError("out of memory")
        return launch(batch, *rest)

    monkeypatch.setattr(engine, "launch", fails)
    with pytest.raises(ScoringError, match=r"1 of 3 requests failed, the first is requests\[1\]"):
        scorer.score_many([([1], ITEMS), ([7], ITEMS), ([3], ITEMS)])
    assert engine.pool.num_pinned_pages == 0
    with pytest.raises(ScoringError) as info:
        scorer.score_many([([1], ITEMS), ([7], ITEMS), ([3], ITEMS)])
    assert [result is None for result in info.value.scores] == [False, True, False]


@pytest.fixture(scope="module")
def compiled() -> tuple[PreTrainedModel, MultiItemScorer]:
    """A scorer on compiled programs, and the model in torch to compare with."""
    model = patch_model(random_qwen3(), device="jax")
    return random_qwen3(), MultiItemScorer(model, label_token_ids=LABELS)


@pytest.mark.jax
@pytest.mark.parametrize("flow", ["packed", "chunked", "extend", "plain"])
def test_every_flow_through_programs(
    compiled: tuple[PreTrainedModel, MultiItemScorer], flow: Any
) -> None:
    model, scorer = compiled
    scorer.clear_prefixes()
    prefix, items = random_ids(PAGE_SIZE + 70, seed=1), [*ITEMS[:4], ITEMS[7]]
    if flow == "extend":
        scorer.prefix(prefix).release()
    result = scorer.score(prefix, items, flow=flow, return_usage=True)
    assert result.usage.flow == flow
    assert difference(model, result.scores, prefix, items) <= PROBABILITY_MAX_FLOAT32


@pytest.mark.jax
def test_programs_share_pages_between_queries(
    compiled: tuple[PreTrainedModel, MultiItemScorer],
) -> None:
    """Parting inside a page, several queries in a launch, an empty item behind a whole prefix."""
    model, scorer = compiled
    scorer.clear_prefixes()
    system = random_ids(PAGE_SIZE + 30, seed=3)
    queries = [[*system, k, *random_ids(5 + k, seed=k)] for k in range(5)]
    items = [ITEMS[0], [], ITEMS[2]]
    for warm in (False, True):
        results = scorer.score_many([(query, items) for query in queries], return_usage=True)
        computed = sum(result.usage.computed_prefix_tokens for result in results)
        own = sum(len(query) - len(system) for query in queries)
        assert computed == (len(queries) if warm else len(system) + own)
        for query, result in zip(queries, results, strict=True):
            assert difference(model, result.scores, query, items) <= PROBABILITY_MAX_FLOAT32
    engine = engine_of(scorer)
    assert engine.pool.num_pinned_pages == 0


def small_cache(model: PreTrainedModel, num_pages: int) -> MultiItemScorer:
    config = model.config
    page_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    return MultiItemScorer(
        model, label_token_ids=LABELS, prefix_cache_bytes=num_pages * page_bytes * PAGE_SIZE
    )


def test_eviction_under_pressure_while_a_prefix_is_held(model: PreTrainedModel) -> None:
    scorer = small_cache(model, 4)
    held = random_ids(2 * PAGE_SIZE, seed=1)
    with scorer.prefix(held) as p:
        for seed in range(2, 7):
            other = random_ids(PAGE_SIZE + 20, seed=seed)
            scores = scorer.score(other, ITEMS)
            assert difference(model, scores, other, ITEMS) <= PROBABILITY_MAX_FLOAT32
        # larger than what is left: computed without being kept
        large = random_ids(3 * PAGE_SIZE, seed=8)
        scores = scorer.score(large, ITEMS)
        assert difference(model, scores, large, ITEMS) <= PROBABILITY_MAX_FLOAT32
        result = p.score(ITEMS[:3], return_usage=True)
        assert result.usage.computed_prefix_tokens == 0
        assert difference(model, result.scores, held, ITEMS[:3]) <= PROBABILITY_MAX_FLOAT32
        with pytest.raises(InputError, match=r"has room for 256 that are not held; release other"):
            scorer.prefix(large)
    pool = engine_of(scorer).pool
    assert pool is not None
    assert pool.num_pinned_pages == 0


def test_a_stale_handle_never_scores(model: PreTrainedModel) -> None:
    own = patch_model(random_qwen3())
    scorer = MultiItemScorer(own, label_token_ids=LABELS)
    prefix = random_ids(40, seed=1)
    with scorer.prefix(prefix) as p:
        p.score(ITEMS)
    with pytest.raises(StalePrefixError, match=r"the prefix was released; open a new one with"):
        p.score(ITEMS)
    p = scorer.prefix(prefix)
    with torch.no_grad():
        own.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    with pytest.raises(StalePrefixError, match=r"computed with other weights, or its pages were"):
        p.score(ITEMS)
    p = scorer.prefix(prefix)
    scorer.clear_prefixes()
    with pytest.raises(StalePrefixError, match="open a new one"):
        p.score(ITEMS)


def test_changed_weights_reach_the_next_score() -> None:
    own = patch_model(random_qwen3())
    scorer = MultiItemScorer(own, label_token_ids=LABELS)
    prefix = random_ids(200, seed=1)
    before = scorer.score(prefix, ITEMS)
    with torch.no_grad():
        own.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
    result = scorer.score(prefix, ITEMS, return_usage=True)
    assert result.usage.computed_prefix_tokens == 200
    assert result.scores != before
    assert difference(own, result.scores, prefix, ITEMS) <= PROBABILITY_MAX_FLOAT32


def test_stream_yields_before_the_items_end(
    model: PreTrainedModel, scorer: MultiItemScorer
) -> None:
    prefix, taken = random_ids(100, seed=1), 0

    def endless() -> Iterator[list[int]]:
        nonlocal taken
        while True:
            taken += 1
            yield ITEMS[taken % len(ITEMS)]

    stream = scorer.score_stream(prefix, endless())
    assert taken == 0
    found = [next(stream)]
    assert taken <= 8
    found += [next(stream) for _ in range(99)]
    stream.close()
    assert taken < 300
    items = [ITEMS[(k + 1) % len(ITEMS)] for k in range(100)]
    assert difference(model, found, prefix, items) <= PROBABILITY_MAX_FLOAT32
    pool = engine_of(scorer).pool
    assert pool is not None
    assert pool.num_pinned_pages == 0


def test_stream_names_a_bad_item_and_keeps_what_came_before(scorer: MultiItemScorer) -> None:
    items = [[1, 2]] * 8 + [[3], [-1]]
    stream = scorer.score_stream([1, 2, 3], items)
    assert len([next(stream) for _ in range(8)]) == 8
    with pytest.raises(InputError, match=r"items\[9\]\[0\]=-1 is not in the vocabulary"):
        next(stream)
    with pytest.raises(InputError, match=r"max_items=0 must be at least 1"):
        scorer.score_stream([1], items, max_items=0)
    assert list(scorer.score_stream([1, 2], [])) == []
    assert len(list(scorer.score_stream([1, 2], iter(items[:8]), max_items=3))) == 8


def test_threads_share_the_pages(model: PreTrainedModel) -> None:
    scorer = small_cache(model, 6)
    work = [(random_ids(100 + 40 * (k % 5), seed=k % 5), ITEMS[: 2 + k % 3]) for k in range(20)]
    expected = [one_by_one(model, prefix, items, LABELS) for prefix, items in work]
    worst: list[float] = []

    def run(offset: int) -> None:
        for k in range(len(work)):
            prefix, items = work[(k + 7 * offset) % len(work)]
            scores = torch.tensor(scorer.score(prefix, items))
            worst.append(float((scores - expected[(k + 7 * offset) % len(work)]).abs().max()))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 80
    assert max(worst) <= PROBABILITY_MAX_FLOAT32


def test_unknown_flow(scorer: MultiItemScorer) -> None:
    with pytest.raises(InputError, match=r"flow='paged' must be one of 'packed', 'extend', 'chun"):
        scorer.score([1], [[2]], flow="paged")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"prefix_cache_bytes=-1 must be at least 0"):
        MultiItemScorer(scorer.model, prefix_cache_bytes=-1)


def test_computed_tokens_grow_linearly(scorer: MultiItemScorer) -> None:
    counts = [10, 100, 1000]
    computed = []
    for count in counts:
        scorer.clear_prefixes()
        items = [random_ids(6, seed=k) for k in range(count)]
        result = scorer.score(random_ids(50, seed=1), items, return_usage=True)
        computed.append(result.usage.computed_tokens)
        print(f"{count:5} items: {computed[-1]:6} tokens computed")
    assert computed == [50 + 6 * count for count in counts]


def test_a_prefix_that_is_dropped_pins_nothing(scorer: MultiItemScorer) -> None:
    pool = engine_of(scorer).pool
    prefix = random_ids(200, seed=3)
    scorer.prefix(prefix).score(ITEMS)
    assert pool.num_pinned_pages == 0
    held = scorer.prefix(prefix)
    scorer.clear_prefixes()
    with pytest.raises(StalePrefixError), held:
        pass
    assert lease_of(held).is_released
    assert pool.num_pinned_pages == 0
    # caching goes on
    scorer.score(prefix, ITEMS)
    assert scorer.score(prefix, ITEMS, return_usage=True).usage.flow == "extend"


def test_an_interrupt_while_a_request_is_planned(
    scorer: MultiItemScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("packscore.flows.planner.Planner.choose", interrupt)
        with pytest.raises(KeyboardInterrupt):
            scorer.score(random_ids(200, seed=4), ITEMS)
    assert engine_of(scorer).pool.num_pinned_pages == 0
