"""What Prometheus is told."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric

from catimage_accel.serve.messages import Round

__all__ = ["Metrics"]

WINDOW = 300.0
"""Seconds that latency percentiles and route shares look back."""
RATE_WINDOW = 60.0
QUANTILES = (0.5, 0.9, 0.95, 0.99)
_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_SECONDS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, float("inf"))
disable_created_metrics()  # a second sample for every series, of which nobody asks


class Metrics:
    """One registry of its own, so that several services may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.images = Counter(
            "catimage_images", "Images asked for, by how they ended and the candidate chosen.",
            ["candidate", "outcome"], registry=self.registry,
        )  # fmt: skip
        self.steps = Counter("catimage_denoise_steps", "Denoising steps, of every image.", registry=self.registry)
        self.batch = Histogram(
            "catimage_batch_images", "Images in one denoising step.", buckets=(*_BATCHES, float("inf")),
            registry=self.registry,
        )  # fmt: skip
        self.latency = Histogram(
            "catimage_latency_seconds", "From an image's request to its end, queue included.", buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.cost = Counter(
            "catimage_cost", "Cost of the images drawn, and what the dearest candidate would have cost more.",
            ["kind"], registry=self.registry,
        )  # fmt: skip
        self.retries = Counter("catimage_retries", "Images drawn again.", ["reason"], registry=self.registry)
        self._ended: deque[tuple[float, float, str]] = deque()
        self._stepped: deque[tuple[float, int]] = deque()
        self.registry.register(self)  # type: ignore[arg-type]

    def watch_queue(self, waiting: Callable[[], int], drawing: Callable[[], int]) -> None:
        """Has the gauges of the queue ask for their values."""
        for name, text, value in (
            ("catimage_queue_depth", "Images that wait for a slot.", waiting),
            ("catimage_in_flight", "Images being drawn.", drawing),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)

    def watch_workers(self, ready: Callable[[], int], restarts: Callable[[], int]) -> None:
        """Has the gauges of workers ask for their values."""
        Gauge("catimage_workers", "Workers that are ready.", registry=self.registry).set_function(ready)
        text = "Workers lost and replaced."
        Gauge("catimage_worker_restarts", text, registry=self.registry).set_function(restarts)

    def watch_tradeoff(self, tradeoff: Callable[[], float]) -> None:
        """Has the gauge of the load's effect ask for its value."""
        text = "What the load makes of the catalog's own tradeoff."
        Gauge("catimage_tradeoff", text, registry=self.registry).set_function(tradeoff)

    def stepped(self, done: Round) -> None:
        """One step of every batch."""
        for size in done.batches:
            self.batch.observe(size)
        images = sum(done.batches)
        self.steps.inc(images)
        self._stepped.append((time.monotonic(), images))
        _forget(self._stepped, RATE_WINDOW)

    def ended(self, outcome: str, candidate: str, seconds: float, cost: float, dearest: float) -> None:
        """An image's end; ``cost`` is its candidate's, ``dearest`` the catalog's highest."""
        self.images.labels(candidate=candidate, outcome=outcome).inc()
        if outcome != "drawn":
            return
        self.latency.observe(seconds)
        self.cost.labels(kind="spent").inc(cost)
        self.cost.labels(kind="saved").inc(dearest - cost)
        self._ended.append((time.monotonic(), seconds, candidate))
        _forget(self._ended, WINDOW)

    def exposition(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """What is computed when asked for: percentiles, rates and shares of the last minutes."""
        _forget(self._ended, WINDOW)
        _forget(self._stepped, RATE_WINDOW)
        latency = GaugeMetricFamily(
            "catimage_latency_quantile_seconds", f"Percentiles of the latency of the last {WINDOW:.0f} seconds.",
            labels=["quantile"],
        )  # fmt: skip
        if self._ended:
            seconds = np.array([one[1] for one in self._ended])
            for quantile in QUANTILES:
                latency.add_metric([str(quantile)], float(np.quantile(seconds, quantile)))
        yield latency
        share = GaugeMetricFamily(
            "catimage_route_share", f"Share of the images of the last {WINDOW:.0f} seconds by candidate.",
            labels=["candidate"],
        )  # fmt: skip
        names = [one[2] for one in self._ended]
        for name in sorted(set(names)):
            share.add_metric([name], names.count(name) / len(names))
        yield share
        recent = sum(1 for one in self._ended if one[0] >= time.monotonic() - RATE_WINDOW)
        yield GaugeMetricFamily(
            "catimage_images_per_second", f"Over the last {RATE_WINDOW:.0f} seconds.", value=recent / RATE_WINDOW
        )
        steps = sum(one[1] for one in self._stepped)
        yield GaugeMetricFamily(
            "catimage_denoise_steps_per_second", f"Over the last {RATE_WINDOW:.0f} seconds.", value=steps / RATE_WINDOW
        )


def _forget(events: deque[tuple[float, float, str]] | deque[tuple[float, int]], window: float) -> None:
    limit = time.monotonic() - window
    while events and events[0][0] < limit:
        events.popleft()
