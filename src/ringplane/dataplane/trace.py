"""Trace events: compiled code writes them to a ring buffer while tracing is on, and Python reads them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringplane.compiler.jit import compiled
from ringplane.dataplane.state import (
    TRACE,
    TRACE_CAPACITY,
    TRACE_COMPLETE,
    TRACE_FETCH,
    TRACE_SIZE,
    TRACE_START,
    TRACE_STOP,
    WORKER_TRACED,
)
from ringplane.native.access import address_of, store64_release, view
from ringplane.virtio import blk, blk_zones

EVENT_NAMES = {TRACE_FETCH: "fetch", TRACE_COMPLETE: "complete", TRACE_START: "start", TRACE_STOP: "stop"}
TYPE_NAMES = {
    blk.VIRTIO_BLK_T_IN: "read",
    blk.VIRTIO_BLK_T_OUT: "write",
    blk.VIRTIO_BLK_T_FLUSH: "flush",
    blk.VIRTIO_BLK_T_GET_ID: "get-id",
    blk.VIRTIO_BLK_T_GET_LIFETIME: "get-lifetime",
    blk.VIRTIO_BLK_T_DISCARD: "discard",
    blk.VIRTIO_BLK_T_WRITE_ZEROES: "write-zeroes",
    blk.VIRTIO_BLK_T_SECURE_ERASE: "secure-erase",
    blk_zones.VIRTIO_BLK_T_ZONE_APPEND: "zone-append",
    blk_zones.VIRTIO_BLK_T_ZONE_REPORT: "zone-report",
    blk_zones.VIRTIO_BLK_T_ZONE_OPEN: "zone-open",
    blk_zones.VIRTIO_BLK_T_ZONE_CLOSE: "zone-close",
    blk_zones.VIRTIO_BLK_T_ZONE_FINISH: "zone-finish",
    blk_zones.VIRTIO_BLK_T_ZONE_RESET: "zone-reset",
    blk_zones.VIRTIO_BLK_T_ZONE_RESET_ALL: "zone-reset-all",
}
STATUS_NAMES = {
    blk.VIRTIO_BLK_S_OK: "ok",
    blk.VIRTIO_BLK_S_IOERR: "ioerr",
    blk.VIRTIO_BLK_S_UNSUPP: "unsupp",
    blk_zones.VIRTIO_BLK_S_ZONE_INVALID_CMD: "zone-invalid-cmd",
    blk_zones.VIRTIO_BLK_S_ZONE_UNALIGNED_WP: "zone-unaligned-wp",
    blk_zones.VIRTIO_BLK_S_ZONE_OPEN_RESOURCE: "zone-open-resource",
    blk_zones.VIRTIO_BLK_S_ZONE_ACTIVE_RESOURCE: "zone-active-resource",
}


@compiled
def trace(worker, event, queue, request, status, nanoseconds):
    """Write one event."""
    entry = view(worker.trace + (worker.traced & (TRACE_CAPACITY - 1)) * TRACE_SIZE, TRACE)
    entry.time = worker.now
    entry.event = event
    entry.device = queue.device
    entry.queue = queue.number
    entry.head = request.head
    entry.type = request.type
    entry.sector = request.sector
    entry.length = request.length
    entry.status = status
    entry.nanoseconds = nanoseconds
    # Release: the entry is complete before it is counted. The reader loads the count, then the entries.
    store64_release(address_of(worker) + WORKER_TRACED, worker.traced + 1)


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """The fetch or completion of a request, or the start or stop of a queue.

    For a queue, `sector` is its index in the available ring and `length` its size. Only completions have `status` and
    `microseconds`.
    """

    time_ns: int
    event: int
    device: int
    queue: int
    head: int
    type: int
    sector: int
    length: int
    status: int
    microseconds: float

    def __str__(self) -> str:
        start = f"{self.time_ns / 1e9:.6f} {EVENT_NAMES[self.event]:<8} queue={self.queue}"
        if self.event in (TRACE_START, TRACE_STOP):
            return f"{start} index={self.sector} size={self.length}"
        name = TYPE_NAMES.get(self.type, f"type-{self.type}")
        what = f"{start} head={self.head} {name} sector={self.sector} length={self.length}"
        if self.event == TRACE_FETCH:
            return what
        return f"{what} result={STATUS_NAMES.get(self.status, self.status)} us={self.microseconds:.1f}"


class TraceRing:
    """A worker's ring buffer of events: written by its thread, from compiled code and Python, read by any thread."""

    def __init__(self, worker: npt.NDArray[np.void]) -> None:
        """`worker` is the WORKER array of shape (1,) that counts the events."""
        self._worker = worker
        self._ring: npt.NDArray[np.void] = np.zeros(TRACE_CAPACITY, TRACE)
        self.address = int(self._ring.ctypes.data)

    @property
    def written(self) -> int:
        """How many events there have been."""
        return int(self._worker["traced"][0])

    def add(self, event: int, queue: npt.NDArray[np.void]) -> None:
        """Add the start or stop of a queue, given as its QUEUE array; only on the worker's thread."""
        record = queue[0]
        entry = np.zeros((), TRACE)
        entry["time"], entry["event"] = time.monotonic_ns(), event
        entry["device"], entry["queue"] = record["device"], record["number"]
        entry["sector"], entry["length"] = record["last_avail"], record["size"]
        self._ring[self.written % TRACE_CAPACITY] = entry
        self._worker["traced"] += 1

    def copy(self, first: int, last: int) -> npt.NDArray[np.void]:
        """Events `first` to `last` (excluded); those that were overwritten are replaced by newer ones."""
        return self._ring[np.arange(first, last) % TRACE_CAPACITY]


class TraceReader:
    """Reads a worker's events without stopping it."""

    def __init__(self, ring: TraceRing) -> None:
        self._ring = ring
        self._read = ring.written
        self.lost = 0

    def events(self, limit: int = TRACE_CAPACITY) -> Iterator[TraceEvent]:
        """The events since the last call, at most the oldest `limit`; those overwritten unread count in `lost`."""
        written = self._ring.written
        first = max(self._read, written - TRACE_CAPACITY)
        last = min(written, first + limit)
        entries = self._ring.copy(first, last)
        # Also lost: what the worker has overwritten while we copied, and the entry that it may be writing now.
        intact = min(last, max(first, self._ring.written - TRACE_CAPACITY + 1))
        self.lost += intact - self._read
        self._read = last
        for entry in entries[intact - first :]:
            yield _event(entry)


def _event(entry: np.void) -> TraceEvent:
    numbers = {name: int(entry[name]) for name in TRACE.names or ()}
    return TraceEvent(time_ns=numbers.pop("time"), microseconds=numbers.pop("nanoseconds") / 1000, **numbers)
