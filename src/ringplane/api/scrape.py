"""All metrics of a server: what Prometheus gets. Nothing is done for them while nobody asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ringplane.api.disk_metrics import DISK_INFO, DISK_METRICS, DURATION, IO_ERRORS, RINGS, disk_metrics
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
from ringplane.metrics.exposition import Metric


def scrape(server: Server) -> str:
    """The text of all metrics, which is read from memory that others write at the same time. Any thread may call."""
    threads = server.threads
    workers = ((each, threads.workers[each.name]) for each in threads.io_threads)
    return "".join([*disk_metrics(server.exports), *thread_metrics(workers), *process_metrics()])


def all_metrics() -> Iterator[Metric]:
    """In the order of the text."""
    yield DISK_INFO
    yield from _of(DISK_METRICS)
    yield from (IO_ERRORS, RINGS, DURATION, THREAD_INFO)
    yield from _of(THREAD_METRICS)
    yield from (BATCHES, BUILD_INFO)
    yield from _of(PROCESS_METRICS)


def _of(table: Iterable[tuple[Metric, object]]) -> Iterator[Metric]:
    return (metric for metric, _ in table)
