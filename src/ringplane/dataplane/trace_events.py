"""The trace events of a worker, from compiled code (tracer.py) and Python, and who reads them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ringplane.block.stack import Stack
from ringplane.compiler.units import addresses
from ringplane.dataplane.queue import Queue
from ringplane.dataplane.trace_layout import (
    COMPLETE,
    EVENT,
    FETCH,
    HOLD,
    IN_FLIGHT,
    LAST_TYPE,
    LEAVE,
    RELEASE,
    RETURN,
    START,
    STOP,
    Events,
    fill,
    values,
)
from ringplane.dataplane.tracer import CAPACITY, TRACER, UNITS, passed
from ringplane.dataplane.worker_state import WorkerState
from ringplane.native.structs import new
from ringplane.virtio import blk, blk_zones

EVENT_NAMES = {
    FETCH: "fetch",
    LEAVE: "leave",
    RETURN: "return",
    COMPLETE: "complete",
    START: "start",
    STOP: "stop",
    HOLD: "hold",
    RELEASE: "release",
    IN_FLIGHT: "in-flight",
}
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
    LAST_TYPE: "unknown",
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

# A reader that has lost events continues so many after the oldest one that is left.
MARGIN = CAPACITY // 4


class TracedQueue(NamedTuple):
    """What is known of a queue that has events. `layered`: its disk has layers."""

    disk: str
    number: int
    layered: bool


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """What happens to a request or a queue.

    For a queue, `sector` is its index in the available ring and `length` its size. Only completions have `status` and
    `microseconds`, which are since the fetch. `waited_us`: microseconds in the ring before the fetch.
    """

    time_ns: int
    event: int
    disk: str
    queue: int
    head: int
    type: int
    sector: int
    length: int
    status: int
    microseconds: float
    waited_us: float = 0.0

    def __str__(self) -> str:
        start = f"{self.time_ns / 1e9:.6f} {EVENT_NAMES[self.event]:<8} queue={self.queue}"
        if self.event in (START, STOP):
            return f"{start} index={self.sector} size={self.length}"
        if self.event in (HOLD, RELEASE):
            return start
        name = TYPE_NAMES.get(self.type, f"type-{self.type}")
        what = f"{start} head={self.head} {name} sector={self.sector} length={self.length}"
        if self.event != COMPLETE:
            return what
        return f"{what} result={STATUS_NAMES.get(self.status, self.status)} us={self.microseconds:.1f}"


class Tracer:
    """A worker's ring buffer of events: written by its thread, from compiled code and Python, read by any thread."""

    def __init__(self, state: WorkerState, events: Events) -> None:
        """`load_tracing` must have been called before. `events`: from `room_for_events`."""
        self._state = state
        self._events = events
        self._waits = np.zeros(len(state.slots.requests), np.int64)
        self._record: npt.NDArray[np.void] = new(TRACER)
        self.address = int(self._record.ctypes.data)
        record = self._record[0]
        for name, address in addresses(UNITS).items():
            record[name] = address
        record["worker"], record["events"] = state.address, self._events.ctypes.data
        record["waits"] = self._waits.ctypes.data
        # Only appended to, because other threads read it: a queue's number is its index.
        self.queues: list[TracedQueue] = []
        self._numbers: dict[TracedQueue, int] = {}
        # That have a probe, also when their queues are not served any more.
        self._stacks: set[Stack] = set()

    @property
    def written(self) -> int:
        """How many events there have been."""
        return int(self._record["written"][0])

    def lend(self, first: int, last: int) -> Events:
        """Events `first` to `last` (excluded), in one piece, where they are: newer ones overwrite them."""
        start = first % CAPACITY
        return self._events[start : start + last - first]

    # On the worker's thread, between two runs.

    def want_fetches(self, wanted: bool) -> None:
        """Whether there are events of fetches from now on."""
        self._record["fetches"] = wanted

    def start(self, queues: Iterable[Queue]) -> None:
        """Trace from now on; these queues are served."""
        for queue in queues:
            self._watch(queue)
        self._state.record["trace"] = self.address

    def stop(self) -> None:
        """Trace no more."""
        self._state.record["trace"] = 0
        for stack in self._stacks:
            stack.remove_probe()

    def add(self, event: int, queue: Queue) -> None:
        """Add the start or stop of a queue."""
        self._watch(queue)
        record = queue.record
        entry = self._events[self.written % CAPACITY : self.written % CAPACITY + 1]
        fill(
            entry, time=time.monotonic_ns(), event=event, queue=record["traced"], sector=record["last_avail"],
            length=record["size"],
        )  # fmt: skip
        self._record["written"] += 1

    def in_flight(self, queues: Iterable[Queue], event: int) -> Events:
        """For each request of these queues that is in flight an event with the time of its fetch, in their order."""
        requests = self._state.slots.requests
        found = [np.zeros(0, EVENT)]
        for queue in queues:
            ours = requests[requests["queue"] == queue.address]
            if queue.record["in_order"]:
                # They are completed, and wait for older ones.
                ours = ours[ours["ended"] == 0]
            events = np.zeros(len(ours), EVENT)
            fill(
                events, time=ours["started"], event=event, queue=queue.record["traced"],
                waited=self._waits[ours["slot"]], **{name: ours[name] for name in ("sector", "length", "type", "head")},
            )  # fmt: skip
            found.append(events)
        together = np.concatenate(found)
        return together[np.argsort(together["time"], kind="stable")]

    def _watch(self, queue: Queue) -> None:
        described = TracedQueue(queue.device.name, queue.number, bool(queue.stack.layers))
        number = self._numbers.setdefault(described, len(self.queues))
        if number == len(self.queues):
            self.queues.append(described)
        queue.record["traced"], queue.record["traced_avail"] = number, -1
        queue.stack.set_probe(self.address, passed.address())
        self._stacks.add(queue.stack)


def room_for_events() -> Events:
    """The memory of a ring buffer, with its pages: otherwise the I/O thread would wait for each while guests do."""
    events: Events = np.empty(CAPACITY, EVENT)
    events.view(np.uint8).fill(0)
    return events


class TraceReader:
    """Reads a worker's events without stopping it."""

    def __init__(self, tracer: Tracer, fetches: bool, in_flight: Events) -> None:
        """From now on; `in_flight` are events that come before those. `fetches`: whether it wants events of fetches."""
        self.fetches = fetches
        self._tracer = tracer
        self._before, self._after = in_flight, in_flight[:0]
        # Events up to here have been read or lost, and up to there `read` returns them.
        self._read = self._seen = tracer.written
        # How many events there will have been, when that is known.
        self._end: int | None = None
        # What `read` returned last.
        self._lent = range(0)
        self.lost = 0

    @property
    def queues(self) -> Sequence[TracedQueue]:
        """Those of all events that were read, by their numbers; it becomes longer."""
        return self._tracer.queues

    def look(self) -> int:
        """Have `read` return the events until now; returns how many of them it has not returned yet.

        So a slow reader comes to an end, whatever the worker writes meanwhile.
        """
        self._seen = self._tracer.written if self._end is None else self._end
        return self._seen - self._read

    def end(self, in_flight: Events) -> None:
        """No events come any more but these. Called on the worker's thread."""
        self._after = in_flight
        self._end = self._tracer.written

    def read(self, limit: int = CAPACITY) -> Events:
        """The oldest events since the last call, at most `limit`, or up to the end of the ring buffer; none: no more
        until the next `look`.

        They are lent: the worker may overwrite them while they are used, as `overwritten` says afterwards. Those that
        it has overwritten unread count in `lost`.
        """
        self._lent = range(0)
        if len(self._before):
            before, self._before = self._before, self._before[:0]
            return before
        first, seen = self._read, self._seen
        if first == self._end and len(self._after):
            after, self._after = self._after, self._after[:0]
            return after
        oldest = self._tracer.written - CAPACITY
        if first < oldest:
            # The oldest ones would be overwritten while they are used.
            first = min(oldest + MARGIN, seen)
        last = min(seen, first + limit, first - first % CAPACITY + CAPACITY)
        self.lost += first - self._read
        self._read = last
        self._lent = range(first, last)
        return self._tracer.lend(first, last)

    def overwritten(self) -> int:
        """How many of the events that `read` returned last were overwritten since, the oldest; they count in `lost`.

        To be asked once, as soon as they have been used: what is overwritten later was not lost.
        """
        # Also the entry that the worker may be writing now.
        oldest = self._tracer.written - CAPACITY + 1
        overwritten = min(max(oldest - self._lent.start, 0), len(self._lent))
        self._lent = range(0)
        self.lost += overwritten
        return overwritten

    def events(self, limit: int = CAPACITY) -> Iterator[TraceEvent]:
        """The events since the last call one by one, at least the oldest `limit` of them."""
        self.look()
        while len(entries := self.read(limit).copy()):
            limit -= len(entries)
            columns = values(entries[self.overwritten() :])
            for row in zip(*(column.tolist() for column in columns.values()), strict=True):
                yield self._event(dict(zip(columns, row, strict=True)))
            if limit <= 0:
                return

    def _event(self, entry: dict[str, int]) -> TraceEvent:
        queue = self.queues[entry["queue"]]
        return TraceEvent(
            time_ns=entry["time"],
            event=entry["event"],
            disk=queue.disk,
            queue=queue.number,
            head=entry["head"],
            type=entry["type"],
            sector=entry["sector"],
            length=entry["length"],
            status=entry["status"],
            microseconds=entry["lasted"] / 1000,
            waited_us=entry["waited"] / 1000,
        )


def load_tracing() -> None:
    """Compile or load what tracing calls, for threads that cannot: I/O threads, and those of a confined process."""
    for each in UNITS:
        each.address()
