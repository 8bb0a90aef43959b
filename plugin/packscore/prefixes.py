"""A query held on the device, and scores of items while they arrive."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from types import TracebackType
from typing import Any, Literal, Self, overload

import numpy as np

from packscore.core import ScoringCore
from packscore.encoded import EncodedRequest, TokenIds
from packscore.errors import InputError, StalePrefixError
from packscore.flows.engine import Engine
from packscore.flows.page_pool import PrefixLease
from packscore.flows.reads import Read
from packscore.flows.runner import Runner
from packscore.inputs import Text, as_list, checked
from packscore.reading import Reading, reading_of
from packscore.readouts import Readout
from packscore.results import ScoreResult
from packscore.telling import counted, cut, telling
from packscore.text.encoding import ArgumentNames
from packscore.text.labels import LabelIds

logger = logging.getLogger("packscore")

# Items of a stream's first launch: few, so that the first scores come soon.
FIRST_ITEMS = 8


@functools.cache  # once is enough
def _tell_that_nothing_is_kept() -> None:
    logger.warning(
        "a dense mask in torch keeps no pages: every score of a held query computes it anew"
    )


class Prefix:
    """A query whose keys and values stay on the device until `release`; `scorer.prefix(query)`.

    Args:
      core: of the scorer.
      query: text or token ids.

    Raises:
      InputError: it does not fit into `prefix_cache_bytes` beside what is held.
    """

    def __init__(self, core: ScoringCore, query: Text) -> None:
        core.check_ready()
        self._core = core
        self._query = query
        self._engine = core.engine
        self._tokens = prefix_tokens(core, query)
        self._lease = self._hold()

    @telling
    def __repr__(self) -> str:
        state = "kept nowhere"
        if self._lease is not None:
            state = "released" if self._lease.is_released else "held"
            state = "stale" if self._lease.is_stale and state == "held" else state
        return f"{cut(self._query)}, {counted(len(self._tokens), 'token')}, {state}"

    def _hold(self) -> PrefixLease | None:
        if not len(self._tokens):
            return None
        lease = Runner(self._engine).hold(self._tokens)
        if not self._engine.keeps_pages:
            _tell_that_nothing_is_kept()
        elif lease is None and self._engine.only_flow is None:
            pool = self._engine.pool
            free = (pool.num_pages - pool.num_pinned_pages) * pool.page_size if pool else 0
            raise InputError(
                f"query has {len(self._tokens)} tokens with its prompt, and "
                f"prefix_cache_bytes={self._core.prefix_cache_bytes} has room for {free} that are "
                "not held; release other prefixes or pass a larger prefix_cache_bytes"
            )
        return lease

    @overload
    def score(
        self,
        items: Iterable[Text],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        item_labels: Sequence[Sequence[str]] | None = None,
        item_label_token_ids: Sequence[LabelIds] | None = None,
        apply_softmax: bool = False,
        readout: Readout | None = None,
        return_usage: Literal[False] = False,
    ) -> list[list[float]]: ...

    @overload
    def score(
        self,
        items: Iterable[Text],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        item_labels: Sequence[Sequence[str]] | None = None,
        item_label_token_ids: Sequence[LabelIds] | None = None,
        apply_softmax: bool = False,
        readout: Readout | None = None,
        return_usage: Literal[True],
    ) -> ScoreResult[list[list[float]]]: ...

    @checked
    def score(
        self,
        items: Iterable[Text],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        item_labels: Sequence[Sequence[str]] | None = None,
        item_label_token_ids: Sequence[LabelIds] | None = None,
        apply_softmax: bool = False,
        readout: Readout | None = None,
        return_usage: bool = False,
    ) -> list[list[float]] | ScoreResult[list[list[float]]]:
        """`MultiItemScorer.score` for the query that is held.

        Raises:
          StalePrefixError: the query was released, or the model's weights changed since.
          InputError, InputTypeError: an argument cannot be scored.
          NonFiniteScoreError: as `MultiItemScorer.score` raises it.
        """
        self._core.check_ready()
        self._check_held()
        given, names = as_list("items", items, may_be_empty=True), ArgumentNames()
        reading = reading_of(
            self._core,
            len(given),
            labels=labels,
            label_token_ids=label_token_ids,
            item_labels=item_labels,
            item_label_token_ids=item_label_token_ids,
            apply_softmax=apply_softmax,
            readout=readout,
        )
        request = self._core.encode(self._query, given, names, reading.extra)
        found = self._run(request, reading.of(request, names))
        return reading.scored(self._core, found, return_usage)

    def _run(self, request: EncodedRequest, read: Read) -> Any:
        """What is read of a request that begins with the query that is held."""
        # the encoder may cut query and items elsewhere for these items; then the pool finds what
        # is held by content
        same = np.array_equal(request.prefix, self._tokens)
        lease = self._lease if same else None
        if not same:  # a run with the lease looks at the model itself
            self.check()
        return self._core.run_one(request, read, lease=lease)

    def check(self) -> None:
        """Refuse to score what is no longer there.

        Raises:
          StalePrefixError: the query was released, or the model's weights changed since.
        """
        self._check_held()
        self._engine.refresh()
        self._check_held()

    def _check_held(self) -> None:
        """The same by what was last seen of the model."""
        if self._core.engine is not self._engine:
            raise StalePrefixError(
                "the prefix was computed before the model was patched anew; open a new one with "
                "scorer.prefix(query)"
            )
        if self._lease is not None:
            self._lease.check()

    def release(self) -> None:
        """Let the pages go; they stay until their room is needed. Twice is once."""
        if self._lease is not None:
            self._lease.release()

    def __enter__(self) -> Self:
        try:
            self.check()
        except BaseException:  # the block does not run, and so not its end
            self.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


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
    tokens, first, count = prefix_tokens(core, query), 0, FIRST_ITEMS
    lease: PrefixLease | None = None
    try:
        while taken := list(islice(items, min(count, max_items or count))):
            core.check_ready()
            lease = _still_held(core.engine, tokens, lease)
            names = _names_from(first)
            request = core.encode(query, taken, names, reading.extra)
            same = lease is not None and np.array_equal(request.prefix, tokens)
            run = functools.partial(core.run_one, request, reading.of(request, names))
            try:
                found = run(lease=lease if same else None)
            except StalePrefixError:  # the model changed since: it is not the caller's to hold
                found = run()
            yield from _numbers_first(core, reading, found, first)
            first += len(taken)
            # an item of no tokens takes room as well
            if sum(map(len, request.items)) + len(taken) < core.engine.limits.target_tokens:
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


def _still_held(engine: Engine, tokens: TokenIds, lease: PrefixLease | None) -> PrefixLease | None:
    """The same lease, or a new one where weights or the engine were seen to have changed since.

    The run with it looks at the model.
    """
    if lease is not None and lease.pool is engine.pool and not lease.is_stale:
        return lease
    if lease is not None:
        lease.release()
    runner = Runner(engine)
    return runner.hold(tokens) if runner.can_hold(tokens) else None


def _names_from(first: int) -> ArgumentNames:
    return ArgumentNames(item=lambda i: f"items[{first + i}]")
