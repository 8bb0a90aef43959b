"""Many tasks on one scorer: the scores of one by one, launches shared, nobody held up or lost."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from helpers import LABELS, engine_of, random_ids, random_qwen3
from packscore import (
    BatcherClosedError,
    Content,
    Hidden,
    InputError,
    InputTypeError,
    LaunchError,
    MultiItemScorer,
    NonFiniteScoreError,
    NotPatchedError,
    Noul,
    QueueFullError,
    patch_model,
    unpatch_model,
)
from page_books import check_books
from processes import run_fresh
from tolerances import PROBABILITY_REORDERED

PREFIXES = [random_ids(20 + n, seed=n) for n in range(12)]
LONG = [random_ids(3, seed=n) for n in range(2000)]
SHORT = [random_ids(4, seed=9000)]


def make_scorer(**options: Any) -> MultiItemScorer:
    return MultiItemScorer(patch_model(random_qwen3()), label_token_ids=LABELS[:2], **options)


@pytest.fixture
def scorer() -> Iterator[MultiItemScorer]:
    made = make_scorer()
    yield made
    made.batcher.close()


@pytest.fixture
def texts(shipped: Any, tokenizer: Any) -> Iterator[MultiItemScorer]:
    made = MultiItemScorer(shipped, tokenizer, prompt="qwen3-reranker")
    yield made
    made.batcher.close()


class Gate:
    """Launches of a scorer that wait until they are let through, and what comes before them."""

    def __init__(self, scorer: MultiItemScorer, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.reached, self.opened = threading.Event(), threading.Event()
        self.before: Callable[[int], object] = lambda count: None
        self.after: Callable[[int], object] = lambda count: None
        engine = engine_of(scorer)
        launch = engine.launch

        def gated(*args: Any) -> Any:
            self.count += 1
            self.reached.set()
            assert self.opened.wait(30)
            self.before(self.count)
            found = launch(*args)
            self.after(self.count)
            return found

        patch.setattr(engine, "launch", gated)

    async def reach(self) -> None:
        """Until a launch waits."""
        assert await asyncio.to_thread(self.reached.wait, 30)


@pytest.fixture
def gate(scorer: MultiItemScorer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(scorer, monkeypatch)
    yield made
    made.opened.set()


def close_to(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=PROBABILITY_REORDERED)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


def test_500_tasks_make_5000_calls_of_which_1000_are_cancelled(scorer: MultiItemScorer) -> None:
    chance = random.Random(0)
    requests = [
        (prefix, [random_ids(1 + (k + n) % 5, seed=7 * n + k) for k in range(n % 4)])
        for n, prefix in enumerate(PREFIXES * 4)
    ]
    expected = [scorer.score(*request) for request in requests]
    cancelled = 0

    async def one_task(number: int) -> None:
        nonlocal cancelled
        doomed = chance.sample(range(10), 2)
        for i in range(10):
            which = chance.randrange(len(requests))
            call = asyncio.create_task(scorer.async_score(*requests[which]))
            if i in doomed:
                await asyncio.sleep(chance.choice([0, 0, 0.001, 0.002, 0.005, 0.02]))
                call.cancel()
            try:
                close_to(await call, expected[which])
            except asyncio.CancelledError:
                cancelled += 1

    async def main() -> None:
        await asyncio.gather(*(one_task(number) for number in range(500)))

    asyncio.run(main())
    stats = scorer.batcher.stats
    # a few were answered before they were cancelled, or cancelled before they were accepted
    assert 700 < cancelled <= 1000
    # a result that was on its way when its task was cancelled counts as an answer
    assert 5000 - cancelled <= stats.answered <= 5000
    assert stats.accepted == stats.answered + stats.cancelled
    assert (stats.failed, stats.rejected) == (0, 0)
    assert 0 < stats.dropped <= stats.cancelled <= cancelled
    assert (stats.queued_requests, stats.queued_tokens) == (0, 0)
    assert stats.requests_a_launch > 4
    scorer.batcher.close()  # what runs for nobody has ended too
    pool = engine_of(scorer).pool
    assert pool.num_pinned_pages == 0
    check_books(pool, [])


def test_what_waits_shares_launches(scorer: MultiItemScorer, monkeypatch: Any) -> None:
    gate = Gate(scorer, monkeypatch)
    gate.opened.set()
    requests = [(PREFIXES[n % 12], SHORT) for n in range(120)]

    async def main() -> list[Any]:
        return await asyncio.gather(*(scorer.async_score(*request) for request in requests))

    found = asyncio.run(main())
    stats = scorer.batcher.stats
    assert stats.launches == gate.count < 120 / 4  # counted where they are made
    assert stats.ran == stats.answered == 120
    assert stats.requests_a_launch == 120 / gate.count
    prompt_tokens = sum(len(prefix) + 4 for prefix, _ in requests)
    assert stats.computed_tokens + stats.saved_tokens == prompt_tokens
    assert stats.computed_tokens < prompt_tokens / 2
    assert stats.running_seconds > 0 < stats.encoding_seconds
    for request, scores in zip(requests, found, strict=True):
        close_to(scores, scorer.score(*request))


def test_one_run_holds_whatever_is_asked(texts: MultiItemScorer) -> None:
    documents = ["Shuffle a list in place.", "Open a file.", "A panda eats bamboo."]
    means: list[int] = []

    def centred(hidden: list[torch.Tensor]) -> torch.Tensor:
        """A head that looks across items."""
        means.append(len(hidden))
        rows = torch.stack([rows.mean(0) for rows in hidden])
        return (rows - rows.mean(0)).norm(dim=-1)

    questions: dict[str, Any] = {
        "list": Noul("Is it about lists?"),
        "kind": {"type": "choice", "instructions": "Which?", "criteria": {"a": None, "b": None}},
    }
    options: list[dict[str, Any]] = [
        {},
        {"apply_softmax": True, "return_usage": True},
        {"labels": ["yes", "no", "maybe so"]},
        {"item_labels": [["yes", "no"], ["good", "bad", "so so"], ["one"]]},
        {"labels": ["a long label", "another"], "readout": Content("mean")},
        {"readout": Hidden(centred, rows=lambda ids: range(len(ids)))},
    ]

    async def main() -> list[Any]:
        return await asyncio.gather(
            *(texts.async_score("a list", documents, **one) for one in options),
            texts.async_rank("a list", documents, top_k=2, return_documents=True),
            texts.async_rank("a list", documents, activation_fn=torch.nn.Identity()),
            texts.async_decide({"text": "[3, 1]"}, questions, permutations=2),
            texts.async_score("a list", []),
        )

    texts.start_batcher(window_seconds=1.0)  # for all of them, on any machine
    *scored, ranked, logits, decision, nothing = asyncio.run(main())
    assert texts.batcher.stats.runs <= 2  # two, where encoding takes longer than the window
    for found, one in zip(scored, options, strict=True):
        expected: Any = texts.score("a list", documents, **one)
        if one.get("return_usage"):
            assert found.usage.prompt_tokens == expected.usage.prompt_tokens
            found, expected = found.scores, expected.scores
        assert [len(row) for row in found] == [len(row) for row in expected]
        for row, right in zip(found, expected, strict=True):
            np.testing.assert_allclose(row, right, rtol=1e-4, atol=PROBABILITY_REORDERED)
    assert means == [3, 3]
    for found, right in ((ranked, texts.rank("a list", documents, top_k=2)),):
        assert [one["corpus_id"] for one in found] == [one["corpus_id"] for one in right]
        assert [one["text"] for one in found] == [documents[one["corpus_id"]] for one in right]
    plain = texts.rank("a list", documents, activation_fn=torch.nn.Identity())
    close_to([one["score"] / 10 for one in logits], [one["score"] / 10 for one in plain])
    apart = texts.decide({"text": "[3, 1]"}, questions, permutations=2)
    close_to(decision.answers["list"].noul, apart.answers["list"].noul)
    close_to(decision.answers["kind"].confidence, apart.answers["kind"].confidence)
    assert nothing == []


def test_a_full_queue_refuses_at_once(scorer: MultiItemScorer, gate: Gate) -> None:
    batcher = scorer.start_batcher(max_requests=3, max_tokens=10)

    async def main() -> None:
        running = asyncio.create_task(scorer.async_score(PREFIXES[0], SHORT))
        await gate.reach()
        waiting = [asyncio.create_task(scorer.async_score(PREFIXES[1], SHORT)) for _ in range(2)]
        await until(lambda: batcher.stats.queued_tokens == 8)
        # it is encoded before its tokens are known
        with pytest.raises(QueueFullError, match=r"^2 requests with 8 tokens wait, .* try again"):
            await scorer.async_score(PREFIXES[2], SHORT)
        waiting.append(asyncio.create_task(scorer.async_score(PREFIXES[2], [[1]])))
        await until(lambda: batcher.stats.queued_requests == 3)
        with pytest.raises(QueueFullError) as info:
            await scorer.async_score(PREFIXES[2], [[1]])
        assert 0 < info.value.retry_after <= 60
        assert pickle.loads(pickle.dumps(info.value)).retry_after == info.value.retry_after
        waiting[0].cancel()  # its room is given back at once
        await asyncio.sleep(0)
        waiting.append(asyncio.create_task(scorer.async_score(PREFIXES[3], [[2]])))
        gate.opened.set()
        done = await asyncio.gather(running, *waiting, return_exceptions=True)
        assert [type(one) for one in done] == [list, asyncio.CancelledError, list, list, list]

    asyncio.run(main())
    stats = batcher.stats
    assert (stats.accepted, stats.rejected, stats.answered, stats.dropped) == (5, 2, 4, 1)


def test_more_tokens_than_the_queue_takes_run_when_it_is_empty(scorer: MultiItemScorer) -> None:
    scorer.start_batcher(max_tokens=1)
    close_to(asyncio.run(scorer.async_score(PREFIXES[0], SHORT)), scorer.score(PREFIXES[0], SHORT))


def test_a_short_request_overtakes_a_long_one(scorer: MultiItemScorer, gate: Gate) -> None:
    expected = scorer_alone(LONG)
    order: list[str] = []

    async def ask(name: str, items: Any) -> Any:
        result = await scorer.async_score(PREFIXES[0], items, return_usage=True)
        order.append(name)
        return result

    async def main() -> list[Any]:
        long = asyncio.create_task(ask("long", LONG))
        await gate.reach()  # its first part runs
        short = [asyncio.create_task(ask(f"short {n}", SHORT)) for n in range(3)]
        await until(lambda: scorer.batcher.stats.queued_requests == 4)
        gate.opened.set()
        return await asyncio.gather(long, *short)

    long, *short = asyncio.run(main())
    assert order[-1] == "long"
    assert scorer.batcher.stats.launches == gate.count >= 3
    close_to(long.scores, expected.scores)
    # as if it had run by itself: the query once
    assert long.usage.computed_prefix_tokens == expected.usage.computed_prefix_tokens == 20
    for name in ("prompt_tokens", "computed_tokens", "input_tokens"):
        assert getattr(long.usage, name) == getattr(expected.usage, name), name
    assert long.usage.flow == "chunked"
    assert [one.usage.cached_tokens for one in short] == [20, 20, 20]


def scorer_alone(items: Any) -> Any:
    return make_scorer().score(PREFIXES[0], items, return_usage=True)


def test_a_short_request_does_not_wait_until_a_long_one_is_encoded(
    scorer: MultiItemScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, reached, opened = scorer._core.encode, threading.Event(), threading.Event()

    def slowly(query: Any, items: list[Any], *args: Any, **options: Any) -> Any:
        if len(items) > 1:
            reached.set()
            assert opened.wait(30)
        return encode(query, items, *args, **options)

    monkeypatch.setattr(scorer._core, "encode", slowly)

    async def main() -> None:
        long = asyncio.create_task(scorer.async_score(PREFIXES[0], [[1] * 400] * 200))
        assert await asyncio.to_thread(reached.wait, 30)
        assert await scorer.async_score(PREFIXES[1], SHORT)
        opened.set()
        assert len(await long) == 200

    asyncio.run(main())


def test_long_requests_of_every_readout_are_put_together(scorer: MultiItemScorer) -> None:
    labels = [LABELS[: 1 + n % 3] for n in range(len(LONG))]

    def across(hidden: list[torch.Tensor]) -> torch.Tensor:
        rows = torch.stack([rows[-1] for rows in hidden])
        return (rows - rows.mean(0)).abs().mean(-1)

    options: list[dict[str, Any]] = [
        {"item_label_token_ids": labels},
        {"readout": Hidden(across)},
        {"readout": Hidden(across, rows=lambda ids: [0, len(ids) - 1])},
    ]
    items = [*LONG[:1000], *LONG[:1000]]  # each twice, far apart

    async def main() -> list[Any]:
        return await asyncio.gather(
            *(scorer.async_score(PREFIXES[1], items, return_usage=True, **one) for one in options)
        )

    found = asyncio.run(main())
    assert scorer.batcher.stats.runs > 3
    for result, one in zip(found, options, strict=True):
        scores = scorer.score(PREFIXES[1], items, **one)
        assert [len(row) for row in result.scores] == [len(row) for row in scores]
        close_to(np.concatenate(result.scores), np.concatenate(scores))
    # those of one item are of one part, which computes it once
    own = sum(map(len, LONG[:1000])) + len(PREFIXES[1])
    assert sum(result.usage.computed_tokens for result in found) <= 3 * own


@pytest.mark.parametrize("options", [{"mask_impl": "dense"}, {"prefix_cache_bytes": 0}], ids=str)
def test_without_pages_or_under_a_dense_mask(options: Any) -> None:
    scorer, items = make_scorer(**options), [random_ids(1 + n % 7, seed=n) for n in range(400)]

    async def main() -> list[Any]:
        return await asyncio.gather(
            *(scorer.async_score(prefix, items[n:]) for n, prefix in enumerate([*PREFIXES[:3], []]))
        )

    for n, found in enumerate(asyncio.run(main())):
        close_to(found, scorer.score([*PREFIXES[:3], []][n], items[n:]))


def test_a_model_that_changes_between_parts_is_one_model_in_the_end(
    scorer: MultiItemScorer, gate: Gate
) -> None:
    def change(count: int) -> None:
        if count == 2:  # the first part has run
            with torch.no_grad():
                scorer.model.get_input_embeddings().weight.mul_(1.5)

    gate.before = change
    gate.opened.set()
    before = make_scorer().score(PREFIXES[0], LONG)

    async def main() -> Any:
        return (
            await asyncio.gather(
                scorer.async_score(PREFIXES[0], LONG), scorer.async_score(PREFIXES[0], LONG[:900])
            )
        )[0]

    found = asyncio.run(main())
    after = scorer.score(PREFIXES[0], LONG)
    assert np.abs(np.subtract(before, after)).max() > 0.01
    close_to(found, after)


def test_a_cancelled_request_runs_no_further(scorer: MultiItemScorer, gate: Gate) -> None:
    async def main() -> None:
        long = asyncio.create_task(scorer.async_score(PREFIXES[0], LONG))
        await gate.reach()
        waiting = asyncio.create_task(scorer.async_score(PREFIXES[1], SHORT))
        await until(lambda: scorer.batcher.stats.queued_requests == 2)
        long.cancel()
        waiting.cancel()
        done = await asyncio.gather(long, waiting, return_exceptions=True)
        assert [type(one) for one in done] == [asyncio.CancelledError] * 2
        assert scorer.batcher.stats.queued_requests == scorer.batcher.stats.queued_tokens == 0
        gate.opened.set()
        await scorer.async_score(PREFIXES[2], SHORT)

    asyncio.run(main())
    stats = scorer.batcher.stats
    assert (stats.cancelled, stats.dropped, stats.answered, stats.launches) == (2, 1, 1, 2)
    assert engine_of(scorer).pool.num_pinned_pages == 0


def test_a_launch_that_fails_takes_its_own_requests_only(
    scorer: MultiItemScorer, gate: Gate
) -> None:
    def fail(count: int) -> None:
        if count == 2:
            raise RuntimeError("the device is gone")

    gate.before = fail
    sync = make_scorer()

    async def main() -> None:
        first = asyncio.create_task(scorer.async_score(PREFIXES[0], SHORT))
        await gate.reach()
        # those of the first prefix find it in pages, those of the second wait for their first
        second = [
            asyncio.create_task(scorer.async_score(PREFIXES[n], [[n, k]]))
            for n in (0, 1)
            for k in range(3)
        ]
        await until(lambda: scorer.batcher.stats.queued_requests == 6)
        gate.opened.set()
        close_to(await first, sync.score(PREFIXES[0], SHORT))
        done = await asyncio.gather(*second, return_exceptions=True)
        failed = [one for one in done if isinstance(one, Exception)]
        assert len(failed) == 4  # the three, and the one that was to compute the second prefix
        assert len({id(one) for one in failed}) == 4
        for one in failed:
            assert isinstance(one, LaunchError)
            assert "launch that this request was in failed (RuntimeError: the device" in str(one)
            assert isinstance(one.__cause__, RuntimeError)
        close_to(done[4], sync.score(PREFIXES[1], [[1, 1]]))
        close_to(await scorer.async_score(PREFIXES[0], SHORT), await first)

    asyncio.run(main())
    assert scorer.batcher.stats.failed == 4
    assert engine_of(scorer).pool.num_pinned_pages == 0


def test_each_request_meets_its_own_error(texts: MultiItemScorer) -> None:
    def ends(_: Any) -> Any:
        raise SystemExit(3)

    endless: list[Any] = []
    endless.append(endless)

    async def main() -> list[Any]:
        return await asyncio.gather(
            texts.async_score("a list", ["one"]),
            texts.async_score("a list", [3.5]),  # type: ignore[list-item]  # what is refused
            texts.async_score("a list", ["a\ud800"]),
            texts.async_rank("a list", ["one"], top_k=0),
            texts.async_decide("state", {"a": {"type": "neither"}}),
            texts.async_score("a list", torch.tensor(3)),
            texts.async_decide(endless, {"a": {"type": "noul"}}),
            texts.async_score("a list", ["one"], readout=Hidden(ends)),
            texts.async_score("a list", ["one"], readout=Hidden(lambda rows: next(iter([])))),
            texts.async_rank("a list", ["one"]),
            return_exceptions=True,
        )

    first, *failed, last = asyncio.run(main())
    close_to(first, texts.score("a list", ["one"]))
    assert last[0]["corpus_id"] == 0
    kinds = [InputTypeError, InputError, InputError, InputError, InputTypeError, InputError]
    assert [type(one) for one in failed] == [*kinds, RuntimeError, RuntimeError]
    assert "items[0]=3.5" in str(failed[0])
    assert "top_k=0" in str(failed[2])


def test_only_scores_that_are_not_finite_raise() -> None:
    scorer = make_scorer()
    with torch.no_grad():
        scorer.model.get_input_embeddings().weight[7] = torch.nan

    async def main() -> list[Any]:
        return await asyncio.gather(
            scorer.async_score([1, 2], [[1], [2, 7]], apply_softmax=True),
            scorer.async_score([1, 2], [[3]], apply_softmax=True),
            return_exceptions=True,
        )

    found = asyncio.run(main())
    assert isinstance(found[0], NonFiniteScoreError)
    assert found[0].indices == (1,)
    close_to(found[1], scorer.score([1, 2], [[3]], apply_softmax=True))


def test_an_unpatched_model_is_told_to_each(scorer: MultiItemScorer, gate: Gate) -> None:
    async def main() -> list[Any]:
        first = asyncio.create_task(scorer.async_score(PREFIXES[0], SHORT))
        await gate.reach()
        others = [asyncio.create_task(scorer.async_score(PREFIXES[n], SHORT)) for n in (1, 2)]
        await until(lambda: scorer.batcher.stats.queued_tokens == 8)
        gate.opened.set()
        await first
        return await asyncio.gather(*others, return_exceptions=True)

    gate.after = lambda _: unpatch_model(scorer.model)
    done = asyncio.run(main())
    assert [type(one) for one in done] == [NotPatchedError] * 2
    assert done[0] is not done[1]
    patch_model(scorer.model)
    assert asyncio.run(scorer.async_score(PREFIXES[1], SHORT))


def test_close_finishes_what_was_accepted(scorer: MultiItemScorer, gate: Gate) -> None:
    batcher = scorer.batcher

    async def main() -> list[Any]:
        calls = [asyncio.create_task(scorer.async_score(x, SHORT)) for x in PREFIXES]
        await gate.reach()
        closing = asyncio.create_task(batcher.aclose())
        await until(lambda: batcher.is_closed)
        with pytest.raises(BatcherClosedError, match=r"scorer\.start_batcher\(\)"):
            await scorer.async_score(PREFIXES[0], SHORT)
        gate.opened.set()
        assert await closing
        return await asyncio.gather(*calls)

    for prefix, found in zip(PREFIXES, asyncio.run(main()), strict=True):
        close_to(found, scorer.score(prefix, SHORT))
    with scorer.start_batcher() as other:
        assert other is scorer.batcher is not batcher
        assert asyncio.run(scorer.async_score(PREFIXES[0], SHORT))
    assert other.is_closed


def test_close_with_a_timeout_fails_what_still_waits(scorer: MultiItemScorer, gate: Gate) -> None:
    batcher = scorer.batcher

    async def main() -> list[Any]:
        running = asyncio.create_task(scorer.async_score(PREFIXES[0], SHORT))
        await gate.reach()
        waiting = asyncio.create_task(scorer.async_score(PREFIXES[1], SHORT))
        await until(lambda: batcher.stats.queued_tokens == 4)
        assert not await batcher.aclose(timeout=0.01)
        gate.opened.set()
        return await asyncio.gather(running, waiting, return_exceptions=True)

    ran, failed = asyncio.run(main())
    close_to(ran, scorer.score(PREFIXES[0], SHORT))
    assert isinstance(failed, BatcherClosedError)


def test_limits_are_given_once(scorer: MultiItemScorer) -> None:
    batcher = scorer.start_batcher(max_requests=2, window_seconds=0)
    assert scorer.batcher is batcher
    with pytest.raises(InputError, match="has a batcher already"):
        scorer.start_batcher()
    with pytest.raises(InputError, match="max_tokens=0 must be at least 1"):
        make_scorer().start_batcher(max_tokens=0)


def test_loops_of_several_threads_and_one_that_is_closed(
    scorer: MultiItemScorer, gate: Gate
) -> None:
    abandoned = asyncio.new_event_loop()

    async def leave() -> None:
        call = asyncio.ensure_future(scorer.async_score(PREFIXES[0], SHORT))
        await gate.reach()
        call.add_done_callback(lambda _: None)

    abandoned.run_until_complete(leave())
    pending = asyncio.all_tasks(abandoned)
    abandoned.close()  # while its request runs
    gate.opened.set()
    found: dict[int, Any] = {}

    def ask(n: int) -> None:
        found[n] = asyncio.run(scorer.async_score(PREFIXES[n], SHORT))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for n in range(4):  # and calls that wait for nobody
        close_to(scorer.score(PREFIXES[n], SHORT), make_scorer().score(PREFIXES[n], SHORT))
    for thread in threads:
        thread.join(30)
    for n in range(4):
        close_to(found[n], scorer.score(PREFIXES[n], SHORT))
    for task in pending:  # nobody ends them any more
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # inner


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_a_queue_of_its_own(scorer: MultiItemScorer, duplicate: Any) -> None:
    expected = asyncio.run(scorer.async_score(PREFIXES[0], SHORT))
    clone = duplicate(scorer)
    assert clone.batcher is not scorer.batcher
    close_to(asyncio.run(clone.async_score(PREFIXES[0], SHORT)), expected)
    assert (scorer.batcher.stats.accepted, clone.batcher.stats.accepted) == (1, 1)


def test_threads_end_with_their_scorer() -> None:
    scorer = make_scorer()
    asyncio.run(scorer.async_score(PREFIXES[0], SHORT))
    threads = [*scorer.batcher._encoder._threads, *scorer.batcher._device._threads]
    core = weakref.ref(scorer._core)
    assert len(threads) == 2
    del scorer
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert core() is None
    assert not any(thread.is_alive() for thread in threads)


def test_a_program_that_ends_waits_for_the_launch_that_runs_alone() -> None:
    printed = run_fresh(
        """
        import asyncio, os, threading, time
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM
        from packscore import MultiItemScorer, patch_model

        torch.set_num_threads(1)
        sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1)
        heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=99)
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).eval()
        scorer = MultiItemScorer(patch_model(model), label_token_ids=[1, 2])
        engine = scorer._core.copies.first
        launch = engine.launch

        def slowly(*args):
            time.sleep(1.5)
            return launch(*args)

        engine.launch = slowly

        async def main():
            items = [[1 + n % 90, n // 90] for n in range(2000)]
            calls = [asyncio.create_task(scorer.async_score([n], items)) for n in range(90)]
            while not scorer.batcher.stats.runs:
                await asyncio.sleep(0.01)
            loop.stop()

        loop = asyncio.new_event_loop()
        loop.create_task(main())
        loop.run_forever()  # leaves all of them, and does not cancel them
        print(scorer.batcher.stats.queued_requests > 50)
        killer = threading.Timer(60, os._exit, [5])  # where all launches are waited for
        killer.daemon = True
        killer.start()
        """
    )
    assert printed.split() == ["True"]
