"""All metrics of a server: what Prometheus gets. Nothing is done for them while nobody asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ringplane.api.disk_metrics import (
    DISK_INFO,
    DISK_METRICS,
    DURATION,
    IO_ERRORS,
    POLICY_COUNTED,
    POLICY_ENABLED,
    RINGS,
    SOURCE_DURATION,
    SOURCE_NOW,
    SOURCE_RECONNECTS,
    SOURCE_STATE,
    disk_metrics,
)
from ringplane.api.thread_metrics import (
    BATCHES,
    BUILD_INFO,
    PROCESS_METRICS,
    THREAD_INFO,
    THREAD_METRICS,
    process_metrics,
    thread_metrics,
)
from ringplane.control.server import Server
from ringplane.metrics.exposition import Metric, labelled, text

NOT_SERVED = Metric(
    "ringplane_disk_not_served",
    "gauge",
    ("disk",),
    "1 for a disk that was added and cannot be served now; the next start tries again.",
)


def scrape(server: Server) -> Iterator[str]:
    """The text of all metrics, in pieces. It is read from memory that others write at the same time."""
    threads = server.threads
    workers = ((each, threads.workers[each.name]) for each in threads.io_threads)
    yield from disk_metrics(server.exports)
    yield text(NOT_SERVED, [(labelled(NOT_SERVED.labels, (each.name,)), 1) for each in server.not_served])
    yield from thread_metrics(workers)
    yield from process_metrics()


def all_metrics() -> Iterator[Metric]:
    """In the order of the text."""
    yield DISK_INFO
    yield from _of(DISK_METRICS)
    yield from (IO_ERRORS, RINGS, DURATION)
    yield from (SOURCE_STATE, SOURCE_RECONNECTS, SOURCE_NOW, SOURCE_DURATION)
    yield from (POLICY_ENABLED, POLICY_COUNTED, NOT_SERVED)
    yield THREAD_INFO
    yield from _of(THREAD_METRICS)
    yield from (BATCHES, BUILD_INFO)
    yield from _of(PROCESS_METRICS)


def _of(table: Iterable[tuple[Metric, object]]) -> Iterator[Metric]:
    return (metric for metric, _ in table)
