"""Counters for Prometheus, in a registry of the app's own."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from packscore.serve.models import Models

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 100.0)
# what a batcher counts, and what Prometheus calls it
COUNTED = {
    "accepted": ("packscore_queue_accepted", "Requests that were let into the queue."),
    "rejected": ("packscore_queue_rejected", "Requests that a full queue refused."),
    "cancelled": ("packscore_queue_cancelled", "Requests whose client gave up."),
    "dropped": ("packscore_queue_dropped", "Those of them of which nothing ran."),
    "answered": ("packscore_queue_answered", "Requests that have their result."),
    "failed": ("packscore_queue_failed", "Requests that have an error instead."),
    "ran": ("packscore_queue_ran", "Requests that ran to their end."),
    "runs": ("packscore_runs", "How often requests were taken from the queue."),
    "launches": ("packscore_launches", "Launches of the engine."),
    "computed_tokens": ("packscore_tokens_computed", "Tokens that ran through the model."),
    "saved_tokens": ("packscore_tokens_saved", "Tokens that items and requests shared."),
    "cached_tokens": ("packscore_tokens_cached", "Tokens of prefixes that were in pages."),
    "padding_tokens": ("packscore_tokens_padding", "Padding that ran beside them."),
    "prefix_hits": ("packscore_prefix_hits", "Requests with some of their prefix in pages."),
}
GAUGES = {
    "queued_requests": ("packscore_queue_requests", "Requests that wait."),
    "queued_tokens": ("packscore_queue_tokens", "Their tokens."),
    "pages": ("packscore_prefix_pages_budget", "Pages that prefixes may be kept in."),
    "used_pages": ("packscore_prefix_pages", "Pages that are taken."),
    "requests_a_launch": ("packscore_requests_per_launch", "Requests that ran, for each launch."),
}
STAGES = ("waiting", "encoding", "running", "finishing")


class OfBatchers(Collector):
    """What the queues of the models count, read when it is asked for."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """All of it, by model."""
        stats = {name: scorer.batcher.stats for name, scorer in self._models.scorers.items()}
        for field, (name, told) in COUNTED.items():
            counter = CounterMetricFamily(name, told, labels=["model"])
            for model, one in stats.items():
                counter.add_metric([model], getattr(one, field))
            yield counter
        for field, (name, told) in GAUGES.items():
            gauge = GaugeMetricFamily(name, told, labels=["model"])
            for model, one in stats.items():
                gauge.add_metric([model], getattr(one, field))
            yield gauge
        seconds = CounterMetricFamily(
            "packscore_stage_seconds", "Seconds by stage.", labels=["model", "stage"]
        )
        for model, one in stats.items():
            for stage in STAGES:
                seconds.add_metric([model, stage], getattr(one, f"{stage}_seconds"))
        yield seconds


class Metrics:
    """What one app counts."""

    def __init__(self, models: Models) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(OfBatchers(models))
        self.requests = Counter(
            "packscore_requests",
            "Requests that were answered, by endpoint and status.",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self.seconds = Histogram(
            "packscore_request_seconds",
            "From a request's head to its answer.",
            ("endpoint",),
            buckets=BUCKETS,
            registry=self._registry,
        )
        self.items = Counter(
            "packscore_items",
            "Items, documents and questions that were scored.",
            ("model",),
            registry=self._registry,
        )

    def text(self) -> bytes:
        """All of them as Prometheus reads them."""
        return generate_latest(self._registry)
