"""Requests to label logits: runs of many, one by one where one fails, prefixes held for later."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from packscore.encoded import EncodedRequest, TokenIds
from packscore.errors import (
    MaskTooLargeError,
    OutOfMemoryError,
    PackscoreError,
    StalePrefixError,
)
from packscore.flows.copies import Copies
from packscore.flows.costs import measured_cost_model
from packscore.flows.cuts import Cuts
from packscore.flows.engine import Engine, Readout
from packscore.flows.jobs import RequestValues, Run
from packscore.flows.packing import PackedBatch, Share, first_equal, pack
from packscore.flows.page_pool import PAGE_SIZE, PrefixLease
from packscore.flows.planner import Explanation, Planner, Workload
from packscore.results import FLOWS, Flow

T = TypeVar("T")

logger = logging.getLogger("packscore")

# Requests that are planned together, of each copy; more would hold their results back longer for no
# gain.
WINDOW = 256
# Why an engine has but one flow.
ALONE = "something in the model runs as the model's own forward, one item at a time"
# What is read where the hidden states alone are wanted.
ANY_READOUT = Readout((0,))


class Runner:
    """Runs requests on copies of one model, of which one is enough.

    Args:
      copies: what computes launches.
      launching: called before each launch, also of those that fail.
      retries: run requests again, one by one, whose launch failed for no reason of theirs; else
        they get its fault.
    """

    def __init__(
        self,
        copies: Copies,
        *,
        launching: Callable[[], object] = lambda: None,
        retries: bool = True,
    ) -> None:
        self.copies = copies
        self._launching = launching
        self._retries = retries

    def _launch(self, engine: Engine, batch: PackedBatch, readout: Readout) -> Any:
        self._launching()
        return engine.launch(batch, readout)

    def _is_fault(self, error: Exception) -> bool:
        """Whether an error is kept to its launch: not one that names what is wrong with a request.

        Nor one that smaller launches mend.
        """
        is_told = isinstance(error, PackscoreError) or self.copies.is_out_of_memory(error)
        return not (self._retries or is_told)

    @property
    def planner(self) -> Planner:
        """Plans with the engines' costs, which a calibration may change."""
        return Planner(self.copies.costs, self.copies.limits)

    def run(
        self,
        requests: Sequence[EncodedRequest],
        readout: Readout,
        *,
        flow: Flow | None = None,
        lease: PrefixLease | None = None,
        progress: Callable[[int], object] = lambda _: None,
    ) -> list[RequestValues | Exception]:
        """Score requests, several in one launch where they fit; equal items are computed once.

        Args:
          requests: encoded queries and items.
          readout: what is read at the rows of every item.
          flow: the flow of every request; None is the cheapest. "packed" and "plain" by name leave
            the pages alone, so that the launches do not depend on what was scored before.
          lease: of a prefix that all requests start with, held by the caller; it is that of the
            one request, or whole. None takes one for the run.
          progress: called with the number of requests that were scored since.

        Returns:
          For each request what was read, or the error that only it met.
        """
        self.copies.refresh()
        results: list[RequestValues | Exception] = []
        step = WINDOW * len(self.copies)
        for start in range(0, len(requests), step):
            window = requests[start : start + step]
            results += self._run_window(window, readout, flow, lease)
            progress(len(window))
        return results

    def _run_window(
        self,
        requests: Sequence[EncodedRequest],
        readout: Readout,
        flow: Flow | None,
        lease: PrefixLease | None,
    ) -> list[RequestValues | Exception]:
        flow = self.copies.only_flow or flow
        try:
            return [*self._results(requests, readout, flow, lease)]
        except Exception as error:
            # without a lease of the caller's the pages went while it ran: not its fault
            is_lost = isinstance(error, StalePrefixError) and lease is None
            if len(requests) == 1 and not is_lost:
                return [error]
        # one by one, so that the others do not suffer from the one that failed
        alone: list[RequestValues | Exception] = []
        for request in requests:
            alone += self._run_window([request], readout, flow, lease)
        return alone

    def _results(
        self,
        requests: Sequence[EncodedRequest],
        readout: Readout,
        flow: Flow | None,
        lease: PrefixLease | None,
    ) -> list[RequestValues | Exception]:
        """The results of a run; where memory is short of smaller launches, in the end one by one.

        Raises:
          OutOfMemoryError: it is short for that too.
        """

        def attempt(flow: Flow | None, planner: Planner) -> list[RequestValues | Exception]:
            cuts = Cuts.of(self.copies, planner, requests, is_free=flow is None and lease is None)
            how = readout, flow, lease, self._launch, self._is_fault, cuts.homes
            return cuts.joined(Run(self.copies, planner, cuts.requests, *how).results())

        num_tokens = sum(map(_num_tokens, requests))
        try:
            return self._within_memory(functools.partial(attempt, flow), num_tokens)
        except OutOfMemoryError:
            if flow is not None:
                raise
        # no pages, and nothing that keeps items apart
        return self._within_memory(functools.partial(attempt, "plain"), 0)

    def _within_memory(self, attempt: Callable[[Planner], T], num_tokens: int) -> T:
        """What `attempt` gives, with launches of half the size for as long as memory is short.

        Args:
          attempt: launches what a planner plans, from the beginning.
          num_tokens: how many it has in all.

        Raises:
          OutOfMemoryError, MaskTooLargeError: it is short for the smallest launches too.
        """
        limits = self.copies.limits
        while True:
            try:
                return attempt(Planner(self.copies.costs, limits))
            except Exception as error:
                if not self.copies.is_out_of_memory(error):
                    raise
                # its frames hold what the launch had computed
                failure = error.with_traceback(None)
            most = min(limits.max_tokens, num_tokens) // 2
            if most < PAGE_SIZE and isinstance(failure, MaskTooLargeError):
                raise failure
            if most < PAGE_SIZE:
                raise OutOfMemoryError(
                    f"memory does not suffice for an item and its query at a time: {failure}; "
                    "free some, pass a smaller max_tokens or prefix_cache_bytes, or load the model "
                    "in a smaller dtype"
                ) from failure
            logger.warning("out of memory; trying launches of at most %d tokens", most)
            target = min(limits.target_tokens, most)
            limits = replace(limits, max_tokens=most, target_tokens=target)

    def explain(self, request: EncodedRequest) -> Explanation:
        """What `run` would choose for a request, now."""
        self.copies.refresh()
        found = self.predicted(request)
        is_free = self.copies.only_flow is None
        cuts = Cuts.of(self.copies, self.planner, [request], is_free=is_free)
        return replace(found, num_copies=len(cuts.requests))

    def predicted(self, request: EncodedRequest) -> Explanation:
        """The same for the model that was seen last."""
        prefix = request.prefix
        distinct = np.unique(first_equal(request.items, request.rows))
        lens = np.sort(np.array([len(request.items[i]) for i in distinct], np.int64))
        is_kept = self.can_hold(prefix)
        cached = self.cached_len(prefix) if is_kept else 0
        found = self.planner.explain(Workload(len(prefix), cached, lens, is_kept))
        found = replace(found, whole_last=self.copies.whole_last)
        only = self.copies.only_flow
        if only is None:
            return found
        plans = tuple(plan for plan in found.plans if plan.flow == only)
        return replace(found, plans=plans, refused=dict.fromkeys(set(FLOWS) - {only}, ALONE))

    def cached_len(self, prefix: TokenIds) -> int:
        """How many tokens of a prefix are in pages now, where most of it is."""
        return self.copies.cached_len(prefix)

    def can_hold(self, prefix: TokenIds) -> bool:
        """Whether the pages that nobody holds suffice for a prefix."""
        return len(prefix) > 0 and self.copies.has_room(prefix)

    def hold(self, prefix: TokenIds, readout: Readout = ANY_READOUT) -> PrefixLease | None:
        """Compute a prefix into pages and hold it; None where pages do not suffice, or keep none.

        The readout is that of what comes next, so that one program serves both.
        """
        self.copies.refresh()
        engine, lease = self._leased(prefix)
        if lease is None or lease.is_whole:
            return lease
        computed = functools.partial(self._compute, engine, prefix, lease, readout)
        try:
            self._within_memory(computed, len(prefix))
        except BaseException as error:
            lease.release()
            if isinstance(error, StalePrefixError) and self.copies.only_flow:
                return None  # the launch itself found that nothing can be kept
            raise
        return lease

    def _leased(self, prefix: TokenIds) -> tuple[Engine, PrefixLease | None]:
        """Pages for a prefix, on the copy that has most of it and has room."""
        for engine in self.copies.by_prefix(prefix) if len(prefix) else ():
            lease = engine.pool.acquire(prefix) if engine.pool else None
            if lease is not None:
                return engine, lease
        return self.copies.first, None

    def _compute(
        self,
        engine: Engine,
        prefix: TokenIds,
        lease: PrefixLease,
        readout: Readout,
        planner: Planner,
    ) -> None:
        """Put into pages what they still miss of a prefix."""
        nothing = np.zeros(0, np.int64)
        work = Workload(len(prefix), lease.cached_len, nothing, is_kept=True)
        ends = planner.prefix_ends(work)
        for end in ends if ends[-1:] == (len(prefix),) else (*ends, len(prefix)):
            self._run_alone(engine, pack([Share(0, prefix[:end], [], nothing, lease)]), readout)
            lease.commit(end)

    def _run_alone(self, engine: Engine, batch: PackedBatch, readout: Readout) -> None:
        """Launch and wait."""
        going = self.copies.starts(engine, batch)
        try:
            going.launched = self._launch(engine, batch, readout)
            engine.read([going.launched])
        finally:
            self.copies.ends([going])

    def calibrate(self, seconds: float) -> None:
        """Replace the engines' costs by those that are measured on one of them."""
        self.copies.costs = measured_cost_model(self._timed, self.copies.costs, seconds)

    def _timed(self, prefix_len: int, item_lens: Sequence[int]) -> float:
        """Milliseconds of a launch of these sizes."""
        prefix = np.ones(prefix_len, np.int64)
        items = [np.ones(length, np.int64) for length in item_lens]
        batch = pack([Share(0, prefix, items, np.arange(len(items)))])
        start = time.perf_counter()
        self._run_alone(self.copies.first, batch, ANY_READOUT)
        return 1e3 * (time.perf_counter() - start)


def _num_tokens(request: EncodedRequest) -> int:
    return len(request.prefix) + sum(map(len, request.items))
