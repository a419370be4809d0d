"""The counts that Prometheus reads. Does not import jax."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)

__all__ = ["CONTENT_TYPE", "Metrics"]


class Metrics:
    """The counts of one server."""

    def __init__(self):
        self._registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self._registry, "namespace": "jaxspd"}
        self.requests = Counter(
            "requests", "HTTP requests, by endpoint and status", ["endpoint", "status"], **options
        )
        self.seconds = Histogram(
            "request_seconds",
            "from a request's arrival to the end of its answer",
            ["endpoint"],
            buckets=SECONDS,
            **options,
        )
        self.queued = Histogram("queued_seconds", "a job's time in the queue", buckets=SECONDS, **options)
        self.made = Histogram("made_seconds", "the time in which a job is made", buckets=SECONDS, **options)
        self.jobs = Counter("jobs", "jobs, by how they ended", ["end"], **options)
        self.outputs = Counter("outputs", "pictures and videos made", **options)
        self.together = Counter("jobs_together", "jobs made together with others", **options)
        self.waiting = Gauge("waiting_jobs", "jobs in the queue", **options)
        self.stored = Gauge("stored_bytes", "finished outputs kept in memory", **options)

    def text(self) -> bytes:
        return generate_latest(self._registry)
