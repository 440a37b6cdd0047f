"""The counters of all disks and I/O threads, for programs that show rates. Any thread may call; nothing is stopped.

Prometheus' text (scrape.py) has the same counters, but histograms with a bucket per power of two, which is too coarse
for people who look at a latency.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ringplane.api.disk_metrics import SECOND_NS
from ringplane.api.schemas import (
    DiskStatistics,
    IoThreadStatistics,
    OperationStatistics,
    PolicyStatistics,
    SourceOperation,
    SourceStatistics,
    Statistics,
)
from ringplane.block.sources.service import OPERATIONS, Service
from ringplane.control.counters import FIRST_BUCKET, SCALARS, SHAPE, total
from ringplane.control.export import Export
from ringplane.control.server import Server
from ringplane.dataplane.disk_figures import read_figures
from ringplane.dataplane.io_time import TICK_NS
from ringplane.dataplane.state import KINDS
from ringplane.dataplane.thread_counters import TIMES
from ringplane.dataplane.worker import Worker
from ringplane.metrics.histogram import middles

# In a row with the counters of all kinds: the nanoseconds of each bucket, and where each histogram begins and ends.
MIDDLES = middles().astype(np.int64)
TIMES_OF_BUCKETS = np.tile(np.concatenate([np.zeros(FIRST_BUCKET, np.int64), MIDDLES]), SHAPE[0])
HISTOGRAMS = np.arange(SHAPE[0])[:, None] * SHAPE[1] + (FIRST_BUCKET, SHAPE[1])

# Nanoseconds and numbers of requests.
Latencies = list[tuple[int, int]]


def statistics(server: Server) -> Statistics:
    """What has been counted until now."""
    now, exports, workers = time.monotonic(), server.exports, server.threads.workers
    figures = read_figures([export.disk.device for export in exports])
    io_seconds = (figures["busy_ticks"] * TICK_NS / SECOND_NS).tolist()
    counted = np.stack([figures["kinds"][name] for name in SCALARS], axis=-1).tolist()
    return Statistics(
        now,
        list(map(_of_disk, exports, figures["in_flight"].tolist(), io_seconds, counted)),
        [_of_thread(workers[thread.name]) for thread in server.threads.io_threads],
    )


def _of_disk(export: Export, in_flight: int, io_seconds: float, counted: Sequence[Sequence[int]]) -> DiskStatistics:
    """`counted` has the SCALARS of each of KINDS."""
    kinds = zip(KINDS, counted, _latencies(export), strict=True)
    return DiskStatistics(
        name=export.name,
        state=export.state,
        paused=export.paused,
        flush_failed=export.disk.flush_failed,
        in_flight=in_flight,
        throttled_seconds=export.throttled,
        io_seconds=io_seconds,
        operations={
            kind: OperationStatistics(requests, errors, size, nanoseconds / SECOND_NS, latencies)
            for kind, (requests, errors, size, nanoseconds), latencies in kinds
            if requests
        },
        source=_of_service(service) if (service := export.disk.source.service) is not None else None,
        policies=[PolicyStatistics(each.name, each.enabled, each.counters) for each in export.disk.running_policies],
    )


def _of_service(service: Service) -> SourceStatistics:
    return SourceStatistics(
        service.state,
        service.reconnects,
        service.in_flight,
        {
            operation: SourceOperation(
                int(times["ended"]), float(times["nanoseconds"] / SECOND_NS), _latencies_of(times["histogram"])
            )
            for operation, times in zip(OPERATIONS, service.times(), strict=True)
            if times["ended"]
        },
    )


def _latencies_of(histogram: npt.NDArray[np.int64]) -> Latencies:
    filled = histogram.nonzero()[0]
    return list(zip(MIDDLES[filled].tolist(), histogram[filled].tolist(), strict=True))


def _latencies(export: Export) -> list[Latencies]:
    """Of each of KINDS. The counters are searched as one row, because NumPy searches several ones slowly."""
    counted = total(export.disk.started).ravel()
    filled = counted.nonzero()[0]
    pairs = list(zip(TIMES_OF_BUCKETS[filled].tolist(), counted[filled].tolist(), strict=True))
    return [pairs[first:end] for first, end in filled.searchsorted(HISTOGRAMS).tolist()]


def _of_thread(worker: Worker) -> IoThreadStatistics:
    counted = worker.counters.read()
    times = {f"{name}_seconds": float(counted[name] / SECOND_NS) for name in TIMES}
    return IoThreadStatistics(name=worker.name, **times, wakeups=int(counted["wakeups"]))
