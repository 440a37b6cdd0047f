"""The counters of all disks and I/O threads, for programs that show rates. Any thread may call; nothing is stopped.

Prometheus' text (scrape.py) has the same counters, but histograms with a bucket per power of two, which is too coarse
for people who look at a latency.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from ringplane.api.disk_metrics import REQUESTS, SECOND_NS
from ringplane.api.schemas import DiskStatistics, IoThreadStatistics, OperationStatistics, Statistics
from ringplane.control.counters import FIRST_BUCKET, SCALARS, total
from ringplane.control.export import Export
from ringplane.control.server import Server
from ringplane.dataplane.state import KINDS
from ringplane.dataplane.worker import Worker
from ringplane.metrics.histogram import middles

MIDDLES = middles().astype(np.int64)


def statistics(server: Server) -> Statistics:
    """What has been counted until now."""
    now = time.monotonic()
    workers = server.threads.workers
    return Statistics(
        now,
        [_of_disk(export) for export in server.exports],
        [_of_thread(workers[thread.name]) for thread in server.threads.io_threads],
    )


def _of_disk(export: Export) -> DiskStatistics:
    rows = zip(KINDS, total(export.disk.queues), strict=True)
    return DiskStatistics(
        name=export.name,
        state=export.state,
        paused=export.paused,
        flush_failed=export.disk.flush_failed,
        in_flight=export.in_flight,
        throttled_seconds=export.throttled,
        operations={kind: _of_operation(row) for kind, row in rows if row[REQUESTS]},
    )


def _of_operation(row: npt.NDArray[np.int64]) -> OperationStatistics:
    counted = dict(zip(SCALARS, row[:FIRST_BUCKET].tolist(), strict=True))
    nanoseconds, histogram = counted.pop("nanoseconds"), row[FIRST_BUCKET:]
    filled = histogram.nonzero()[0]
    latencies = list(zip(MIDDLES[filled].tolist(), histogram[filled].tolist(), strict=True))
    return OperationStatistics(**counted, seconds=nanoseconds / SECOND_NS, latencies=latencies)


def _of_thread(worker: Worker) -> IoThreadStatistics:
    times = worker.clock.read()
    return IoThreadStatistics(
        name=worker.name,
        busy_seconds=times.busy / SECOND_NS,
        polling_seconds=times.polling / SECOND_NS,
        asleep_seconds=times.asleep / SECOND_NS,
        wakeups=int(worker.state.record["wakeups"]),
    )
