"""One run of requests: leases on their prefixes, launches shared between them, results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from packscore.encoded import EncodedRequest
from packscore.flows.engine import Engine, Readout, RowValues
from packscore.flows.packing import PackedBatch, Share, first_equal, pack
from packscore.flows.page_pool import MIN_SHARED_TOKENS, PrefixLease, common_len
from packscore.flows.planner import Plan, Planner, Workload, flow_taken
from packscore.results import Flow, MaskImpl, Usage

# Starts a launch; what it returns is for the engine's `read`.
Launch: TypeAlias = Callable[[PackedBatch, Readout], Any]


@dataclass(frozen=True, eq=False)
class RequestValues:
    """What was read of one request, the rows of its items one behind the other, in their order."""

    values: RowValues
    usage: Usage


@dataclass(eq=False)
class _Job:
    """One request on its way: its plan, the shares still to launch, what was computed."""

    request: EncodedRequest
    same_as: npt.NDArray[np.int64]  # [num_items]: the first item that equals each
    plan: Plan
    shares: deque[Share]
    lease: PrefixLease | None
    is_held: bool  # by the caller, who releases it
    was_whole: bool
    computed_tokens: int = 0
    computed_prefix_tokens: int = 0
    last_layer_tokens: int = 0
    padding_tokens: float = 0.0
    is_causal: bool = False

    def release(self) -> None:
        if self.lease is not None and not self.is_held:
            self.lease.release()

    def usage(self, mask_impl: MaskImpl) -> Usage:
        """What the request took."""
        request = self.request
        prompt_tokens = request.prompt_tokens
        # what runs again, and what no launch shares, was not read from pages
        is_shared = self.lease is not None and self.plan.flow != "plain"
        cached = max(len(request.prefix) - self.computed_prefix_tokens, 0) if is_shared else 0
        flow = flow_taken(
            self.plan.flow,
            num_launches=self.plan.num_launches,
            was_whole=self.was_whole,
            is_shared=len(request.prefix) > 0 and len(set(self.same_as.tolist())) != 1,
        )
        return Usage(
            prompt_tokens=prompt_tokens,
            computed_tokens=self.computed_tokens,
            computed_prefix_tokens=self.computed_prefix_tokens,
            prefix_tokens_saved=prompt_tokens - self.computed_tokens,
            padding_tokens=round(self.padding_tokens),
            truncated_items=tuple(request.truncated_items),
            special_token_items=tuple(request.special_token_items),
            flow=flow,
            mask_impl="causal" if self.is_causal else mask_impl,
            cached_tokens=cached,
            last_layer_tokens=self.last_layer_tokens,
        )


class Run:
    """Requests that are planned and launched together; those that fit share a launch.

    Args:
      engine: what computes launches.
      planner: with the engine's costs and limits.
      requests: encoded queries and items.
      readout: the same for all.
      flow: of every request; None is the cheapest.
      lease: of a prefix that all requests start with, held by the caller; None takes one for each.
      launch: starts a launch on the engine.
      is_fault: whether an error, of a launch or of reading it, is the launch's own: then its
        requests get it, and all others go on. Any other ends the run.
    """

    def __init__(
        self,
        engine: Engine,
        planner: Planner,
        requests: Sequence[EncodedRequest],
        readout: Readout,
        flow: Flow | None,
        lease: PrefixLease | None,
        launch: Launch,
        is_fault: Callable[[Exception], bool],
    ) -> None:
        self._engine = engine
        self._planner = planner
        self._requests = requests
        self._readout = readout
        self._flow = flow
        self._lease = lease
        self._launch = launch
        self._is_fault = is_fault
        self._failed: dict[int, Exception] = {}
        self._waiting = deque(range(len(requests)))
        self._begun: deque[_Job] = deque()
        self._jobs: dict[int, _Job] = {}

    def results(self) -> list[RequestValues | Exception]:
        """Launch everything, and what is read of every request, or the fault of its launch."""
        launched: list[tuple[Any, list[Share]]] = []
        try:
            while self._waiting or self._begun:
                shares = self._next_shares()
                for share in shares:
                    if share.lease is not None:
                        share.lease.check()
                batch = pack(shares)
                try:
                    launched.append((self._launch(batch, self._readout), shares))
                except Exception as error:
                    self._fail(shares, error)
                else:
                    self._account(batch)
                self._begun = deque(job for job in self._begun if job.shares)
        finally:
            for job in self._jobs.values():
                job.release()
        return self._by_request(*self._read(launched))

    def _fail(self, shares: list[Share], error: Exception) -> None:
        """The requests of a launch get its fault, and no other launch."""
        if not self._is_fault(error):
            raise error
        for share in shares:
            self._failed[share.request] = error
            self._jobs[share.request].shares.clear()

    def _read(
        self, launched: list[tuple[Any, list[Share]]]
    ) -> tuple[list[Share], RowValues | None]:
        """The shares that could be read, and their rows; None where there are none."""
        try:
            if not launched:
                return [], None
            found = self._engine.read([one for one, _ in launched])
            return [share for _, shares in launched for share in shares], found
        except Exception as error:
            if not self._is_fault(error):
                raise
        order, values = [], []
        for one, shares in launched:
            try:
                values.append(self._engine.read([one]))
                order += shares
            except Exception as error:
                self._fail(shares, error)
        return order, RowValues.joined(values) if values else None

    def _next_shares(self) -> list[Share]:
        """What the next launch computes: of every request that is begun, then of waiting ones."""
        shares: list[Share] = []
        for job in self._begun:
            if self._fits(job.shares[0], shares):
                shares.append(job.shares.popleft())
        for number, job in self._admit(shares):
            self._jobs[number] = job
            self._begun.append(job)
        return shares

    def _fits(self, share: Share, shares: list[Share]) -> bool:
        limits = self._planner.limits
        together = [*shares, share]
        return not shares or (
            len(together) <= limits.max_groups
            and sum(one.num_tokens for one in together) <= limits.target_tokens
            and sum(len(one.group.page_indices) for one in together) <= limits.max_pages
        )

    def _admit(self, shares: list[Share]) -> Iterator[tuple[int, _Job]]:
        """Begin waiting requests whose first share fits into the launch, and add it to `shares`."""
        postponed: list[int] = []
        while self._waiting:
            number = self._waiting.popleft()
            if self._waits_for(self._requests[number], shares):
                postponed.append(number)
                continue
            job = self._begin(number)
            if not self._fits(job.shares[0], shares):
                job.release()
                self._waiting.appendleft(number)
                break
            shares.append(job.shares.popleft())
            yield number, job
        self._waiting.extendleft(reversed(postponed))

    def _waits_for(self, request: EncodedRequest, shares: list[Share]) -> bool:
        """Whether the launch being put together computes the start of this request's prefix."""
        computing = [
            common_len(request.prefix, share.prefix)
            for share in shares
            if share.lease is not None and not share.lease.is_whole
        ]
        pool = self._engine.pool
        if pool is None or max(computing, default=0) < MIN_SHARED_TOKENS:
            return False
        return max(computing) >= pool.cached_len(request.prefix) + MIN_SHARED_TOKENS

    def _begin(self, number: int) -> _Job:
        request, pool = self._requests[number], self._engine.pool
        lease, own = self._lease, None
        if lease is not None:
            lease.check()
        # asked for by name, these give the same bits again
        keeps = self._flow not in ("packed", "plain")
        if lease is None and pool is not None and len(request.prefix) and keeps:
            lease = own = pool.acquire(request.prefix)
        same_as = first_equal(request.items, request.rows)
        distinct = np.unique(same_as)
        lens = np.array([len(request.items[i]) for i in distinct], np.int64)
        # by length, so that those of one length are neighbours and few calls serve all
        by_length = np.argsort(lens, kind="stable")
        cached = lease.cached_len if lease else 0
        work = Workload(len(request.prefix), cached, lens[by_length], lease is not None)
        try:
            plan = self._planner.choose(work, self._flow)
        except BaseException:
            if own is not None:
                own.release()
            raise
        shares = _shares(number, request, distinct[by_length], plan, lease)
        was_whole = lease is not None and lease.is_whole
        return _Job(request, same_as, plan, shares, lease, own is None, was_whole)

    def _account(self, batch: PackedBatch) -> None:
        """Note what a launch computed, and let others find the prefixes it wrote."""
        num_tokens = len(batch.token_ids)
        padding = self._engine.costs.padded(num_tokens) - num_tokens
        reads_rows = self._engine.reads_rows(batch)
        for share, group in zip(batch.shares, batch.layout.groups, strict=True):
            job = self._jobs[share.request]
            job.computed_tokens += group.num_tokens
            job.computed_prefix_tokens += group.prefix_len
            job.last_layer_tokens += len(share.items) if reads_rows else group.num_tokens
            job.padding_tokens += padding * group.num_tokens / max(num_tokens, 1)
            job.is_causal = batch.is_causal
            if share.lease is not None:
                # the prefix may go on behind what the lease holds
                share.lease.commit(min(len(share.prefix), len(share.lease.tokens)))
            if not job.shares:
                job.release()

    def _by_request(
        self, order: list[Share], found: RowValues | None
    ) -> list[RequestValues | Exception]:
        """Rows of all launches back to the requests and into the order of their items."""
        spans = {
            number: np.empty((len(job.request.items), 2), np.int64)
            for number, job in self._jobs.items()
        }
        first = 0
        for share in order:
            counts = share.row_counts
            begins = first + np.cumsum(counts) - counts
            spans[share.request][share.index] = np.stack([begins, counts], 1)
            first += int(counts.sum())
        results: list[RequestValues | Exception] = []
        for number, job in sorted(self._jobs.items()):
            if number in self._failed or found is None:
                results.append(self._failed[number])
                continue
            begins, counts = spans[number][job.same_as].T
            # of each item its rows, which lie one behind the other
            behind = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            at = np.repeat(begins, counts) + behind
            results.append(RequestValues(found.at(at), job.usage(self._engine.mask_impl)))
        return results


def _shares(
    number: int,
    request: EncodedRequest,
    order: npt.NDArray[np.int64],  # [num_distinct]: which items, in packing order
    plan: Plan,
    lease: PrefixLease | None,
) -> deque[Share]:
    """The launches of a plan, those that only put the prefix into pages first."""
    held = None if plan.flow == "plain" else lease
    shares = deque(
        Share(number, request.prefix[:end], [], order[:0], held) for end in plan.prefix_ends
    )
    for part in (order[start:end] for start, end in plan.bounds):
        items = [request.items[i] for i in part]
        rows = None if request.rows is None else [request.rows[i] for i in part]
        shares.append(Share(number, request.prefix, items, part, held, rows))
    return shares
