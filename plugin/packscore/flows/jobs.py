"""One run of requests: leases on their prefixes, launches shared between them, results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from packscore.encoded import EncodedRequest
from packscore.flows.copies import Copies, Going, missing_ms
from packscore.flows.engine import Engine, Readout, RowValues
from packscore.flows.packing import PackedBatch, Share, first_equal, pack
from packscore.flows.page_pool import MIN_SHARED_TOKENS, PrefixLease, common_len
from packscore.flows.planner import Plan, Planner, Workload, flow_taken
from packscore.results import Flow, MaskImpl, Usage

# Starts a launch on an engine; what it returns is for the engine's `read`.
Launch: TypeAlias = Callable[[Engine, PackedBatch, Readout], Any]

# A prefix that is in pages is computed again on another copy where that spares so many times the
# wait: all that is behind it waits for it.
AGAIN = 8.0


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
    engine: Engine | None  # whose pages it has; None: each launch may be another's
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

    The next launch is put together for the copy that is free. A request runs where its prefix is,
    or is being computed, unless more waits there than computing it again is worth.

    Args:
      copies: what computes launches.
      planner: with their costs and limits.
      requests: encoded queries and items.
      readout: the same for all.
      flow: of every request; None is the cheapest.
      lease: of a prefix that all requests start with, held by the caller; None takes one for each.
      launch: starts a launch on one of them.
      is_fault: whether an error, of a launch or of reading it, is the launch's own: then its
        requests get it, and all others go on. Any other ends the run.
      homes: the copies that some requests run on, by their number.
    """

    def __init__(
        self,
        copies: Copies,
        planner: Planner,
        requests: Sequence[EncodedRequest],
        readout: Readout,
        flow: Flow | None,
        lease: PrefixLease | None,
        launch: Launch,
        is_fault: Callable[[Exception], bool],
        homes: Mapping[int, Engine],
    ) -> None:
        self._copies = copies
        self._planner = planner
        self._requests = requests
        self._readout = readout
        self._flow = flow
        self._lease = lease
        self._lessor = copies.first
        if lease is not None:
            self._lessor = next((x for x in copies if x.pool is lease.pool), copies.first)
        self._launch = launch
        self._is_fault = is_fault
        # asked for by name, these give the same bits again, and leave the pages alone
        self._keeps = flow not in ("packed", "plain")
        self._homes = dict(homes)
        self._loads: dict[Engine, float] = {}  # when the next launch was begun
        self._missing: dict[int, dict[Engine, float]] = {}  # of prefixes that are whole somewhere
        self._failed: dict[int, Exception] = {}
        self._waiting = deque(range(len(requests)))
        self._begun: deque[_Job] = deque()
        self._jobs: dict[int, _Job] = {}
        self._going: list[tuple[Going, list[Share]]] = []

    def results(self) -> list[RequestValues | Exception]:
        """Launch everything, and what is read of every request, or the fault of its launch."""
        try:
            self._launch_all()
            return self._by_request(*self._read())
        finally:
            self._copies.ends([going for going, _ in self._going])

    def _launch_all(self) -> None:
        try:
            while self._waiting or self._begun:
                with self._copies.choosing():
                    engine, shares = self._next_launch()
                    for share in shares:
                        if share.lease is not None:
                            share.lease.check()
                    batch = pack(shares)
                    going = self._copies.starts(engine, batch)
                self._going.append((going, shares))
                try:
                    going.launched = self._launch(engine, batch, self._readout)
                except Exception as error:
                    self._copies.ends([self._going.pop()[0]])
                    self._fail(shares, error)
                else:
                    self._account(engine, batch)
                self._begun = deque(job for job in self._begun if job.shares)
        finally:
            for job in self._jobs.values():
                job.release()

    def _fail(self, shares: list[Share], error: Exception) -> None:
        """The requests of a launch get its fault, and no other launch."""
        if not self._is_fault(error):
            raise error
        for share in shares:
            self._failed[share.request] = error
            self._jobs[share.request].shares.clear()

    def _read(self) -> tuple[list[Share], RowValues | None]:
        """The shares that could be read, and their rows; None where there are none."""
        order: list[Share] = []
        values: list[RowValues] = []
        for engine in self._copies:
            own = [(one.launched, shares) for one, shares in self._going if one.engine is engine]
            if own:
                self._read_of(engine, own, order, values)
        if len(values) > 1:
            return order, RowValues.joined(values)
        return order, values[0] if values else None

    def _read_of(
        self,
        engine: Engine,
        launched: list[tuple[Any, list[Share]]],
        order: list[Share],
        values: list[RowValues],
    ) -> None:
        """Read launches of one copy: together, or where that fails one by one."""
        try:
            values.append(engine.read([one for one, _ in launched]))
            order += [share for _, shares in launched for share in shares]
            return
        except Exception as error:
            if not self._is_fault(error):
                raise
        for one, shares in launched:
            try:
                values.append(engine.read([one]))
                order += shares
            except Exception as error:
                self._fail(shares, error)

    def _next_launch(self) -> tuple[Engine, list[Share]]:
        """What the next launch computes, and where: on the first copy that has something to do."""
        while True:  # pages that go meanwhile may send a request from each copy to another
            self._loads = self._copies.loads()
            for engine in self._loads:
                shares = self._next_shares(engine)
                if shares:
                    return engine, shares

    def _next_shares(self, engine: Engine) -> list[Share]:
        """What a copy computes: of every request that is begun, then of waiting ones."""
        shares: list[Share] = []
        for job in self._begun:
            if job.engine in (None, engine) and self._fits(job.shares[0], shares):
                shares.append(job.shares.popleft())
        for number, job in self._admit(engine, shares):
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

    def _admit(self, engine: Engine, shares: list[Share]) -> Iterator[tuple[int, _Job]]:
        """Begin waiting requests whose first share fits into the launch, and add it to `shares`."""
        postponed: list[int] = []
        while self._waiting:
            number = self._waiting.popleft()
            is_here = self._is_at_home(number, engine)
            if not is_here or self._waits_for(self._requests[number], engine, shares):
                postponed.append(number)
                continue
            job = self._begin(number, engine)
            if job is None:
                postponed.append(number)
                continue
            if not self._fits(job.shares[0], shares):
                job.release()
                self._waiting.appendleft(number)
                break
            shares.append(job.shares.popleft())
            yield number, job
        self._waiting.extendleft(reversed(postponed))

    def _is_at_home(self, number: int, engine: Engine) -> bool:
        """Whether a request runs on this copy, if it begins now."""
        if self._copies.is_alone:
            return True
        if self._lease is not None:
            return engine is self._lessor
        prefix = self._requests[number].prefix
        if not (self._keeps and len(prefix)):
            return True
        if number in self._homes:
            return self._homes[number] is engine
        missing = self._missing.get(number)
        if missing is None:
            missing = {one: missing_ms(one, prefix) for one in self._loads}
            if not all(missing.values()):  # one that has all of it is not asked again
                self._missing[number] = missing
        ms = {one: load + AGAIN * missing[one] for one, load in self._loads.items()}
        return engine is min(ms, key=ms.__getitem__)

    def _waits_for(self, request: EncodedRequest, engine: Engine, shares: list[Share]) -> bool:
        """Whether the launch being put together computes the start of this request's prefix."""
        computing = [
            common_len(request.prefix, share.prefix)
            for share in shares
            if share.lease is not None and not share.lease.is_whole
        ]
        pool = engine.pool
        if pool is None or max(computing, default=0) < MIN_SHARED_TOKENS:
            return False
        return max(computing) >= pool.cached_len(request.prefix) + MIN_SHARED_TOKENS

    def _begin(self, number: int, engine: Engine) -> _Job | None:
        """A request's plan, and its pages; None where those of another copy have room for it."""
        request, pool = self._requests[number], engine.pool
        lease, own = self._lease, None
        if lease is not None:
            lease.check()
        elif pool is not None and len(request.prefix) and self._keeps:
            lease = own = pool.acquire(request.prefix)
            if lease is None and self._has_moved(number):
                return None
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
        where = None if lease is None or plan.flow == "plain" else engine
        was_whole = lease is not None and lease.is_whole
        if not was_whole and number in self._missing:
            self._missing.clear()  # soon it is in the pages of one more
        return _Job(request, same_as, plan, shares, lease, where, own is None, was_whole)

    def _has_moved(self, number: int) -> bool:
        """Whether a request whose prefix finds no room now goes to a copy that has some; once."""
        if self._copies.is_alone or number in self._homes:
            return False
        prefix = self._requests[number].prefix
        roomy = (one for one in self._loads if one.pool and one.pool.has_room(prefix))
        home = next(roomy, None)
        if home is not None:
            self._homes[number] = home
        return home is not None

    def _account(self, engine: Engine, batch: PackedBatch) -> None:
        """Note what a launch computed, and let others find the prefixes it wrote."""
        num_tokens = len(batch.token_ids)
        padding = engine.costs.padded(num_tokens) - num_tokens
        reads_rows = engine.reads_rows(batch)
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
            results.append(RequestValues(found.at(at), job.usage(self._copies.mask_impl)))
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
