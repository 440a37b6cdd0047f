"""Tracing: a reader sees the events in order, and counts those that were overwritten before it read them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from ringplane.dataplane.state import (
    QUEUE,
    REQUEST,
    TRACE_CAPACITY,
    TRACE_COMPLETE,
    TRACE_FETCH,
    TRACE_START,
    TRACE_STOP,
    WORKER,
)
from ringplane.dataplane.trace import TraceEvent, TraceReader, TraceRing, trace

from .on_structs import on_structs


class Tracer:
    """A worker that only traces."""

    def __init__(self) -> None:
        self.worker = np.zeros(1, WORKER)
        self.ring = TraceRing(self.worker)
        self.queue, self.request = np.zeros(1, QUEUE), np.zeros(1, REQUEST)
        self.worker["trace"] = self.ring.address
        self.traced = 0

    def trace(self, count: int) -> None:
        """Trace completions whose sectors count up from zero."""
        worker, queue, request = self.worker[0], self.queue[0], self.request[0]
        for _ in range(count):
            request["sector"] = self.traced
            on_structs(trace)(worker, TRACE_COMPLETE, queue, request, 0, 0)
            self.traced += 1

    def reader(self) -> TraceReader:
        return TraceReader(self.ring)


def sectors(reader: TraceReader) -> list[int]:
    return [event.sector for event in reader.events()]


def test_every_event_is_seen_once() -> None:
    tracer = Tracer()
    reader = tracer.reader()
    assert sectors(reader) == []
    tracer.trace(3)
    assert sectors(reader) == [0, 1, 2]
    tracer.trace(2)
    assert sectors(reader) == [3, 4]
    assert sectors(reader) == []
    assert reader.lost == 0


def test_a_reader_starts_with_later_events() -> None:
    tracer = Tracer()
    tracer.trace(5)
    reader = tracer.reader()
    tracer.trace(1)
    assert sectors(reader) == [5]


def test_two_readers_are_independent() -> None:
    tracer = Tracer()
    one, other = tracer.reader(), tracer.reader()
    tracer.trace(2)
    assert sectors(one) == sectors(other) == [0, 1]


def test_the_ring_wraps_around() -> None:
    tracer = Tracer()
    reader = tracer.reader()
    tracer.trace(TRACE_CAPACITY - 2)
    assert len(sectors(reader)) == TRACE_CAPACITY - 2
    tracer.trace(5)
    assert sectors(reader) == list(range(TRACE_CAPACITY - 2, TRACE_CAPACITY + 3))
    assert reader.lost == 0


@pytest.mark.parametrize("too_many", [1, 100, TRACE_CAPACITY + 7])
def test_overwritten_events_are_counted_as_lost(too_many: int) -> None:
    tracer = Tracer()
    reader = tracer.reader()
    tracer.trace(TRACE_CAPACITY + too_many)
    seen = sectors(reader)
    # One more event may be skipped, because the worker could be writing it.
    assert too_many <= reader.lost <= too_many + 1
    assert seen == list(range(reader.lost, TRACE_CAPACITY + too_many))
    tracer.trace(1)
    assert sectors(reader) == [TRACE_CAPACITY + too_many]


class Racing(TraceRing):
    """A ring that advances while it is copied."""

    def copy(self, first: int, last: int) -> npt.NDArray[np.void]:
        self._worker["traced"] += 10
        return super().copy(first, last)


def test_events_overwritten_during_a_read_are_lost_too() -> None:
    tracer = Tracer()
    tracer.ring = Racing(tracer.worker)
    tracer.worker["trace"] = tracer.ring.address
    reader = tracer.reader()
    tracer.trace(TRACE_CAPACITY)
    assert sectors(reader) == list(range(11, TRACE_CAPACITY))
    assert reader.lost == 11


def test_fields_of_all_kinds_of_events() -> None:
    tracer = Tracer()
    reader = tracer.reader()
    tracer.worker["now"] = 1_500_000_000
    tracer.queue["device"], tracer.queue["number"] = 77, 3
    for field, value in (("head", 9), ("type", 1), ("sector", 64), ("length", 4096)):
        tracer.request[field] = value
    on_structs(trace)(tracer.worker[0], TRACE_FETCH, tracer.queue[0], tracer.request[0], 0, 0)
    on_structs(trace)(tracer.worker[0], TRACE_COMPLETE, tracer.queue[0], tracer.request[0], 1, 2500)
    tracer.queue["last_avail"], tracer.queue["size"] = 65535, 128
    tracer.ring.add(TRACE_START, tracer.queue)
    fetched, completed, started = reader.events()
    assert fetched == TraceEvent(1_500_000_000, TRACE_FETCH, 77, 3, 9, 1, 64, 4096, 0, 0.0)
    assert completed == TraceEvent(1_500_000_000, TRACE_COMPLETE, 77, 3, 9, 1, 64, 4096, 1, 2.5)
    assert (started.event, started.device, started.queue) == (TRACE_START, 77, 3)
    assert (started.sector, started.length) == (65535, 128)


def test_an_event_keeps_no_fields_of_the_overwritten_one() -> None:
    """The ring has wrapped around, so each place contained a completion before."""
    tracer = Tracer()
    reader = tracer.reader()
    for field in ("head", "type", "sector", "length"):
        tracer.request[field] = 5
    for _ in range(TRACE_CAPACITY):
        on_structs(trace)(tracer.worker[0], TRACE_COMPLETE, tracer.queue[0], tracer.request[0], 1, 2500)
    list(reader.events())
    tracer.ring.add(TRACE_STOP, tracer.queue)
    (stopped,) = reader.events()
    assert (stopped.head, stopped.type, stopped.status, stopped.microseconds) == (0, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            TraceEvent(1_500_000_000, TRACE_FETCH, 77, 3, 9, 1, 64, 4096, 0, 0.0),
            "1.500000 fetch    queue=3 head=9 write sector=64 length=4096",
        ),
        (
            TraceEvent(2_000_001_000, TRACE_COMPLETE, 77, 0, 0, 99, 0, 0, 2, 2.52),
            "2.000001 complete queue=0 head=0 type-99 sector=0 length=0 result=unsupp us=2.5",
        ),
        (
            TraceEvent(2_000_001_000, TRACE_COMPLETE, 77, 0, 0, 15, 0, 0, 4, 2.52),
            "2.000001 complete queue=0 head=0 zone-append sector=0 length=0 result=zone-unaligned-wp us=2.5",
        ),
        (
            TraceEvent(3_000_000_000, TRACE_START, 0, 1, 0, 0, 65535, 128, 0, 0.0),
            "3.000000 start    queue=1 index=65535 size=128",
        ),
    ],
)
def test_events_as_text(event: TraceEvent, text: str) -> None:
    assert str(event) == text
