"""Pages of prefixes: found by content, shared, pinned, evicted, and none is ever lost."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from packscore import StalePrefixError
from packscore.flows import page_pool
from packscore.flows.page_pool import MIN_SHARED_TOKENS, PagePool, PrefixLease, common_len
from packscore_kernels.hardware import cdiv
from page_books import check_books

PAGE = 32


def ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, length)


def keep(pool: PagePool, tokens: np.ndarray) -> PrefixLease:
    """Compute a prefix and leave it in the pool, as a request does."""
    lease = pool.acquire(tokens)
    assert lease is not None
    lease.commit()
    lease.release()
    return lease


@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 3 * PAGE + 7])
def test_a_prefix_is_computed_once(length: int) -> None:
    pool = PagePool(8, PAGE)
    first = pool.acquire(ids(length))
    assert first is not None
    assert (first.cached_len, len(first.pages)) == (0, cdiv(length, PAGE))
    # until it is committed nobody finds it, because nothing is written
    assert pool.cached_len(ids(length)) == 0
    first.commit()
    second = pool.acquire(ids(length))
    assert second is not None
    assert second.is_whole
    assert second.copied_page is None
    assert second.pages.tolist() == first.pages.tolist()
    first.release()
    second.release()
    assert pool.num_pinned_pages == 0
    assert pool.num_free_pages == 8 - cdiv(length, PAGE)


def test_a_page_that_would_be_copied_is_given_up_where_only_that_leaves_room() -> None:
    pool = PagePool(3, PAGE)
    first = ids(PAGE + MIN_SHARED_TOKENS + 3)
    keep(pool, first)
    other = np.concatenate([first[:-3], ids(2 * PAGE - MIN_SHARED_TOKENS, seed=1)])
    assert pool.has_room(other)
    lease = pool.acquire(other)
    assert lease is not None
    assert (lease.cached_len, lease.copied_page, len(lease.pages)) == (PAGE, None, 3)
    lease.commit()
    lease.release()
    check_books(pool, [])
    assert pool.cached_len(other) == 3 * PAGE


@pytest.mark.parametrize("shared", [PAGE, 2 * PAGE, PAGE + MIN_SHARED_TOKENS, 2 * PAGE + 31])
def test_prefixes_share_their_common_start(shared: int) -> None:
    pool = PagePool(16, PAGE)
    system = ids(shared)
    a = keep(pool, np.concatenate([system, ids(50, seed=1)]))
    b = pool.acquire(np.concatenate([system, [5000], ids(50, seed=2)]))
    assert b is not None
    assert b.cached_len == shared
    full = shared // PAGE
    assert b.pages[:full].tolist() == a.pages[:full].tolist()
    assert not set(b.pages[full:].tolist()) & set(a.pages.tolist())
    # the page where they part is copied, never written under the other's feet
    assert b.copied_page == (int(a.pages[full]) if shared % PAGE else None)


def test_the_start_of_a_longer_prefix_is_read_where_it_is() -> None:
    pool = PagePool(8, PAGE)
    long = keep(pool, ids(90))
    short = pool.acquire(ids(90)[:70])
    assert short is not None
    assert short.is_whole
    assert short.copied_page is None
    assert short.pages.tolist() == long.pages.tolist()


def test_a_few_common_tokens_are_not_worth_a_page_copy() -> None:
    pool = PagePool(8, PAGE)
    keep(pool, ids(60))
    other = np.concatenate([ids(60)[: MIN_SHARED_TOKENS - 1], ids(20, seed=1) + 1000])
    lease = pool.acquire(other)
    assert lease is not None
    assert (lease.cached_len, lease.copied_page) == (0, None)


def test_the_least_recently_used_goes_first_and_leaves_before_roots() -> None:
    pool = PagePool(4, PAGE)
    keep(pool, ids(2 * PAGE, seed=1))
    keep(pool, ids(2 * PAGE, seed=2))
    keep(pool, ids(2 * PAGE, seed=1))  # used again
    keep(pool, ids(PAGE, seed=3))  # takes one page: the end of prefix 2
    assert pool.cached_len(ids(2 * PAGE, seed=1)) == 2 * PAGE
    assert pool.cached_len(ids(2 * PAGE, seed=2)) == PAGE
    assert pool.cached_len(ids(PAGE, seed=3)) == PAGE


def test_what_is_held_is_never_evicted() -> None:
    pool = PagePool(4, PAGE)
    held = pool.acquire(ids(3 * PAGE, seed=1))
    assert held is not None
    held.commit()
    for seed in range(2, 9):
        keep(pool, ids(PAGE, seed=seed))
    assert pool.acquire(ids(2 * PAGE, seed=9)) is None
    assert pool.num_pinned_pages == 3  # the failed attempt pinned nothing
    assert pool.cached_len(held.tokens) == 3 * PAGE
    held.check()
    held.release()
    assert pool.acquire(ids(4 * PAGE, seed=9)) is not None


def test_released_uncommitted_pages_are_free_and_found_by_nobody() -> None:
    pool = PagePool(4, PAGE)
    lease = pool.acquire(ids(100))
    assert lease is not None
    lease.release()
    lease.release()
    lease.commit()
    assert pool.num_free_pages == 4
    assert pool.cached_len(ids(100)) == 0


def test_stale_leases_raise() -> None:
    pool = PagePool(8, PAGE)
    released, cleared = keep(pool, ids(40)), pool.acquire(ids(40))
    assert cleared is not None
    with pytest.raises(StalePrefixError, match=r"the prefix was released; open a new one"):
        released.check()
    cleared.check()
    pool.clear()
    with pytest.raises(
        StalePrefixError, match=r"other weights, or its pages were cleared; open a new one"
    ):
        cleared.check()
    assert pool.cached_len(ids(40)) == 0
    cleared.release()
    assert pool.num_free_pages == 8


def test_neighbouring_pages_are_preferred() -> None:
    pool = PagePool(8, PAGE)
    leases = [pool.acquire(ids(PAGE, seed=seed)) for seed in range(8)]
    for i in (1, 4, 5, 6):
        lease = leases[i]
        assert lease is not None
        lease.release()
    run, rest = pool.acquire(ids(3 * PAGE, seed=9)), pool.acquire(ids(PAGE, seed=10))
    assert run is not None
    assert rest is not None
    assert run.pages.tolist() == [4, 5, 6]
    assert rest.pages.tolist() == [1]


def test_common_len() -> None:
    assert common_len(ids(0), ids(5)) == 0
    assert common_len(ids(5), ids(5)) == 5
    assert common_len(np.array([1, 2, 3]), np.array([1, 2, 4, 5])) == 2


class PoolMachine(RuleBasedStateMachine):
    """Random acquires, commits, releases and clears over prefixes that share their starts.

    `written` is the model: what a device would hold in every slot of every page.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6, 20)
        self.leases: list[PrefixLease] = []
        self.written = np.full((6, 20), -1)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def acquire(self, tokens: list[int]) -> None:
        # runs of one token, so that starts are shared beyond MIN_SHARED_TOKENS and part in a page
        lease = self.pool.acquire(np.repeat(tokens, 6)[:70].astype(np.int64))
        if lease is not None:
            self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0), then_release=st.booleans(), pieces=st.booleans())
    def commit(self, which: int, then_release: bool, pieces: bool) -> None:
        lease = self.leases[which % len(self.leases)]
        if pieces and lease.copied_page is None:
            end = (lease.cached_len // 20 + 1) * 20
            if end < len(lease.tokens):
                for i in range(lease.cached_len, end):
                    self.written[lease.pages[i // 20], i % 20] = lease.tokens[i]
                lease.commit(end)
        if lease.copied_page is not None:
            self.written[lease.pages[lease.cached_len // 20]] = self.written[lease.copied_page]
        for i in range(lease.cached_len, len(lease.tokens)):
            self.written[lease.pages[i // 20], i % 20] = lease.tokens[i]
        lease.commit()
        if then_release:
            self.leases.remove(lease)
            lease.release()

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0))
    def release(self, which: int) -> None:
        self.leases.pop(which % len(self.leases)).release()

    @rule()
    def clear(self) -> None:
        self.pool.clear()

    @invariant()
    def every_lease_reads_its_own_tokens(self) -> None:
        for lease in self.leases:
            pages = lease.pages.copy()
            if lease.copied_page is not None:
                pages[lease.cached_len // 20] = lease.copied_page
            slots = self.written[pages].reshape(-1)[: lease.cached_len]
            assert slots.tolist() == lease.tokens[: lease.cached_len].tolist()

    @invariant()
    def the_books_balance(self) -> None:
        check_books(self.pool, self.leases)

    def teardown(self) -> None:
        for lease in self.leases:
            lease.release()
        self.pool.clear()
        assert self.pool.num_free_pages == self.pool.num_pages


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def test_no_page_leaks_in_ten_thousand_steps() -> None:
    rng = np.random.default_rng(0)
    pool = PagePool(24, PAGE)
    leases: list[PrefixLease] = []
    refused = 0
    for _ in range(10_000):
        if leases and rng.random() < 0.55:
            lease = leases.pop(int(rng.integers(len(leases))))
            if rng.random() < 0.7:
                lease.commit()
            lease.release()
            continue
        common = ids(200, seed=int(rng.integers(3)))[: int(rng.integers(0, 200))]
        new = pool.acquire(np.concatenate([common, rng.integers(0, 1000, rng.integers(1, 90))]))
        refused += new is None
        if new is not None:
            leases.append(new)
    assert refused > 100  # there was pressure
    check_books(pool, leases)
    for lease in leases:
        lease.release()
    assert pool.num_pinned_pages == 0
    pool.clear()
    assert pool.num_free_pages == 24


def interrupted(run: Callable[[], object], at: int) -> bool:
    """Ctrl-C before the `at`th line of the pool's own code that `run` reaches; whether it came."""
    lines = itertools.count()

    def trace(frame: Any, event: str, _: object) -> Any:
        if frame.f_code.co_filename != page_pool.__file__:
            return None
        if event == "line" and next(lines) == at:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def check_whole(pool: PagePool) -> None:
    """Nobody holds a lease: all pages can be had, each by one."""
    assert pool.num_pinned_pages == 0
    lease = pool.acquire(np.arange(10_000, 10_000 + pool.num_pages * pool.page_size))
    assert lease is not None
    assert sorted(lease.pages.tolist()) == list(range(pool.num_pages))
    lease.release()


@pytest.mark.parametrize("name", ["acquire", "commit", "release", "clear", "evict"])
def test_an_interrupt_anywhere_loses_no_page(name: str) -> None:
    size, prefix, other = 4, np.arange(10), np.array([*range(6), 99, 98, 97])
    count = 0
    for at in itertools.count():
        pool = PagePool(6, size)
        first = pool.acquire(prefix)
        assert first is not None
        if name != "commit":
            first.commit()
        held = pool.acquire(other) if name in ("clear", "evict") else None
        if name == "evict":
            first.release()
        run: Callable[[], object] = {
            "acquire": lambda pool=pool: pool.acquire(other),
            "commit": first.commit,
            "release": first.release,
            "clear": pool.clear,
            "evict": lambda pool=pool: pool.acquire(np.arange(50, 62)),
        }[name]
        came = interrupted(run, at)
        # who still has a lease has pages of his own, or knows that they are lost
        fresh = pool.acquire(np.arange(200, 204))
        for lease in (first, held):
            if lease is not None and not lease.is_stale and fresh is not None:
                assert not set(lease.pages.tolist()) & set(fresh.pages.tolist())
        del run, first, held, fresh, lease
        check_whole(pool)
        count += came
        if not came:
            break
    assert count > 5


def test_a_lease_that_nobody_has_any_more_is_released() -> None:
    pool = PagePool(4, 4)
    lease = pool.acquire(np.arange(10))
    assert lease is not None
    lease.commit()
    assert pool.num_pinned_pages == 3
    del lease
    assert pool.num_pinned_pages == 0
    assert pool.cached_len(np.arange(10)) == 10
    dropped = pool.acquire(np.arange(100, 116))  # never committed: free again
    assert dropped is not None
    del dropped
    assert pool.num_free_pages == 4
