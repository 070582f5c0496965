"""What Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from piflux.serving.jobs import Report, State

SECONDS = (
    0.01,
    0.03,
    0.1,
    0.3,
    1.0,
    2.0,
    3.0,
    5.0,
    7.0,
    10.0,
    15.0,
    20.0,
    30.0,
    60.0,
    120.0,
    300.0,
)
"""Bounds of the histograms' buckets."""


class Metrics:
    """One server's metrics, in a registry of their own.

    Args:
        state: the engine's, asked when they are read.
        kept: bytes of pictures that wait to be fetched.
    """

    def __init__(self, state: Callable[[], State], kept: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "piflux_http_requests", "HTTP requests.", ("route", "method", "code"), registry=registry
        )
        self.seconds = Histogram(
            "piflux_http_request_seconds",
            "From a request's head to the end of its answer.",
            ("route",),
            buckets=SECONDS,
            registry=registry,
        )
        self.images = Counter(
            "piflux_images", "Pictures that were drawn.", ("quality", "policy"), registry=registry
        )
        self.waiting = Histogram(
            "piflux_waiting_seconds", "In the queue.", buckets=SECONDS, registry=registry
        )
        self.drawing = Histogram(
            "piflux_drawing_seconds",
            "From the queue to the pictures.",
            ("quality", "ranks"),
            buckets=SECONDS,
            registry=registry,
        )
        self.steps = Counter(
            "piflux_steps", "Denoise steps: computed, or skipped.", ("kind",), registry=registry
        )
        self.failures = Counter(
            "piflux_failures",
            "Requests without a picture, by error code.",
            ("code",),
            registry=registry,
        )
        self.cancelled = Counter(
            "piflux_cancelled", "Requests whose clients went away.", registry=registry
        )
        self.recovered = Counter(
            "piflux_recovered",
            "Ranks lost while a picture was drawn, which it outlived.",
            registry=registry,
        )
        ProcessCollector(registry=registry)
        registry.register(_Now(state, kept))

    def drawn(self, report: Report, pictures: int) -> None:
        self.images.labels(report.quality, report.policy).inc(pictures)
        self.waiting.observe(report.waited_s)
        self.drawing.labels(report.quality, report.ranks).observe(report.drawn_s)
        self.steps.labels("computed").inc(report.computed)
        self.steps.labels("skipped").inc(report.steps - report.computed)
        self.recovered.inc(report.recovered)


class _Now(Collector):
    """What holds at the moment of reading."""

    def __init__(self, state: Callable[[], State], kept: Callable[[], int]) -> None:
        self._state, self._kept = state, kept

    def describe(self) -> Iterable[Metric]:
        return ()  # else they would be collected to learn their names, before there is an engine

    def collect(self) -> Iterable[Metric]:
        state = self._state()
        plain = {
            "ready": ("Whether requests are taken.", float(state.phase == "ready")),
            "queue_length": ("Requests that wait.", state.waiting),
            "drawing": ("Requests that are drawn.", state.drawing),
            "ranks": ("Ranks that live.", state.ranks),
            "ranks_wanted": ("Ranks if none is lost.", state.wanted),
            "ranks_replaced": ("Ranks started in place of lost ones.", state.replaced),
            "since_step_seconds": ("Since a rank has last stepped or idled.", state.stepped_s),
            "kept_bytes": ("Pictures that wait to be fetched.", self._kept()),
        }
        for name, (help_, value) in plain.items():
            yield GaugeMetricFamily(f"piflux_{name}", help_, value=float(value))
        groups = GaugeMetricFamily("piflux_groups", "Groups by their ranks.", labels=("size",))
        for size in sorted(set(state.groups)):
            groups.add_metric((str(size),), state.groups.count(size))
        yield groups
        memory = GaugeMetricFamily(
            "piflux_rank_memory_bytes", "In use by a rank.", labels=("rank",)
        )
        for rank, count in state.memory.items():
            memory.add_metric((str(rank),), count)
        yield memory
