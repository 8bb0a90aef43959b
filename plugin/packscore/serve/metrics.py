"""Counters for Prometheus, in a registry of the app's own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from packscore.serve.models import Models

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 100.0)


class Metrics:
    """What one app counts."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._registry = CollectorRegistry()
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
