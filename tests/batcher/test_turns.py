"""Whose turn it is: nobody waits for long, a launch is filled, and parts make a whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from packscore import EncodedRequest
from packscore.batcher.waiting import Call, Turn, Waiting
from packscore.flows.engine import Limits
from packscore.flows.reads import HiddenRead
from packscore.reading.prepared import Prepared

LIMITS = Limits(max_tokens=32_768, target_tokens=2048, max_groups=8)


def make_call(prefix: int, item_lens: list[int], *, is_kept: bool = True) -> Call:
    """A call whose prefix has ten tokens of one id."""
    nothing: Any = None
    call = Call(nothing, nothing, nothing, nothing)
    items = [np.full(n, i, np.int64) for i, n in enumerate(item_lens)]
    request = EncodedRequest(np.full(10, prefix, np.int64), items)
    call.encoded(Prepared(request, HiddenRead(), lambda found: found), is_kept=is_kept)
    return call


def waiting_of(*calls: Call) -> Waiting:
    waiting = Waiting()
    for call in calls:
        waiting.append(call)
    return waiting


def took(turns: list[Turn], *calls: Call) -> list[int]:
    """Item tokens that each call ran."""
    ran = {turn.call: sum(map(len, turn.request.items)) for turn in turns}
    return [ran.get(call, 0) for call in calls]


def test_long_and_short_take_turns_and_no_launch_has_room_left() -> None:
    long, longer = make_call(1, [10] * 500), make_call(2, [10] * 1000)
    short = [make_call(3 + n, [20]) for n in range(3)]
    waiting = waiting_of(long, longer, *short)
    nothing = {1: 0, 2: 10, 3: 10, 4: 10, 5: 10}  # what the pages lack of each prefix

    def take() -> list[Turn]:
        return waiting.take(LIMITS, lambda prefix: nothing[int(prefix[0])])

    # the first, and what is short; half a launch more has no room, and so the first has it
    assert took(take(), long, longer, *short) == [1950, 0, 20, 20, 20]
    assert waiting.tokens == 5000 + 10_000 - 1950
    # then whoever waited longest
    assert took(take(), longer, long) == [2030, 0]
    late = make_call(5, [20])
    waiting.append(late)
    assert took(take(), longer, long, late) == [0, 2010, 20]
    assert took(take(), longer, long) == [2030, 0]


def test_a_lone_request_fills_launches_by_itself() -> None:
    call = make_call(1, [100] * 50)
    waiting = waiting_of(call)
    assert took(waiting.take(LIMITS, lambda _: 10), call) == [2000]
    assert took(waiting.take(LIMITS, lambda _: 0), call) == [2000]
    (last,) = waiting.take(LIMITS, lambda _: 0)
    assert not last.is_whole
    assert call.is_taken
    assert len(waiting) == waiting.tokens == 0


def test_nobody_starves_behind_those_who_keep_coming() -> None:
    long = make_call(0, [30] * 1000)
    waiting = waiting_of(long)
    turns = 0
    for n in range(1, 200):
        for k in range(20):
            waiting.append(make_call(100 * n + k, [500]))
        turns += any(turn.call is long for turn in waiting.take(LIMITS, lambda _: 10))
    assert turns >= 2
    assert long.tokens < 30_000


def test_equal_prefixes_are_neighbours_and_are_counted_once() -> None:
    calls = [make_call(n % 2, [5]) for n in range(6)]
    waiting = waiting_of(*calls)
    turns = waiting.take(LIMITS, lambda _: 10)
    assert [int(turn.request.prefix[0]) for turn in turns] == [0, 0, 0, 1, 1, 1]
    # ten tokens each of two prefixes and a request of the rest, but not of three
    full = waiting_of(*(make_call(n, [1000]) for n in (0, 0, 1)))
    assert len(full.take(LIMITS, lambda _: 40)) == 2
    assert len(waiting_of(*calls[:0]).take(LIMITS, lambda _: 0)) == 0


def test_what_shares_a_prefix_comes_sooner_but_not_first() -> None:
    calls = [make_call(n, [500]) for n in (1, 2, 3, 4, 5, 2, 1)]
    waiting = waiting_of(*calls)
    turns = [turn.call for turn in waiting.take(LIMITS, lambda _: 10)]
    assert [calls.index(call) for call in turns] == [0, 1, 5, 2]
    turns = [turn.call for turn in waiting.take(LIMITS, lambda _: 10)]
    assert [calls.index(call) for call in turns] == [3, 4, 6]


def test_a_launch_holds_so_many_requests() -> None:
    waiting = waiting_of(*(make_call(n, [1]) for n in range(20)))
    assert waiting.fill(LIMITS)
    assert [len(waiting.take(LIMITS, lambda _: 10)) for _ in range(3)] == [8, 8, 4]


def test_a_prefix_that_nothing_keeps_is_worth_more_items_a_part() -> None:
    prefix = np.zeros(1000, np.int64)
    request = EncodedRequest(prefix, [np.full(10, i, np.int64) for i in range(2000)])
    calls = []
    for is_kept in (True, False):
        calls.append(make_call(1, []))
        calls[-1].encoded(Prepared(request, HiddenRead(), lambda found: found), is_kept=is_kept)
    turns = waiting_of(calls[0], make_call(2, [5])).take(LIMITS, lambda _: 10)
    assert took(turns, calls[0])[0] < 2048
    turns = waiting_of(calls[1], make_call(2, [5])).take(LIMITS, lambda _: 10)
    assert took(turns, calls[1]) == [4000]


@pytest.mark.parametrize("lens", [[], [0], [0, 0, 5000, 1], [3000, 3000]])
def test_every_item_is_in_one_part(lens: list[int]) -> None:
    call = make_call(1, lens)
    waiting, seen = waiting_of(call), []
    while len(waiting):
        waiting.append(make_call(2, [5]))
        for turn in waiting.take(LIMITS, lambda _: 10):
            seen += turn.request.items if turn.call is call else []
    assert sorted(map(len, seen)) == sorted(lens)
