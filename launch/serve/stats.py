"""What the service counts, for Prometheus and for its page."""

import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["ServiceStats", "Speed"]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_WINDOW_S = 30.0
_MOST_REQUESTS = 20_000


@dataclass(frozen=True)
class Speed:
    """The last half minute."""

    requests_per_s: float
    median_ms: float | None  #: None where nothing was asked
    p99_ms: float | None


class ServiceStats:
    """Counters of one service; thread-safe."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "aroface_requests_total", "Answered requests", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "aroface_request_seconds",
            "Time from the last byte of a request to its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._batches = Histogram(
            "aroface_batch_size",
            "Requests that were worked on together",
            ["worker"],
            buckets=_BATCHES,
            registry=self._registry,
        )
        self._batch_seconds = Counter(
            "aroface_batch_seconds_total", "Time spent in batches", ["worker"], registry=self._registry
        )
        self._queue = Gauge("aroface_queue_depth", "Requests that wait", ["worker"], registry=self._registry)
        self._entries = Gauge("aroface_gallery_entries", "Enrolled entries", registry=self._registry)
        self._recent: deque[tuple[float, float]] = deque(maxlen=_MOST_REQUESTS)
        self._lock = threading.Lock()

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """One answered request; `route` is the pattern, never the address, so that labels stay few."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        if route.startswith("/v1/") and route != "/v1/status":
            with self._lock:
                self._recent.append((time.monotonic(), seconds))

    def count_batch(self, worker: str, size: int, seconds: float) -> None:
        """One batch of a worker."""
        self._batches.labels(worker).observe(size)
        self._batch_seconds.labels(worker).inc(seconds)

    def speed(self) -> Speed:
        """Rate and latency over the last half minute."""
        since = time.monotonic() - _WINDOW_S
        with self._lock:
            while self._recent and self._recent[0][0] < since:
                self._recent.popleft()
            times = [1000 * seconds for _, seconds in self._recent]
        if not times:
            return Speed(0.0, None, None)
        median, last = np.percentile(times, [50, 99])
        return Speed(len(times) / _WINDOW_S, float(median), float(last))

    def exposition(self, *, depths: dict[str, int], entries: int) -> bytes:
        """Everything in Prometheus' text format."""
        for worker, depth in depths.items():
            self._queue.labels(worker).set(depth)
        self._entries.set(entries)
        return generate_latest(self._registry)
