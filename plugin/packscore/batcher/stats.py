"""What a batcher did so far."""

from __future__ import annotations

from dataclasses import dataclass

from packscore.flows.page_pool import PagePool


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
      runs: how often the device thread took requests from the queue.
      launches: what the engine was asked to compute for them.
      ran: requests that ran to their end, whatever came of it.
      computed_tokens, saved_tokens, cached_tokens, padding_tokens: sums of the usages of what ran,
        the last two of `Usage.cached_tokens` and `Usage.padding_tokens`.
      prefix_hits: requests some of whose prefix was in pages when they first ran.
      pages, used_pages: pages that prefixes may be kept in, and those that are taken now.
      waiting_seconds: from the end of encoding to the first run, summed over requests.
      encoding_seconds: in the thread that encodes.
      running_seconds: in the device thread, the window apart.
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


def pages_of(pool: PagePool | None) -> dict[str, int]:
    """What the pages of an engine are to `BatcherStats`."""
    if pool is None:
        return {}
    return {"pages": pool.num_pages, "used_pages": pool.num_pages - pool.num_free_pages}
