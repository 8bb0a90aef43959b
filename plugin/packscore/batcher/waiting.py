"""Requests that wait, and whose turn it is: in turns, long ones a part at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from packscore.encoded import EncodedRequest, TokenIds
from packscore.flows.parts import Items, item_order, item_tokens, joined, part_of
from packscore.flows.reads import HiddenRows, LabelLogits, Read
from packscore.reading.prepared import Prepared

# A long request takes this share of a launch at a time where others wait.
LONG_SHARE = 0.5
# Parts of a prefix that nothing keeps are at least so many times its tokens, each computing it.
PREFIX_TIMES = 4


@dataclass(eq=False)
class Call:
    """One request on its way through the batcher.

    Args:
      prepare: makes it ready to run.
      loop: of the task that awaits it.
      future: what that task awaits.
    """

    prepare: Callable[[], Prepared[Any]]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    is_left: bool = False  # nobody waits for its result any more
    has_run: bool = False
    ready_at: float = 0.0
    prefix: bytes = b""
    is_kept: bool = True  # the pages can hold its prefix
    prepared: Prepared[Any] | None = None
    parts: list[Items] = field(default_factory=list)
    found: list[LabelLogits | HiddenRows] = field(default_factory=list)
    _order: Items = field(default_factory=lambda: np.zeros(0, np.int64))
    _ends: Items = field(default_factory=lambda: np.zeros(0, np.int64))
    _taken: int = 0

    def is_ready(self, prepared: Prepared[Any], *, now: float, is_kept: bool) -> None:
        """It was encoded."""
        request = prepared.request
        self.prepared, self.ready_at, self.is_kept = prepared, now, is_kept
        self.prefix = request.prefix.tobytes()
        self._order = item_order(request)
        self._ends = np.cumsum(item_tokens(request, prepared.read)[self._order])

    @property
    def prefix_ids(self) -> TokenIds:
        """i64[prefix_len]."""
        assert self.prepared is not None
        return self.prepared.request.prefix

    @property
    def tokens(self) -> int:
        """Item tokens that have not run."""
        return int(self._ends[-1] - self._begin) if len(self._ends) else 0

    @property
    def _begin(self) -> int:
        return int(self._ends[self._taken - 1]) if self._taken else 0

    @property
    def is_taken(self) -> bool:
        """Whether nothing of it waits."""
        return self._taken == len(self._order)

    def cut(self, tokens: int) -> tuple[EncodedRequest, Read]:
        """Its next items, of at most so many tokens, but one at least."""
        assert self.prepared is not None
        request, read = self.prepared.request, self.prepared.read
        end = int(np.searchsorted(self._ends, self._begin + tokens, "right"))
        end = max(end, min(self._taken + 1, len(self._order)))
        items, self._taken = self._order[self._taken : end], end
        self.parts.append(items)
        is_whole = len(items) == len(self._order)
        return (request, read) if is_whole else part_of(request, read, np.sort(items))

    def whole(self) -> LabelLogits | HiddenRows:
        """What was read of all of its parts."""
        assert self.prepared is not None
        if len(self.parts) == 1:
            return self.found[0]
        return joined(self.prepared.request, [np.sort(part) for part in self.parts], self.found)


@dataclass(frozen=True)
class Turn:
    """What a call runs now."""

    call: Call
    request: EncodedRequest
    read: Read


class Waiting:
    """Calls in the order of their turns; not for several threads at once.

    A call that had its turn and has more goes behind all others, so that nobody waits longer than
    one turn of each that came before.
    """

    def __init__(self) -> None:
        self._calls: deque[Call] = deque()
        self.tokens = 0  # of items, of all that wait

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Call]:
        return iter(self._calls)

    def append(self, call: Call) -> None:
        """The last of all."""
        self._calls.append(call)
        self.tokens += call.tokens

    def remove(self, call: Call) -> bool:
        """Whether it waited; it does no more."""
        if call not in self._calls:
            return False
        self._calls.remove(call)
        self.tokens -= call.tokens
        return True

    def take(self, room: int, most_calls: int, missing: Callable[[TokenIds], int]) -> list[Turn]:
        """What runs next: whose turn it is, and others that fit beside it.

        Args:
          room: tokens of a launch.
          most_calls: calls of a launch.
          missing: how many tokens of a prefix are in no pages.

        Returns:
          Turns, those of one prefix next to each other.
        """
        shares = self._shares(room, most_calls, missing)
        turns, rest = [], []
        for call, tokens in shares.items():
            self._calls.remove(call)
            before = call.tokens
            turns.append(Turn(call, *call.cut(tokens)))
            self.tokens -= before - call.tokens
            if not call.is_taken:
                rest.append(call)
        self._calls += rest
        first: dict[bytes, int] = {}
        for i, turn in enumerate(turns):
            first.setdefault(turn.call.prefix, i)
        return sorted(turns, key=lambda turn: first[turn.call.prefix])

    def _shares(
        self, room: int, most_calls: int, missing: Callable[[TokenIds], int]
    ) -> dict[Call, int]:
        """How many item tokens each may run now; the first in any case."""
        shares: dict[Call, int] = {}
        prefixes: set[bytes] = set()
        most = room if len(self._calls) == 1 else int(room * LONG_SHARE)
        for call in self._calls:
            if len(shares) == most_calls or (shares and room <= 0):
                break
            own = 0 if call.prefix in prefixes else missing(call.prefix_ids)
            least = 0 if call.is_kept else PREFIX_TIMES * len(call.prefix_ids)
            tokens = min(call.tokens, max(most, least))
            if shares and own + tokens > room:
                continue
            shares[call] = tokens
            prefixes.add(call.prefix)
            room -= own + tokens
        for call in shares:
            more = min(call.tokens - shares[call], max(room, 0))
            shares[call] += more
            room -= more
        return shares
