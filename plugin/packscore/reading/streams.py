"""Scores and answers of what is still arriving, a launch at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import islice
from typing import Any, TypeVar, cast

import numpy as np

from packscore.core import ScoringCore
from packscore.decisions.answers import Answer
from packscore.decisions.questions import Question
from packscore.encoded import EncodedRequest, TokenIds
from packscore.errors import StalePrefixError
from packscore.flows.copies import Copies
from packscore.flows.page_pool import PrefixLease
from packscore.flows.reads import Read
from packscore.flows.runner import Runner
from packscore.inputs import Text
from packscore.reading.decider import Asked, Decider
from packscore.reading.scores import Reading
from packscore.text.encoding import ArgumentNames

T = TypeVar("T")

# Items of a stream's first launch: few, so that the first scores come soon.
FIRST_ITEMS = 8


def prefix_tokens(core: ScoringCore, query: Text) -> TokenIds:
    """i64[prefix_len]: the tokens of a query with its prompt, before any item."""
    return core.encode(query, [], ArgumentNames()).prefix


def stream(
    core: ScoringCore,
    query: Text,
    items: Iterator[Any],
    reading: Reading,
    max_items: int | None,
) -> Iterator[list[float]]:
    """Scores of items as they arrive, a launch at a time; see `MultiItemScorer.score_stream`."""

    def encoded(taken: list[Any], first: int) -> tuple[EncodedRequest, Read]:
        names = _names_from(first)
        request = core.encode(query, taken, names, reading.extra)
        return request, reading.of(request, names)

    tokens = prefix_tokens(core, query)
    with closing(launches(core, tokens, items, encoded, max_items)) as running:
        for first, found in running:
            yield from _numbers_first(core, reading, found, first)


def decide_stream(
    core: ScoringCore,
    decider: Decider,
    state: Any,
    pairs: Iterator[Any],
    permutations: int,
    max_items: int | None,
) -> Iterator[tuple[str, Answer]]:
    """Answers as questions arrive, a launch at a time; see `MultiItemScorer.decide_stream`."""
    tokens = decider.state(state)
    asked: list[Asked] = []

    def encoded(taken: list[tuple[str, Question]], _: int) -> tuple[EncodedRequest, Read]:
        asked[:] = [decider.asked(tokens, dict(taken), permutations)]
        return asked[0].request, asked[0].read

    arriving = decider.read_pairs(pairs)
    with closing(launches(core, tokens, arriving, encoded, max_items)) as running:
        for _, found in running:
            yield from cast("dict[str, Answer]", decider.answers(asked[0], found)).items()


def launches(
    core: ScoringCore,
    tokens: TokenIds,
    items: Iterator[T],
    encoded: Callable[[list[T], int], tuple[EncodedRequest, Read]],
    max_items: int | None,
) -> Generator[tuple[int, Any], None, None]:
    """(number of the first item, what was read of those of a launch) while items arrive.

    Args:
      core: of the scorer.
      tokens: of the prefix, held between launches where there is room.
      items: read only as far as results are asked for.
      encoded: of some items and the number of the first.
      max_items: of a launch.
    """
    first, count = 0, FIRST_ITEMS
    lease: PrefixLease | None = None
    try:
        while taken := list(islice(items, min(count, max_items or count))):
            core.check_ready()
            lease = _still_held(core.copies, tokens, lease)
            request, read = encoded(taken, first)
            same = lease is not None and np.array_equal(request.prefix, tokens)
            try:
                found = core.run_one(request, read, lease=lease if same else None)
            except StalePrefixError:  # the model changed since: it is not the caller's to hold
                found = core.run_one(request, read)
            yield first, found
            first += len(taken)
            # an item of no tokens takes room as well
            if sum(map(len, request.items)) + len(taken) < core.copies.limits.target_tokens:
                count *= 2
    finally:
        if lease is not None:
            lease.release()


def _numbers_first(
    core: ScoringCore, reading: Reading, found: Any, first: int
) -> Iterator[list[float]]:
    """The scores of a launch of a stream whose items before `first` were scored."""
    scores, usage = reading.scores(core, found)
    gaps = usage.non_finite_items
    if gaps and core.on_non_finite == "raise":
        yield from scores[: gaps[0]]
        del scores[: gaps[0]]
    core.check_finite([first + i for i in gaps], scores, "items[{}]".format)
    yield from scores


def _still_held(copies: Copies, tokens: TokenIds, lease: PrefixLease | None) -> PrefixLease | None:
    """The same lease, or a new one where weights or the engines were seen to have changed since.

    The run with it looks at the model.
    """
    if lease is not None and lease.pool in copies.pools and not lease.is_stale:
        return lease
    if lease is not None:
        lease.release()
    runner = Runner(copies)
    return runner.hold(tokens) if runner.can_hold(tokens) else None


def _names_from(first: int) -> ArgumentNames:
    return ArgumentNames(item=lambda i: f"items[{first + i}]")
