"""Requests to label logits: leases on their prefixes, launches shared between them, results."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from packscore.encoded import EncodedRequest, TokenIds
from packscore.errors import StalePrefixError
from packscore.flows.costs import measured_cost_model
from packscore.flows.engine import Engine
from packscore.flows.jobs import LabelLogits, _Job, usage_of
from packscore.flows.packing import PackedBatch, Share, pack
from packscore.flows.page_pool import MIN_SHARED_TOKENS, PrefixLease, common_len
from packscore.flows.planner import Explanation, Planner, Workload
from packscore.results import Flow

# Requests that are planned together; more would hold their results back longer for no gain.
WINDOW = 256


class Runner:
    """Runs requests on one engine.

    Args:
      engine: what computes launches.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def planner(self) -> Planner:
        """Plans with the engine's costs, which a calibration may change."""
        return Planner(self.engine.costs, self.engine.limits)

    def run(
        self,
        requests: Sequence[EncodedRequest],
        label_ids: list[int],
        over_vocabulary: bool,
        *,
        flow: Flow | None = None,
        lease: PrefixLease | None = None,
        progress: Callable[[int], object] = lambda _: None,
    ) -> list[LabelLogits | Exception]:
        """Score requests, several in one launch where they fit.

        Args:
          requests: encoded queries and items.
          label_ids: token ids of the labels, the same for all.
          over_vocabulary: normalise over the vocabulary instead of over the labels.
          flow: the flow of every request; None is the cheapest. "packed" and "plain" by name leave
            the pages alone, so that the launches do not depend on what was scored before.
          lease: of a prefix that all requests start with, held by the caller; it is that of the
            one request, or whole. None takes one for the run.
          progress: called with the number of items that were scored since.

        Returns:
          For each request its label logits, or the error that only it met.
        """
        self.engine.refresh()
        results: list[LabelLogits | Exception] = []
        for start in range(0, len(requests), WINDOW):
            window = requests[start : start + WINDOW]
            results += self._run_window(window, label_ids, over_vocabulary, flow, lease)
            progress(sum(len(request.items) for request in window))
        return results

    def _run_window(
        self,
        requests: Sequence[EncodedRequest],
        label_ids: list[int],
        over_vocabulary: bool,
        flow: Flow | None,
        lease: PrefixLease | None,
    ) -> list[LabelLogits | Exception]:
        try:
            return list(self._run(requests, label_ids, over_vocabulary, flow, lease))
        except Exception as error:
            # without a lease of the caller's the pages went while it ran: not its fault
            is_lost = isinstance(error, StalePrefixError) and lease is None
            if len(requests) == 1 and not is_lost:
                return [error]
        # one by one, so that the others do not suffer from the one that failed
        alone: list[LabelLogits | Exception] = []
        for request in requests:
            alone += self._run_window([request], label_ids, over_vocabulary, flow, lease)
        return alone

    def explain(self, request: EncodedRequest) -> Explanation:
        """What `run` would choose for a request, now."""
        self.engine.refresh()
        prefix = request.prefix
        lens = np.sort(np.array([len(item) for item in request.items], np.int64))
        is_kept = self.can_hold(prefix)
        cached = self.cached_len(prefix) if is_kept else 0
        return self.planner.explain(Workload(len(prefix), cached, lens, is_kept))

    def cached_len(self, prefix: TokenIds) -> int:
        """How many tokens of a prefix are in pages now."""
        return self.engine.pool.cached_len(prefix) if self.engine.pool else 0

    def can_hold(self, prefix: TokenIds) -> bool:
        """Whether the pages that nobody holds suffice for a prefix."""
        pool = self.engine.pool
        return pool is not None and len(prefix) > 0 and pool.has_room(prefix)

    def hold(
        self, prefix: TokenIds, label_ids: Sequence[int] = (0,), over_vocabulary: bool = False
    ) -> PrefixLease | None:
        """Compute a prefix into pages and hold it; None where the pages do not suffice.

        Labels are those of what comes next, so that one program serves both.
        """
        self.engine.refresh()
        pool = self.engine.pool
        lease = pool.acquire(prefix) if pool and len(prefix) else None
        if lease is None or lease.is_whole:
            return lease
        nothing = np.zeros(0, np.int64)
        work = Workload(len(prefix), lease.cached_len, nothing, is_kept=True)
        ends = self.planner.prefix_ends(work)
        try:
            for end in ends if ends[-1:] == (len(prefix),) else (*ends, len(prefix)):
                batch, ids = pack([Share(0, prefix[:end], [], nothing, lease)]), list(label_ids)
                launched = self.engine.launch(batch, ids, over_vocabulary)
                self.engine.read([launched], ids, over_vocabulary)
                lease.commit(end)
        except BaseException:
            lease.release()
            raise
        return lease

    def calibrate(self, seconds: float) -> None:
        """Replace the engine's costs by measured ones."""
        self.engine.costs = measured_cost_model(self._timed, self.engine.costs, seconds)

    def _timed(self, prefix_len: int, item_lens: Sequence[int]) -> float:
        """Milliseconds of a launch of these sizes."""
        prefix = np.ones(prefix_len, np.int64)
        items = [np.ones(length, np.int64) for length in item_lens]
        batch = pack([Share(0, prefix, items, np.arange(len(items)))])
        start = time.perf_counter()
        self.engine.read([self.engine.launch(batch, [0], False)], [0], False)
        return 1e3 * (time.perf_counter() - start)

    def _run(
        self,
        requests: Sequence[EncodedRequest],
        label_ids: list[int],
        over_vocabulary: bool,
        flow: Flow | None,
        lease: PrefixLease | None,
    ) -> list[LabelLogits]:
        waiting = deque(range(len(requests)))
        jobs: dict[int, _Job] = {}
        begun: deque[_Job] = deque()
        launched, order = [], []
        try:
            while waiting or begun:
                chosen = self._continue(begun)
                for number, job in self._admit(requests, waiting, chosen, flow, lease):
                    jobs[number] = job
                    begun.append(job)
                for share in chosen:
                    if share.lease is not None:
                        share.lease.check()
                batch = pack(chosen)
                launched.append(self.engine.launch(batch, label_ids, over_vocabulary))
                order += chosen
                self._account(batch, jobs)
                begun = deque(job for job in begun if job.shares)
        finally:
            for job in jobs.values():
                job.release()
        logits, normalizer = self.engine.read(launched, label_ids, over_vocabulary)
        return self._results(jobs, order, logits, normalizer)

    def _continue(self, begun: Iterable[_Job]) -> list[Share]:
        """The next share of every request that is begun, as many as fit into a launch."""
        chosen: list[Share] = []
        for job in begun:
            if self._fits(job.shares[0], chosen):
                chosen.append(job.shares.popleft())
        return chosen

    def _fits(self, share: Share, chosen: list[Share]) -> bool:
        limits = self.engine.limits
        together = [*chosen, share]
        return not chosen or (
            len(together) <= limits.max_groups
            and sum(one.num_tokens for one in together) <= limits.target_tokens
            and sum(len(one.group.page_indices) for one in together) <= limits.max_pages
        )

    def _admit(
        self,
        requests: Sequence[EncodedRequest],
        waiting: deque[int],
        chosen: list[Share],
        flow: Flow | None,
        lease: PrefixLease | None,
    ) -> Iterator[tuple[int, _Job]]:
        """Begin waiting requests whose first share fits into the launch, and add it to `chosen`."""
        postponed: list[int] = []
        while waiting:
            number = waiting.popleft()
            if self._waits_for(requests[number], chosen):
                postponed.append(number)
                continue
            job = self._begin(number, requests[number], flow, lease)
            if not self._fits(job.shares[0], chosen):
                job.release()
                waiting.appendleft(number)
                break
            chosen.append(job.shares.popleft())
            yield number, job
        waiting.extendleft(reversed(postponed))

    def _waits_for(self, request: EncodedRequest, chosen: list[Share]) -> bool:
        """Whether the launch being put together computes the start of this request's prefix."""
        computing = [
            common_len(request.prefix, share.prefix)
            for share in chosen
            if share.lease is not None and not share.lease.is_whole
        ]
        pool = self.engine.pool
        if pool is None or max(computing, default=0) < MIN_SHARED_TOKENS:
            return False
        return max(computing) >= pool.cached_len(request.prefix) + MIN_SHARED_TOKENS

    def _begin(
        self,
        number: int,
        request: EncodedRequest,
        flow: Flow | None,
        lease: PrefixLease | None,
    ) -> _Job:
        pool = self.engine.pool
        own = None
        if lease is not None:
            lease.check()
        keeps = flow not in ("packed", "plain")  # asked for by name, they give the same bits again
        if lease is None and pool is not None and len(request.prefix) and keeps:
            lease = own = pool.acquire(request.prefix)
        lens = np.array([len(item) for item in request.items], np.int64)
        # by length, so that those of one length are neighbours and few calls serve all
        index = np.argsort(lens, kind="stable")
        cached = lease.cached_len if lease else 0
        work = Workload(len(request.prefix), cached, lens[index], lease is not None)
        try:
            plan = self.planner.choose(work, flow)
        except Exception:
            if own is not None:
                own.release()
            raise
        held = None if plan.flow == "plain" else lease
        shares = deque(
            Share(number, request.prefix[:end], [], index[:0], held) for end in plan.prefix_ends
        )
        for part in (index[start:end] for start, end in plan.bounds):
            items = [request.items[i] for i in part]
            shares.append(Share(number, request.prefix, items, part, held))
        return _Job(request, plan, shares, lease, own is None, bool(lease and lease.is_whole))

    def _account(self, batch: PackedBatch, jobs: dict[int, _Job]) -> None:
        """Note what a launch computed, and let others find the prefixes it wrote."""
        padded = self.engine.costs.padded(len(batch.token_ids)) - len(batch.token_ids)
        for share, group in zip(batch.shares, batch.layout.groups, strict=True):
            job = jobs[share.request]
            job.computed_tokens += group.num_tokens
            job.computed_prefix_tokens += group.prefix_len
            job.padding_tokens += padded * group.num_tokens / max(len(batch.token_ids), 1)
            job.is_causal = batch.is_causal
            if share.lease is not None:
                # the prefix may go on behind what the lease holds
                share.lease.commit(min(len(share.prefix), len(share.lease.tokens)))
            if not job.shares:
                job.release()

    def _results(
        self,
        jobs: dict[int, _Job],
        order: list[Share],
        logits: torch.Tensor,
        normalizer: torch.Tensor,
    ) -> list[LabelLogits]:
        """Rows of all launches back to the requests and into the order of their items."""
        rows = {number: np.empty(len(job.request.items), np.int64) for number, job in jobs.items()}
        first = 0
        for share in order:
            rows[share.request][share.index] = np.arange(first, first + len(share.index))
            first += len(share.index)
        results = []
        for number, job in sorted(jobs.items()):
            at = torch.from_numpy(rows[number]).to(logits.device)
            usage = usage_of(job, self.engine.mask_impl)
            results.append(LabelLogits(logits[at], normalizer[at], usage))
        return results
