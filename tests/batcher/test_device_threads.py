"""Several copies behind one queue: all of them busy, and what each of them gives in its place."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from helpers import LABELS, random_ids, random_qwen3
from packscore import LaunchError, MultiItemScorer, patch_model
from packscore.flows import cuts
from page_books import check_books
from tolerances import PROBABILITY_MAX_FLOAT32, PROBABILITY_REORDERED

PREFIXES = [random_ids(1100 + n, seed=n) for n in range(9)]
ITEMS = [random_ids(4 + n, seed=900 + n) for n in range(3)]
LONG = [random_ids(3, seed=n) for n in range(3000)]


def make(device: Any = None) -> MultiItemScorer:
    model = random_qwen3(hidden_size=32, num_layers=1)
    return MultiItemScorer(patch_model(model, device=device), label_token_ids=LABELS[:2])


@pytest.fixture(scope="module")
def one() -> MultiItemScorer:
    return make()


@pytest.fixture
def three() -> Iterator[MultiItemScorer]:
    made = make(["cpu"] * 3)
    yield made
    made.batcher.close()
    for pool in made._core.copies.pools:
        check_books(pool, [])
    assert not any(made._core.copies.loads().values())


def before_launches(
    scorer: MultiItemScorer, patch: pytest.MonkeyPatch, call: Callable[[int, int], object]
) -> list[int]:
    """Call with the copy and the number of each launch, before it runs; the copies of all."""
    used: list[int] = []
    counting = threading.Lock()
    for k, engine in enumerate(scorer._core.copies):

        def launch(*args: Any, k: int = k, launch: Any = engine.launch) -> Any:
            with counting:
                used.append(k)
                number = len(used)
            call(k, number)
            return launch(*args)

        patch.setattr(engine, "launch", launch)
    return used


def close_to(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=PROBABILITY_REORDERED)


def test_all_copies_run_at_once(
    three: MultiItemScorer, one: MultiItemScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No launch runs before all three copies have one."""
    together = threading.Barrier(3, timeout=20)
    used = before_launches(three, monkeypatch, lambda *_: together.wait())

    async def main() -> list[Any]:
        return await asyncio.gather(*(three.async_score(x, ITEMS) for x in PREFIXES))

    for found, prefix in zip(asyncio.run(main()), PREFIXES, strict=True):
        close_to(found, one.score(prefix, ITEMS))
    assert sorted(used) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    stats = three.batcher.stats
    assert (stats.answered, stats.runs, stats.launches) == (9, 9, 9)
    assert stats.pages == sum(pool.num_pages for pool in three._core.copies.pools)
    assert stats.used_pages == 9 * 9
    assert stats.computed_tokens == sum(len(x) + sum(map(len, ITEMS)) for x in PREFIXES)


def test_parts_that_end_in_any_order_make_a_whole(
    three: MultiItemScorer, one: MultiItemScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = before_launches(three, monkeypatch, lambda k, _: time.sleep(0.05 * (2 - k)))

    async def main() -> list[Any]:
        calls = [three.async_score(PREFIXES[k], LONG) for k in range(2)]
        return await asyncio.gather(*calls, three.async_score(PREFIXES[2], ITEMS))

    first, second, short = asyncio.run(main())
    close_to(first, one.score(PREFIXES[0], LONG))
    close_to(second, one.score(PREFIXES[1], LONG))
    close_to(short, one.score(PREFIXES[2], ITEMS))
    assert set(used) == {0, 1, 2}


def test_a_part_that_fails_ends_its_call_and_no_other(
    three: MultiItemScorer, one: MultiItemScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(_: int, number: int) -> None:
        time.sleep(0.02)
        if number == 4:
            raise RuntimeError("the device is gone")

    before_launches(three, monkeypatch, call)

    async def main() -> list[Any]:
        calls = [three.async_score(x, LONG[:2500]) for x in PREFIXES[:3]]
        return await asyncio.gather(*calls, return_exceptions=True)

    found = asyncio.run(main())
    failed = [isinstance(scores, LaunchError) for scores in found]
    assert 1 <= sum(failed) < 3
    for scores, prefix, has_failed in zip(found, PREFIXES, failed, strict=False):
        if not has_failed:
            close_to(scores, one.score(prefix, LONG[:2500]))
    stats = three.batcher.stats
    assert (stats.answered, stats.failed) == (3 - sum(failed), sum(failed))
    assert stats.ran == 3
    close_to(asyncio.run(three.async_score(PREFIXES[0], ITEMS)), one.score(PREFIXES[0], ITEMS))


def test_no_result_is_of_two_models(
    three: MultiItemScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights change while parts of one call run on several copies."""

    def call(_: int, number: int) -> None:
        time.sleep(0.02)
        if number == 4:
            with torch.no_grad():
                three.model.get_input_embeddings().weight.mul_(1.2)

    before_launches(three, monkeypatch, call)
    found = asyncio.run(three.async_score(PREFIXES[0], LONG))
    after = make()
    with torch.no_grad():
        after.model.get_input_embeddings().weight.mul_(1.2)
    expected = after.score(PREFIXES[0], LONG)
    np.testing.assert_allclose(found, expected, rtol=0, atol=PROBABILITY_MAX_FLOAT32)


@pytest.mark.parametrize("changes", [False, True], ids=["fails", "starts-over"])
def test_what_others_compute_of_a_call_that_has_ended_or_begun_anew_counts_no_more(
    three: MultiItemScorer, monkeypatch: pytest.MonkeyPatch, changes: bool
) -> None:
    """All three parts of a call run; one fails, or the model changes, before the others end."""
    monkeypatch.setattr(cuts, "WORTH_IT", 0.0)  # no part is cut
    together = threading.Barrier(3, timeout=20)

    def call(_: int, number: int) -> None:
        if number > 3:
            return
        together.wait()
        if changes and number == 1:
            with torch.no_grad():
                three.model.get_input_embeddings().weight.mul_(1.2)
            return
        time.sleep(0.2 * (number - 1))
        if number == 1 or (changes and number == 3):
            raise RuntimeError("the device is gone")

    before_launches(three, monkeypatch, call)
    items = LONG[:1900]
    if not changes:
        with pytest.raises(LaunchError):
            asyncio.run(three.async_score(PREFIXES[0], items))
    else:
        found = asyncio.run(three.async_score(PREFIXES[0], items))
        three.clear_prefixes()
        expected = three.score(PREFIXES[0], items)
        np.testing.assert_allclose(found, expected, rtol=0, atol=PROBABILITY_MAX_FLOAT32)
    three.batcher.close()
    stats = three.batcher.stats
    assert (stats.ran, stats.answered, stats.failed) == (1, int(changes), int(not changes))


def test_cancelled_and_closed(three: MultiItemScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    used = before_launches(three, monkeypatch, lambda *_: go.wait(20))

    async def main() -> list[Any]:
        calls = [asyncio.create_task(three.async_score(x, ITEMS)) for x in PREFIXES]
        while len(used) < 3:
            await asyncio.sleep(0.005)
        for call in calls[::2]:
            call.cancel()
        await asyncio.sleep(0.01)
        go.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert await three.batcher.aclose(20)
        return found

    found = asyncio.run(main())
    assert [isinstance(x, asyncio.CancelledError) for x in found] == [True, False] * 4 + [True]
    stats = three.batcher.stats
    assert (stats.answered, stats.cancelled, stats.queued_requests) == (4, 5, 0)
