"""Which copy a launch runs on: the one that is free, and where a prefix is; what fails stays apart.

The copies are stand-ins, which note what they are given and are done when a test says.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

from engine_stand_ins import READOUT, StandIn, values_of
from helpers import random_ids
from packscore import EncodedRequest
from packscore.flows.copies import Copies
from packscore.flows.engine import Limits
from packscore.flows.jobs import RequestValues
from packscore.flows.runner import Runner
from page_books import check_books

FAULT = RuntimeError("the device is gone")


def ids(count: int, seed: int) -> Any:
    return np.array(random_ids(count, seed=seed))


def request_of(seed: int, items: int = 3, prefix_len: int = 300) -> EncodedRequest:
    return EncodedRequest(
        ids(prefix_len, seed), [ids(20 + k, 100 * seed + k) for k in range(items)]
    )


def run(engines: list[StandIn], requests: list[EncodedRequest], **options: Any) -> list[Any]:
    """What they gave, which is right; nothing is held or outstanding behind it."""
    copies = Copies(engines)
    runner = Runner(copies, retries=options.pop("retries", True))
    found = runner.run(requests, READOUT, **options)
    check(engines, copies, requests, found)
    return found


def check(
    engines: list[StandIn], copies: Copies, requests: list[EncodedRequest], found: list[Any]
) -> None:
    assert len(found) == len(requests)
    for request, one in zip(requests, found, strict=True):
        if not isinstance(one, Exception):
            assert isinstance(one, RequestValues)
            assert one.values.logits.tolist() == values_of(request).tolist()
            assert one.usage.prompt_tokens == request.prompt_tokens
    assert not any(copies.loads().values())
    for engine in engines:
        if engine.pool is not None:
            check_books(engine.pool, [])


def computed(engines: list[StandIn]) -> Counter[bytes]:
    return sum((engine.computed() for engine in engines), Counter[bytes]())


@pytest.mark.parametrize("is_finishing", [True, False])
def test_a_prefix_is_computed_once_and_all_copies_work(is_finishing: bool) -> None:
    engines = [StandIn() for _ in range(3)]
    for engine in engines:
        engine.is_finishing = is_finishing
    one = request_of(0)
    same = [EncodedRequest(one.prefix, [ids(9, 50 + k), *one.items]) for k in range(5)]
    others = [request_of(1 + k) for k in range(7)]
    requests = [same[0], *others[:3], *same[1:3], *others[3:], *same[3:]]
    run(engines, requests)
    assert all(engine.launched for engine in engines)
    assert computed(engines) == {one.prefix.tobytes(): 300 for one in requests}
    # and once more, where all are in pages
    run(engines, requests)
    assert computed(engines) == {one.prefix.tobytes(): 300 for one in requests}
    assert {sum(one.prefix.tobytes() in x.computed() for x in engines) for one in requests} == {1}


def test_a_frame_that_all_share_is_no_reason_to_wait_for_one_copy() -> None:
    engines = [StandIn() for _ in range(3)]
    frame = ids(40, 0)
    requests = [
        EncodedRequest(np.concatenate([frame, ids(200, 1 + k)]), [ids(30, 90 + k)] * 2)
        for k in range(24)
    ]
    run(engines, requests)
    tokens = [sum(len(batch.token_ids) for batch in engine.launched) for engine in engines]
    assert min(tokens) > 0.7 * max(tokens)
    # once on each
    assert sum(tokens) == 24 * 230 + 3 * 40


def test_a_long_start_is_a_reason_to_wait() -> None:
    engines = [StandIn(), StandIn()]
    start = ids(3000, 0)
    requests = [
        EncodedRequest(np.concatenate([start, ids(50, 1 + k)]), [ids(30, 90 + k)]) for k in range(9)
    ]
    run(engines, requests)
    assert not engines[1].launched
    assert sum(computed(engines).values()) == 3000 + 9 * 50


def test_a_prefix_that_all_ask_for_does_not_leave_copies_idle() -> None:
    engines = [StandIn() for _ in range(3)]
    prefix = ids(300, 0)
    run(engines, [EncodedRequest(prefix, [ids(200, 9 + k)]) for k in range(150)])
    assert computed(engines) == {prefix.tobytes(): 3 * 300}
    counts = [len(engine.launched) for engine in engines]
    assert min(counts) > 0.6 * max(counts)


def test_the_next_launch_is_for_the_copy_that_is_free() -> None:
    engines = [StandIn(), StandIn(), StandIn()]
    engines[2].is_finishing = True
    run(engines, [request_of(k) for k in range(40)])
    counts = [len(engine.launched) for engine in engines]
    # the others never are, and have one each when the third is busy with nothing
    assert counts[:2] == [1, 1]
    assert counts[2] > 10


def test_work_is_shared_by_what_it_is_predicted_to_take() -> None:
    engines = [StandIn(), StandIn()]
    long, *short = request_of(0, items=40, prefix_len=2000), *(request_of(k) for k in range(1, 9))
    run(engines, [long, *short])
    assert 0 in engines[0].requests
    assert engines[1].requests == set(range(1, 9))


@pytest.mark.parametrize("method", ["failing", "unread"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_fault_of_one_copy_stays_with_its_launch(method: str, number: int) -> None:
    engines = [StandIn() for _ in range(3)]
    getattr(engines[1], method)[number] = FAULT
    requests = [request_of(k) for k in range(12)]
    found = run(engines, requests, retries=False)
    failed = {k for k, one in enumerate(found) if isinstance(one, Exception)}
    assert failed == {share.request for share in engines[1].launched[number - 1].shares}
    assert 0 < len(failed) < 6


def test_others_run_again_where_one_copy_fails() -> None:
    engines = [StandIn(), StandIn()]
    engines[1].failing[1] = FAULT
    found = run(engines, [request_of(k) for k in range(6)])
    assert not any(isinstance(one, Exception) for one in found)


def test_memory_that_is_short_on_one_copy_halves_launches_on_all() -> None:
    engines = [StandIn(target=2000), StandIn(target=2000)]
    engines[1].room = 700
    run(engines, [request_of(k) for k in range(12)])
    assert all(len(engine.launched[-1].token_ids) <= 700 for engine in engines)


def test_what_a_launch_can_hold_is_what_all_can() -> None:
    engines = [StandIn(target=2000), StandIn(target=700)]
    assert Copies(engines).limits == Limits(2**14, 700, 64)
    run(engines, [request_of(k) for k in range(12)])
    assert max(len(batch.token_ids) for x in engines for batch in x.launched) <= 700


def test_a_copy_whose_pages_are_held_sends_prefixes_to_another() -> None:
    engines = [StandIn(num_pages=4), StandIn(num_pages=40)]
    pool = engines[0].pool
    assert pool is not None
    lease = pool.acquire(ids(4 * 128, 77))
    assert lease is not None
    copies = Copies(engines)
    requests = [request_of(k) for k in range(6)]
    found = Runner(copies).run(requests, READOUT)
    lease.release()
    check(engines, copies, requests, found)
    assert computed([engines[1]]) == {one.prefix.tobytes(): 300 for one in requests}
    assert not engines[0].launched


@pytest.mark.parametrize("num_pages", [0, 2])
def test_without_room_for_pages_launches_run_wherever(num_pages: int) -> None:
    engines = [StandIn(num_pages=num_pages, most=500) for _ in range(3)]
    run(engines, [request_of(k, items=30) for k in range(2)])
    assert all(engine.launched for engine in engines)
    assert all(len(engine.requests) == 2 for engine in engines)


def test_held_prefixes_lie_on_different_copies_and_stay_there() -> None:
    engines = [StandIn() for _ in range(3)]
    copies = Copies(engines)
    runner = Runner(copies)
    held = [request_of(k, items=60) for k in range(5)]
    leases = [runner.hold(one.prefix, READOUT) for one in held]
    pools = [lease.pool for lease in leases if lease]
    assert [sum(pool is engine.pool for pool in pools) for engine in engines] == [2, 2, 1]
    again = runner.hold(held[0].prefix, READOUT)
    assert again is not None
    assert again.pool is pools[0]
    for one, lease in zip(held, leases, strict=True):
        assert lease is not None
        before = [len(engine.launched) for engine in engines]
        (found,) = runner.run([one], READOUT, lease=lease)
        assert found.values.logits.tolist() == values_of(one).tolist()
        used = [len(x.launched) > n for x, n in zip(engines, before, strict=True)]
        assert used == [engine.pool is lease.pool for engine in engines]
    for lease in (*leases, again):
        assert lease is not None
        lease.release()
    assert computed(engines) == {one.prefix.tobytes(): 300 for one in held}
    check(engines, copies, [], [])


class TestCuts:
    """One request on a machine with nothing else to do."""

    def big(self) -> EncodedRequest:
        items = [ids(5 + k % 50, k) for k in range(200)]
        order = [*range(200), 3, 3, 150, 7]  # some are there again
        rows = [np.arange(-1 if k % 3 else 0, min(k % 4, 3)) for k in range(200)]
        return EncodedRequest(
            ids(300, 1), [items[k] for k in order], [4, 201], [0], [rows[k] for k in order]
        )

    def test_it_is_cut_over_the_copies_and_put_together(self) -> None:
        engines = [StandIn(target=2**13) for _ in range(3)]
        request = self.big()
        (found,) = run(engines, [request])
        assert [len(engine.launched) for engine in engines] == [1, 1, 1]
        tokens = [len(engine.launched[0].token_ids) for engine in engines]
        assert max(tokens) - min(tokens) < 100
        usage = found.usage
        assert usage.computed_tokens == sum(tokens)
        assert usage.computed_prefix_tokens >= 3 * 300
        assert usage.prefix_tokens_saved == request.prompt_tokens - sum(tokens)
        assert (usage.truncated_items, usage.special_token_items) == ((4, 201), (0,))
        assert usage.flow == "chunked"
        (again,) = run(engines, [request])
        # but for its last token, which is read, and so runs again on each
        assert (again.usage.flow, again.usage.cached_tokens) == ("extend", 297)

    @pytest.mark.parametrize("why", ["busy", "small", "named", "held", "many"])
    def test_it_is_whole_where_that_is_better(self, why: str) -> None:
        engines = [StandIn(target=2**13) for _ in range(3)]
        copies = Copies(engines)
        runner, request, options = Runner(copies), self.big(), {}
        requests = [request]
        if why == "busy":
            blank = StandIn()
            Runner(Copies([blank])).run([request_of(5)], READOUT)
            for engine in engines[1:]:
                copies.starts(engine, blank.launched[0])
        if why == "small":
            requests = [EncodedRequest(ids(300, 1), [ids(9, k) for k in range(6)])]
        if why == "named":
            options["flow"] = "packed"
        if why == "held":
            options["lease"] = runner.hold(request.prefix, READOUT)
        if why == "many":
            requests = [
                EncodedRequest(ids(300, k), request.items, rows=request.rows) for k in (1, 2)
            ]
        found = runner.run(requests, READOUT, **options)
        for one, right in zip(found, requests, strict=True):
            assert one.values.logits.tolist() == values_of(right).tolist()
        parts = [x for engine in engines for x in engine.launched if x.rows.size]
        assert len(parts) == len(requests)

    def test_the_fault_of_a_part_is_the_requests(self) -> None:
        engines = [StandIn(target=2**13) for _ in range(2)]
        engines[1].failing[1] = FAULT
        assert run(engines, [self.big()], retries=False) == [FAULT]
        assert not isinstance(run(engines, [self.big()])[0], Exception)

    def test_explain_says_so(self) -> None:
        engines = [StandIn(target=2**13) for _ in range(3)]
        runner = Runner(Copies(engines))
        found = runner.explain(self.big())
        assert found.num_copies == 3
        assert "cut over 3 copies" in str(found)
        assert "copies" not in str(runner.explain(request_of(1)))
        assert [engine.refreshed for engine in engines] == [2, 2, 2]


def test_a_calibration_is_of_all_copies() -> None:
    engines = [StandIn(), StandIn()]
    copies = Copies(engines)
    Runner(copies).calibrate(0.01)
    assert engines[0].costs is engines[1].costs
    assert engines[0].costs.source == "measured on this machine"
    assert not any(copies.loads().values())


def test_one_engine_is_asked_nothing_more() -> None:
    engine = StandIn()
    run([engine], [request_of(k) for k in range(12)])
    run([engine], [request_of(20, items=200)])
    assert engine.asked == 0


def test_runs_in_several_threads_take_different_copies() -> None:
    """Each launch waits until as many run at once as there are copies."""
    engines = [StandIn() for _ in range(3)]
    together = threading.Barrier(3, timeout=20)
    for engine in engines:

        def launch(batch: Any, readout: Any, launch: Any = engine.launch) -> Any:
            together.wait()
            return launch(batch, readout)

        def acquire(tokens: Any, acquire: Any = engine.pool.acquire) -> Any:
            time.sleep(0.02)  # between the choice of a copy and the launch that is counted to it
            return acquire(tokens)

        engine.launch, engine.pool.acquire = launch, acquire
    copies = Copies(engines)
    requests = [request_of(k) for k in range(12)]
    found: list[Any] = [None] * 12

    def work(thread: int) -> None:
        for k in range(thread, 12, 3):
            (found[k],) = Runner(copies, retries=False).run([requests[k]], READOUT)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(engines, copies, requests, found)
    assert not any(isinstance(one, Exception) for one in found)
    assert [len(engine.launched) for engine in engines] == [4, 4, 4]
