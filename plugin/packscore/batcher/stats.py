"""What a batcher did so far."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from packscore.flows.page_pool import PagePool
from packscore.results import Usage

# What a full queue says before anything ran, and the least and most that it says.
RETRY_SECONDS, LEAST_RETRY, MOST_RETRY = 1.0, 0.1, 60.0


@dataclass(frozen=True)
class BatcherStats:
    """Counters of a batcher since it was made, and what waits in it now.

    Args:
      accepted: requests that were let into the queue.
      answered: of these, those that have their result.
      failed: those that have an error instead.
      cancelled: those whose caller gave up.
      dropped: of the cancelled ones, those of which nothing ran.
      rejected: requests that were refused at once, for the queue was full.
      queued_requests: requests that wait now, or are being encoded.
      queued_tokens: their tokens, of those that are encoded.
      runs: how often a device thread took requests from the queue.
      launches: what the engine was asked to compute for them.
      ran: requests that ran to their end, whatever came of it.
      computed_tokens, saved_tokens, cached_tokens, padding_tokens: sums of the usages of what ran,
        the last two of `Usage.cached_tokens` and `Usage.padding_tokens`.
      prefix_hits: requests some of whose prefix was in pages when they first ran.
      pages, used_pages: pages that prefixes may be kept in, and those that are taken now.
      waiting_seconds: from the end of encoding to the first run, summed over requests.
      encoding_seconds: in the thread that encodes.
      running_seconds: in the device threads, the window apart.
      finishing_seconds: in the thread that makes results of what was read.
    """

    accepted: int = 0
    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    dropped: int = 0
    rejected: int = 0
    queued_requests: int = 0
    queued_tokens: int = 0
    runs: int = 0
    launches: int = 0
    ran: int = 0
    computed_tokens: int = 0
    saved_tokens: int = 0
    cached_tokens: int = 0
    padding_tokens: int = 0
    prefix_hits: int = 0
    pages: int = 0
    used_pages: int = 0
    waiting_seconds: float = 0.0
    encoding_seconds: float = 0.0
    running_seconds: float = 0.0
    finishing_seconds: float = 0.0

    @property
    def requests_a_launch(self) -> float:
        """Requests that ran, for each launch; 0 before the first."""
        return self.ran / self.launches if self.launches else 0.0


class Counters:
    """What a batcher counts; for several threads at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._seconds = dict.fromkeys(("waiting", "encoding", "running", "finishing"), 0.0)

    def add(self, **counts: int) -> None:
        """Counters of `BatcherStats` go on by so many."""
        with self._lock:
            self._counts.update(counts)

    def add_usage(self, usage: Usage, *, is_first: bool) -> None:
        """A request ran, or a part of it."""
        self.add(
            computed_tokens=usage.computed_tokens,
            saved_tokens=usage.prefix_tokens_saved,
            cached_tokens=usage.cached_tokens,
            padding_tokens=usage.padding_tokens,
            prefix_hits=int(is_first and usage.cached_tokens > 0),
        )

    def add_seconds(
        self, stage: Literal["waiting", "encoding", "running", "finishing"], seconds: float
    ) -> None:
        """A stage took so long."""
        with self._lock:
            self._seconds[stage] += seconds

    @contextlib.contextmanager
    def timed(self, stage: Literal["encoding", "running", "finishing"]) -> Iterator[None]:
        """What a stage does now."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(stage, time.perf_counter() - start)

    def retry_after(self, tokens: int, threads: int) -> float:
        """Seconds in which half of so many tokens should run, in so many device threads."""
        ran, seconds = self._counts["computed_tokens"], self._seconds["running"]
        if not (ran and seconds):
            return RETRY_SECONDS
        return min(max(tokens / 2 * seconds / threads / ran, LEAST_RETRY), MOST_RETRY)

    def stats(
        self, queued_requests: int, queued_tokens: int, pools: Sequence[PagePool]
    ) -> BatcherStats:
        """All of them, what waits now, and what is in pages."""
        with self._lock:
            return BatcherStats(
                **self._counts,
                queued_requests=queued_requests,
                queued_tokens=queued_tokens,
                pages=sum(pool.num_pages for pool in pools),
                used_pages=sum(pool.num_pages - pool.num_free_pages for pool in pools),
                waiting_seconds=self._seconds["waiting"],
                encoding_seconds=self._seconds["encoding"],
                running_seconds=self._seconds["running"],
                finishing_seconds=self._seconds["finishing"],
            )
