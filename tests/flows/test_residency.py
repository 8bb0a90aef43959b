"""What lies in pages is read and nothing else: poisoned slots, failed launches, long prefixes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from helpers import LABELS, engine_of, lease_of, one_by_one, random_ids, random_qwen3
from packscore import (
    MultiItemScorer,
    NonFiniteScoreError,
    StalePrefixError,
    patch_model,
    program_of,
    unpatch_model,
)
from packscore.flows import packing
from packscore.flows import page_pool as paging
from packscore.flows.costs import flops_cost_model
from packscore.flows.engine import Limits
from packscore.flows.packing import Share, pack
from packscore.flows.page_pool import PAGE_SIZE, PagePool
from packscore.flows.planner import Planner, Workload
from packscore.model.sizes import ModelSizes
from selection import HAS_JAX
from tolerances import PROBABILITY_MAX_FLOAT32

pytestmark = pytest.mark.usefixtures("quick_programs")

ITEMS = [random_ids(n, seed=n) for n in (5, 30, 1, 0, 9, 33)]
# others of the same lengths
MORE = [[1, *random_ids(len(ids), seed=k)] for k in range(29) for ids in ITEMS]
PATHS = ["torch", "jax"]
NUM_PAGES = 16


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return random_qwen3()


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    paths = {"torch": None, "jax": "jax"} if HAS_JAX else {"torch": None}
    return {name: patch_model(random_qwen3(), device=device) for name, device in paths.items()}


@pytest.fixture(params=PATHS)
def scorer(request: pytest.FixtureRequest, models: dict[str, PreTrainedModel]) -> MultiItemScorer:
    """A scorer with few pages, on the torch path and on compiled programs."""
    return scorer_of(models[request.param])


def scorer_of(model: PreTrainedModel) -> MultiItemScorer:
    cache_bytes = NUM_PAGES * ModelSizes.of(model.config).page_bytes(PAGE_SIZE, 4)
    return MultiItemScorer(model, label_token_ids=LABELS, prefix_cache_bytes=cache_bytes)


def check(
    reference: PreTrainedModel, scores: list[list[float]], prefix: list[int], items: Any = ITEMS
) -> None:
    error = (torch.tensor(scores) - one_by_one(reference, prefix, items, LABELS)).abs().max()
    assert float(error) <= PROBABILITY_MAX_FLOAT32


def poison(scorer: MultiItemScorer, *, spare: bool = True) -> None:
    """NaN into every slot that holds no token of a prefix, or into all."""
    engine = engine_of(scorer)
    free = np.ones((NUM_PAGES, PAGE_SIZE), bool)
    nodes = [engine.pool._root]
    while nodes:
        children = [child for same in nodes.pop().children.values() for child in same]
        for node in children:
            free[node.page, : len(node.tokens)] = not spare
        nodes += children
    if hasattr(engine._pages, "_layers"):
        slots = torch.from_numpy(free.reshape(-1))
        for layer in range(2):
            engine._pages._slots(layer, torch.zeros(1, 2, 1, 16))[:, :, slots] = torch.nan
        return
    import jax.numpy as jnp

    pages = engine._pages
    array = jnp.zeros(pages.struct.shape) if pages._array is None else pages._array
    every_layer = np.tile(free, (2, 1))[:, None, None, :, None]
    pages._array = jnp.where(every_layer, jnp.nan, array)


@pytest.fixture
def scattered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page tables in no order and with gaps."""
    rng = np.random.default_rng(0)

    def anywhere(free: Any, count: int) -> list[int]:
        return [int(page) for page in rng.permutation(free)[:count]]

    monkeypatch.setattr(paging, "_neighbours", anywhere)


@pytest.mark.usefixtures("scattered")
def test_what_free_slots_hold_reaches_no_score(
    reference: PreTrainedModel, scorer: MultiItemScorer
) -> None:
    pool = engine_of(scorer).pool
    system = random_ids(PAGE_SIZE + 40, seed=9)
    prefixes = [random_ids(n, seed=n) for n in (PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1)]
    prefixes += [[*system, k, *random_ids(100, seed=k)] for k in range(3)]  # part inside a page
    tables = []
    for prefix in [*prefixes, *prefixes[::-1]]:
        poison(scorer)  # also what was evicted since
        with scorer.prefix(prefix) as held:
            tables.append(lease_of(held).pages.tolist())
            poison(scorer)
            result = held.score(ITEMS, return_usage=True)
        assert result.usage.flow == "extend"
        check(reference, result.scores, prefix)
    assert any(np.diff(table).min(initial=1) < 0 for table in tables)
    assert any(np.diff(table).max(initial=1) > 1 for table in tables)
    for scores, prefix in zip(
        scorer.score_many([(prefix, ITEMS) for prefix in prefixes]), prefixes, strict=True
    ):
        check(reference, scores, prefix)
    assert pool.num_pinned_pages == 0
    # the control: the same poison in slots that are read
    poison(scorer, spare=False)
    with pytest.raises(NonFiniteScoreError) as info:
        scorer.score(prefixes[-1], ITEMS)
    assert len(info.value.indices) == len(ITEMS)


@pytest.mark.parametrize("flow", ["packed", "chunked", "extend", "plain"])
def test_repeated_runs_of_a_flow_are_bit_identical(scorer: MultiItemScorer, flow: Any) -> None:
    prefix, items = random_ids(PAGE_SIZE + 60, seed=1), ITEMS[:4]
    found = []
    for other in range(3):
        scorer.clear_prefixes()
        scorer.score(random_ids(90 + 70 * other, seed=other), items)  # other pages are free
        if flow == "extend":
            scorer.prefix(prefix).release()
        found.append(scorer.score(prefix, items, flow=flow))
    assert found[0] == found[1] == found[2]


def test_a_prefix_longer_than_a_launch_is_computed_in_pieces(
    reference: PreTrainedModel, scorer: MultiItemScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, sizes = engine_of(scorer), []
    monkeypatch.setattr(type(engine), "limits", Limits(256, 256, 8, NUM_PAGES))
    launch = engine.launch

    def counted(batch: Any, *rest: Any) -> Any:
        sizes.append(len(batch.token_ids))
        return launch(batch, *rest)

    monkeypatch.setattr(engine, "launch", counted)
    prefix = random_ids(700, seed=1)
    explained = scorer.explain(prefix, ITEMS).chosen
    result = scorer.score(prefix, ITEMS, return_usage=True)
    check(reference, result.scores, prefix)
    assert explained.flow == result.usage.flow == "chunked"
    assert explained.num_launches == len(sizes)
    assert explained.computed_tokens == result.usage.computed_tokens == sum(sizes)
    assert result.usage.computed_prefix_tokens == 700
    assert max(sizes) <= 256
    again = scorer.score(prefix, ITEMS[:3], return_usage=True)
    assert again.usage.computed_prefix_tokens == 0
    # one item alone, and a query that is held
    scorer.clear_prefixes()
    check(reference, scorer.score(prefix, ITEMS[:1]), prefix, ITEMS[:1])
    scorer.clear_prefixes()
    with scorer.prefix(prefix) as held:
        check(reference, held.score(ITEMS), prefix)
    # two that share more than a launch: computed once
    scorer.clear_prefixes()
    both = scorer.score_many([([*prefix, k], ITEMS) for k in range(2)], return_usage=True)
    assert sum(one.usage.computed_prefix_tokens for one in both) in (702, 703)
    for k, one in enumerate(both):
        check(reference, one.scores, [*prefix, k])
    assert max(sizes) <= 256
    assert engine.pool.num_pinned_pages == 0


@pytest.mark.jax
def test_a_program_names_the_pages_of_the_longest_prefix() -> None:
    """40 960 tokens are 320 pages; what a launch of several requests names is bounded below."""
    sizes = ModelSizes.of(random_qwen3().config)
    from packscore.programs.launch_inputs import LaunchInputs, block_sizes_for
    from packscore.programs.sizes import MAX_PAGES, program_key

    pool = PagePool(MAX_PAGES)
    prefix = np.arange(40_960) % 300
    lease = pool.acquire(prefix)
    assert lease is not None
    lease.commit()
    batch = pack([Share(0, prefix, [np.ones(7, np.int64)], np.arange(1), lease)])
    key = program_key(len(batch.token_ids), 1, 2, MAX_PAGES)
    blocks = block_sizes_for(sizes, "float32", key, "v6e")
    inputs = LaunchInputs.of(key, blocks, batch.layout, batch.token_ids, [1, 2], leases=[lease])
    assert np.count_nonzero(np.diff(inputs.schedule.page_indices[:320]) == 1) == 319
    # and planned for 16 384 tokens a launch
    planner = Planner(flops_cost_model(sizes), Limits(16_384, 16_384, 32))
    plan = planner.choose(Workload(40_960, 0, np.full(500, 20), True))
    assert plan.prefix_ends == (16_384, 32_768)
    assert plan.computed_tokens == 40_960 + 500 * 20


class LostError(RuntimeError):
    """What a device may say when a launch fails."""


@pytest.mark.jax
@pytest.mark.parametrize("is_donated", [True, False])
def test_a_failed_launch_does_not_leave_empty_pages_behind(
    reference: PreTrainedModel,
    models: dict[str, PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
    is_donated: bool,
) -> None:
    scorer = scorer_of(models["jax"])
    prefix, other = random_ids(200, seed=1), random_ids(150, seed=2)
    held = scorer.prefix(prefix)
    program: Any = program_of(models["jax"])
    engine = engine_of(scorer)

    def fails(weights: Any, array: Any, *inputs: Any) -> Any:
        if is_donated:
            array.delete()
        raise LostError("the device is out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(program._executables, "get", lambda *_, **__: fails)
        with pytest.raises(LostError, match="out of memory"):
            scorer.score(other, ITEMS)
    assert engine.pool.num_pinned_pages == len(lease_of(held).pages)
    if is_donated:
        with pytest.raises(StalePrefixError, match="or its pages were cleared; open a new one"):
            held.score(ITEMS)
    else:
        check(reference, held.score(ITEMS), prefix)
    held.release()
    result = scorer.score(prefix, ITEMS[:3], return_usage=True)
    assert result.usage.computed_prefix_tokens == (200 if is_donated else 0)
    check(reference, result.scores, prefix, ITEMS[:3])
    assert engine.pool.num_pinned_pages == 0


@pytest.mark.jax
def test_a_launch_that_fails_when_it_is_read_spoils_nothing(
    reference: PreTrainedModel, models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_of(models["jax"])
    prefix = random_ids(200, seed=1)
    scorer.score(prefix, ITEMS)
    engine = engine_of(scorer)

    class Spoilt:
        """An array whose computation failed."""

        def block_until_ready(self) -> None:
            raise LostError("halted")

    def fails(self: Any) -> Any:
        engine._pages._array = Spoilt()
        raise LostError("halted")

    with monkeypatch.context() as patch:
        patch.setattr("packscore.programs.program.Launched.read", fails)
        with pytest.raises(LostError, match="halted"):
            scorer.score(random_ids(150, seed=2), ITEMS)
    result = scorer.score(prefix, ITEMS[:3], return_usage=True)
    assert result.usage.computed_prefix_tokens == 200
    check(reference, result.scores, prefix, ITEMS[:3])


def test_pages_cleared_by_another_thread_are_computed_again(
    reference: PreTrainedModel, scorer: MultiItemScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, cleared = random_ids(200, seed=1), []

    def clears(shares: Any) -> Any:
        if not cleared:
            thread = threading.Thread(target=scorer.clear_prefixes)
            thread.start()
            thread.join()
            cleared.append(True)
        return packing.pack(shares)

    scorer.score(prefix, ITEMS)
    monkeypatch.setattr("packscore.flows.jobs.pack", clears)
    engine = engine_of(scorer)
    monkeypatch.setattr(type(engine), "limits", Limits(256, 256, 8, NUM_PAGES))
    result = scorer.score(prefix, [*ITEMS, *MORE[: 19 * len(ITEMS)]], return_usage=True)
    assert cleared
    check(reference, result.scores[: len(ITEMS)], prefix)
    assert result.usage.computed_prefix_tokens >= 200
    assert engine.pool.num_pinned_pages == 0


@pytest.mark.jax
def test_a_stream_survives_other_weights_and_another_patch() -> None:
    model, reference = patch_model(random_qwen3()), random_qwen3()
    scorer = scorer_of(model)
    prefix = random_ids(200, seed=1)
    stream = scorer.score_stream(prefix, ITEMS * 30, max_items=len(ITEMS))

    def take() -> list[list[float]]:
        return [next(stream) for _ in ITEMS]

    check(reference, take(), prefix)
    for changed in (model, reference):
        with torch.no_grad():
            changed.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
    check(reference, take(), prefix)
    unpatch_model(model)
    patch_model(model, device="jax")
    check(reference, take(), prefix)
    pool = engine_of(scorer).pool
    assert pool.num_pinned_pages == 2
    stream.close()
    assert pool.num_pinned_pages == 0


def test_a_stream_of_empty_items_takes_few_at_a_time(
    models: dict[str, PreTrainedModel],
) -> None:
    taken = 0

    def endless() -> Iterator[list[int]]:
        nonlocal taken
        while True:
            taken += 1
            yield []

    scorer = scorer_of(models["torch"])
    stream = scorer.score_stream([1, 2, 3], endless())
    for _ in range(10_000):
        next(stream)
    assert taken < 10_000 + 2 * engine_of(scorer).limits.target_tokens


def test_explain_knows_what_is_held(models: dict[str, PreTrainedModel]) -> None:
    scorer = scorer_of(models["torch"])
    prefix, other = random_ids(12 * PAGE_SIZE, seed=1), random_ids(5 * PAGE_SIZE, seed=2)
    items = [random_ids(20, seed=k) for k in range(30)]
    with scorer.prefix(prefix):
        # 12 of 16 pages are pinned, and these items need no more
        assert scorer.explain(prefix, items).chosen.flow == "extend"
        assert scorer.explain([*prefix, 7], items).workload.cached_len == len(prefix)
        refused = scorer.explain(other, items).refused
        assert refused["chunked"] == "no prefix tokens to put into pages, or no pages for them"
    assert scorer.explain(other, items).workload.is_kept
    scorer.score(other, items)  # which evicts the end of the first
    found = scorer.explain(prefix, items)
    assert found.refused["extend"] == "128 prefix tokens are not in pages"
    result = scorer.score(prefix, items, return_usage=True)
    assert result.usage.computed_prefix_tokens == 128
    assert result.usage.computed_tokens == found.chosen.computed_tokens


def test_launches_shrink_with_the_free_memory(
    reference: PreTrainedModel, models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_of(models["torch"])
    engine, sizes = engine_of(scorer), []
    launch = engine.launch

    def counted(batch: Any, *rest: Any) -> Any:
        sizes.append(len(batch.token_ids))
        return launch(batch, *rest)

    monkeypatch.setattr(engine, "launch", counted)
    prefix, items = random_ids(100, seed=1), [*MORE, *ITEMS]
    per_token = ModelSizes.of(models["torch"].config).activation_bytes(4)
    for free_tokens, most in ((10**9, 32_768), (1100, 512), (10, 256)):
        monkeypatch.setattr(
            "packscore.torch_engine.engine.free_bytes", lambda *_, n=free_tokens: n * per_token
        )
        sizes.clear()
        scorer.clear_prefixes()
        scores = scorer.score(prefix, items)
        assert engine.limits.max_tokens == most
        assert max(sizes) <= most
        assert (len(sizes) > 4) == (most < 1000)
        check(reference, scores[-len(ITEMS) :], prefix)
