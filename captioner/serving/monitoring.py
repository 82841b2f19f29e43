"""Counts for Prometheus: requests, images, batches and the queue."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PATHS = ("/v1/caption", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
"""Paths that are counted separately; all others, which clients may invent, count as `other`."""


class Monitor:
    """Counts of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "captioner_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "captioner_request_seconds", "Time of a request in seconds.", ["path"], registry=self.registry
        )
        self.images = Counter("captioner_images", "Images by result.", ["result"], registry=self.registry)
        sizes = [1, 2, 4, 8, 16, 32, 64, 128]
        self.batches = Histogram("captioner_batch_size", "Images per batch.", buckets=sizes, registry=self.registry)
        self.queue = Gauge("captioner_queue_images", "Images that wait for the model.", registry=self.registry)

    def count(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        path = path if path in PATHS else "other"
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def watch_queue(self, size: Callable[[], float]) -> None:
        """Set the function that returns the size of the queue; it is called when the counts are read."""
        self.queue.set_function(size)

    def write(self) -> bytes:
        """Write the counts in Prometheus's text format."""
        return generate_latest(self.registry)
