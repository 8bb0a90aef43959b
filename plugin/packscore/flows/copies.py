"""The engines of one model, each with pages of its own: which is free, and what all agree on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from packscore.encoded import TokenIds
from packscore.flows.costs import CostModel
from packscore.flows.engine import Engine, Limits
from packscore.flows.packing import PackedBatch
from packscore.flows.page_pool import PagePool
from packscore.results import Flow, MaskImpl


@dataclass(eq=False)
class Going:
    """A launch from its beginning until it was read.

    Args:
      engine: whose.
      cost_ms: predicted; 0 where there is one copy, of which nobody asks.
      launched: what the engine gave for it; None while it still starts the launch.
    """

    engine: Engine
    cost_ms: float = 0.0
    launched: Any = None

    @property
    def is_done(self) -> bool:
        """Whether its copy has computed it."""
        if self.launched is None:
            return False
        try:
            return self.engine.is_done(self.launched)
        except Exception:  # it failed, as who reads it is told
            return True


@dataclass(eq=False)
class _Work:
    """What one copy has to do, and what it was ever given."""

    going: deque[Going] = field(default_factory=deque)  # in the order that they are done in
    given_ms: float = 0.0

    def outstanding_ms(self) -> float:
        while self.going and self.going[0].is_done:
            self.going.popleft()
        return sum(one.cost_ms for one in self.going)


class Copies:
    """The engines that one scorer runs on: copies of its model, on a device or several each.

    Any number of runs in any number of threads share them. One copy is asked and counted nothing.

    Args:
      engines: one at least, of one model and one kind of mask.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = tuple(engines)
        self._work = {engine: _Work() for engine in engines}
        self._lock = threading.Lock()
        self._turn = threading.Lock()

    def __len__(self) -> int:
        return len(self._engines)

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._engines)

    @property
    def first(self) -> Engine:
        """One of them, for what is the same of all."""
        return self._engines[0]

    @property
    def is_alone(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self._engines) == 1

    @property
    def mask_impl(self) -> MaskImpl:
        """How items are kept apart."""
        return self.first.mask_impl

    @property
    def keeps_pages(self) -> bool:
        """Whether they could keep pages."""
        return self.first.keeps_pages

    @property
    def whole_last(self) -> str | None:
        """Why the last layer runs for all tokens; None: where it is read."""
        return self.first.whole_last

    @property
    def only_flow(self) -> Flow | None:
        """The one flow that some of them can run now; None: all of them can run all."""
        return next((one.only_flow for one in self if one.only_flow is not None), None)

    @property
    def limits(self) -> Limits:
        """What a launch can hold, on whichever it runs."""
        return Limits.least([one.limits for one in self])

    @property
    def costs(self) -> CostModel:
        """Of a launch on any of them, which a calibration may change."""
        return self.first.costs

    @costs.setter
    def costs(self, costs: CostModel) -> None:
        for engine in self:
            engine.costs = costs

    @property
    def pools(self) -> list[PagePool]:
        """Their pages, of those that have some."""
        return [one.pool for one in self if one.pool is not None]

    def refresh(self, *, force: bool = False) -> None:
        """All of them follow the model, as `Engine.refresh` has it."""
        for engine in self:
            engine.refresh(force=force)

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether a launch failed, or its reading, for a device's memory was short."""
        return self.first.is_out_of_memory(error)

    def clear(self) -> None:
        """Forget every prefix."""
        for pool in self.pools:
            pool.clear()

    def cached_len(self, prefix: TokenIds) -> int:
        """How many tokens of a prefix are in the pages of the copy that has most of it."""
        return max((pool.cached_len(prefix) for pool in self.pools), default=0)

    def has_room(self, prefix: TokenIds) -> bool:
        """Whether the pages that nobody holds suffice for a prefix somewhere."""
        return any(pool.has_room(prefix) for pool in self.pools)

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """One launch is put together at a time, until `starts` has counted it to its copy."""
        if self.is_alone:
            yield
            return
        with self._turn:
            yield

    def loads(self) -> dict[Engine, float]:
        """Predicted milliseconds that each has still to do, the one that is free first.

        Of several that have as much to do the one that was given least comes first.
        """
        if self.is_alone:
            return {self.first: 0.0}
        with self._lock:
            found = {engine: work.outstanding_ms() for engine, work in self._work.items()}
            ranks = {engine: (ms, self._work[engine].given_ms) for engine, ms in found.items()}
        return {engine: found[engine] for engine in sorted(found, key=ranks.__getitem__)}

    def by_prefix(self, prefix: TokenIds) -> list[Engine]:
        """Those with pages, the one that has most of a prefix first, of equal ones the free one."""
        with_pages = [engine for engine in self.loads() if engine.pool is not None]
        if self.is_alone:
            return with_pages
        return sorted(with_pages, key=lambda engine: -cached_len(engine, prefix))

    def starts(self, engine: Engine, batch: PackedBatch) -> Going:
        """A launch begins; whoever calls sets what the engine gives for it, and calls `ends`."""
        if self.is_alone:
            return Going(engine)
        going = Going(engine, predicted_ms(engine.costs, batch))
        with self._lock:
            self._work[engine].going.append(going)
            self._work[engine].given_ms += going.cost_ms
        return going

    def ends(self, launches: Sequence[Going]) -> None:
        """They were read, or never will be."""
        if self.is_alone:
            return
        with self._lock:
            for going in launches:
                work = self._work[going.engine]
                if going in work.going:
                    work.going.remove(going)


def cached_len(engine: Engine, prefix: TokenIds) -> int:
    """How many tokens of a prefix are in the pages of one copy."""
    return engine.pool.cached_len(prefix) if engine.pool is not None and len(prefix) else 0


def missing_ms(engine: Engine, prefix: TokenIds) -> float:
    """What a copy's pages lack of a prefix adds to a launch; 0 where they have all of it."""
    cached, costs = cached_len(engine, prefix), engine.costs
    missing = len(prefix) - cached
    pairs = missing * (cached + missing / 2)
    return missing * costs.tokens_ms[-1] / costs.tokens[-1] + pairs * costs.pair_ms


def predicted_ms(costs: CostModel, batch: PackedBatch) -> float:
    """Milliseconds of a launch."""
    pairs = causal = 0.0
    for group in batch.layout.groups:
        lens = group.item_lens.astype(float)
        whole = group.cached_len + group.prefix_len
        pairs += group.prefix_len * group.cached_len + lens.sum() * whole + (lens**2).sum() / 2
        causal += group.prefix_len**2 / 2
    return float(costs.launch(len(batch.token_ids), pairs, causal))
