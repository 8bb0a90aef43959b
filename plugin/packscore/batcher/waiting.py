"""Requests that wait, and whose turn it is: in turns, long ones a part at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from packscore.encoded import EncodedRequest, TokenIds
from packscore.errors import RequestTooLargeError
from packscore.flows.cuts import Items
from packscore.flows.engine import Limits
from packscore.flows.parts import item_order, item_tokens, joined, part_of
from packscore.flows.reads import HiddenRows, LabelLogits, Read
from packscore.model.weight_watch import WeightWatch
from packscore.reading.prepared import Prepared

# More is encoded apart, so that no short request waits for it.
LONG_CHARACTERS = 50_000
# A long request takes this share of a launch at a time where others wait.
LONG_SHARE = 0.5
# Nothing is cut for launches of fewer tokens; those of a dense mask hold one request each.
LEAST_ROOM = 1024
# Parts of a request whose prefix nothing keeps are so many times its tokens, as each computes it.
PREFIX_TIMES = 4
NOTHING = np.zeros(0, np.int64)


def extent(given: Any) -> int:
    """About how many characters, or token ids, there are in texts, lists and dicts."""
    if isinstance(given, Mapping):
        return sum(map(extent, given.values()))
    if isinstance(given, list | tuple):
        return sum(map(extent, given))
    return len(given) if isinstance(given, Sized) else 1


def is_long(given: Any) -> bool:
    """Whether it takes long to encode."""
    try:
        return extent(given) > LONG_CHARACTERS
    except Exception:  # it is no text, or without end; who encodes it says so
        return False


@dataclass(eq=False)
class Call:
    """One request on its way through the batcher.

    Args:
      prepare: makes it ready to run.
      given: what that encodes.
      loop: of the task that awaits it.
      future: what that task awaits.
    """

    prepare: Callable[[], Prepared[Any]]
    given: Any
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    has_run: bool = False  # some of it
    ready_at: float = 0.0
    watch: WeightWatch | None = None  # the model of its first part, where there are several
    found: list[LabelLogits | HiddenRows | None] = field(default_factory=list)  # of each part
    _parts: list[Items] = field(default_factory=list)
    _order: Items = field(default_factory=lambda: NOTHING)
    _ends: Items = field(default_factory=lambda: NOTHING)
    _taken: int = 0

    def encoded(self, prepared: Prepared[Any], *, is_kept: bool) -> None:
        """It is ready to run.

        Args:
          prepared: what runs.
          is_kept: the pages can hold its prefix.
        """
        request = prepared.request
        self.prepared, self.ready_at = prepared, time.perf_counter()
        self.prefix = request.prefix.tobytes()
        self.least = 0 if is_kept else PREFIX_TIMES * len(request.prefix)
        self._order = item_order(request)
        self._ends = np.cumsum(item_tokens(request, prepared.read)[self._order])

    def start_over(self) -> None:
        """Nothing has run, whatever still does, and next time all of it runs."""
        self.found, self._parts, self._taken, self.watch = [], [], 0, None
        self.least = self.tokens

    def sees_change(self, model: nn.Module) -> bool:
        """Whether the model is another than that of the first part, where there are several."""
        watch = self.watch
        return watch is not None and watch.sees_change(model)

    def end(self) -> None:
        """What of it still runs is for nobody."""
        self.found = []

    @property
    def tokens(self) -> int:
        """Item tokens that have not run."""
        return int(self._ends[-1]) - self._begin if len(self._ends) else 0

    @property
    def _begin(self) -> int:
        return int(self._ends[self._taken - 1]) if self._taken else 0

    @property
    def is_taken(self) -> bool:
        """Whether nothing of it waits."""
        return self._taken == len(self._order)

    @property
    def is_done(self) -> bool:
        """Whether all of it has run."""
        return self.is_taken and None not in self.found

    def cut(self, tokens: int) -> Turn:
        """Its next items, of at most so many tokens, but one at least."""
        end = int(np.searchsorted(self._ends, self._begin + tokens, "right"))
        end = max(end, min(self._taken + 1, len(self._order)))
        items, self._taken = np.sort(self._order[self._taken : end]), end
        self._parts.append(items)
        self.found.append(None)
        request, read = self.prepared.request, self.prepared.read
        is_whole = len(items) == len(self._order)
        if not is_whole:
            request, read = part_of(request, read, items)
        return Turn(self, request, read, is_whole, len(self.found) - 1, self.found)

    def result(self) -> Any:
        """What its caller gets; raises what is wrong with it."""
        found = [one for one in self.found if one is not None]
        if len(found) == 1:
            return self.prepared.finish(found[0])
        return self.prepared.finish(joined(self.prepared.request, self._parts, found))


def check_size(request: EncodedRequest, most: int | None) -> None:
    """Refuse a request of more tokens than one may have.

    Raises:
      RequestTooLargeError: it has more.
    """
    tokens = len(request.prefix) + sum(map(len, request.items))
    if most is not None and tokens > most:
        raise RequestTooLargeError(
            f"the request has {tokens:,} tokens, over the {most:,} that one may have; send its "
            "items in several"
        )


@dataclass(frozen=True)
class Turn:
    """What a call runs now: the part of this number, for this list of the call's."""

    call: Call
    request: EncodedRequest
    read: Read
    is_whole: bool
    number: int
    found: list[LabelLogits | HiddenRows | None]

    @property
    def is_wanted(self) -> bool:
        """Whether the call has neither ended nor started over since."""
        return self.found is self.call.found


class Waiting:
    """Calls in the order of their turns; not for several threads at once.

    A call that had its turn and has more goes behind all others, so that nobody waits longer than
    one turn of each that came before.
    """

    def __init__(self) -> None:
        self._calls: dict[Call, None] = {}  # in their order
        self.tokens = 0  # of items, of all that wait

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Call]:
        return iter(self._calls)

    def append(self, call: Call) -> None:
        """The last of all."""
        self._calls[call] = None
        self.tokens += call.tokens

    def remove(self, call: Call) -> None:
        """It waits no more, if it did."""
        if call in self._calls:
            del self._calls[call]
            self.tokens -= call.tokens

    def fill(self, limits: Limits) -> bool:
        """Whether they fill a launch."""
        return self.tokens >= limits.target_tokens or len(self) >= limits.max_groups

    def take(self, limits: Limits, missing: Callable[[TokenIds], int]) -> list[Turn]:
        """What runs next: whose turn it is, and others that fit beside it.

        Args:
          limits: of a launch.
          missing: how many tokens of a prefix are in no pages.

        Returns:
          Turns, those of one prefix next to each other.
        """
        turns, rest = [], []
        for call, tokens in self._shares(limits, missing).items():
            self.remove(call)
            turns.append(call.cut(tokens))
            if not call.is_taken:
                rest.append(call)
        for call in rest:
            self.append(call)
        first: dict[bytes, int] = {}
        for i, turn in enumerate(turns):
            first.setdefault(turn.call.prefix, i)
        return sorted(turns, key=lambda turn: first[turn.call.prefix])

    def _shares(self, limits: Limits, missing: Callable[[TokenIds], int]) -> dict[Call, int]:
        """How many item tokens each runs now; some of the first in any case."""
        room = max(limits.target_tokens, LEAST_ROOM)
        half = int(LONG_SHARE * room)
        most = room if len(self) == 1 else half
        shares: dict[Call, int] = {}
        prefixes: set[bytes] = set()
        for call in self._in_turn(half):
            if shares and (room <= 0 or len(shares) == limits.max_groups):
                break
            tokens = min(call.tokens, max(most, call.least))
            if shares and tokens > room:
                continue
            own = 0 if call.prefix in prefixes else missing(call.prepared.request.prefix)
            if shares and own + tokens > room:
                continue
            shares[call] = tokens
            prefixes.add(call.prefix)
            room -= own + tokens
        for call in shares:  # what is left goes to those who have more, in their order
            more = min(call.tokens - shares[call], max(room, 0))
            shares[call] += more
            room -= more
        return shares

    def _in_turn(self, tokens: int) -> list[Call]:
        """By turns up to so many tokens, then what shares a prefix with those, then others."""
        calls = iter(self._calls)
        first: list[Call] = []
        while tokens > 0 and (call := next(calls, None)):
            first.append(call)
            tokens -= call.tokens
        near = {call.prefix for call in first}
        return first + sorted(calls, key=lambda call: call.prefix not in near)
