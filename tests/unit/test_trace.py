"""Tracing: a reader sees the events in order, and counts those that were overwritten before it read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from ringplane.block.layers.delay import DelayPart
from ringplane.block.stack import SourcePart, Stack
from ringplane.dataplane.queue import Device, Queue
from ringplane.dataplane.slots import Slots
from ringplane.dataplane.state import KIND_FLUSH, WORKER
from ringplane.dataplane.trace_events import MARGIN, TracedQueue, TraceEvent, Tracer, TraceReader, room_for_events
from ringplane.dataplane.trace_layout import (
    COMPLETE,
    EVENT,
    FETCH,
    HOLD,
    IN_FLIGHT,
    LAST_SECTOR,
    LEAVE,
    LENGTH_SHIFT,
    LONGEST_WAIT,
    RELEASE,
    RETURN,
    ROUNDED,
    START,
    STOP,
    TIME_SHIFT,
    WAIT_SHIFT,
    fill,
    values,
)
from ringplane.dataplane.tracer import CAPACITY, completed, fetched, held
from ringplane.dataplane.worker_state import WorkerState
from ringplane.limits.member import Member

from .packed_ring import PackedRing
from .rig import FLUSH, IN, OK, PATIENCE, Line, RigFactory, Ring, eventually, pattern, rig_factory
from .test_delay import MS, release
from .test_limit_gate import held as held_by_limits
from .test_limit_gate import hold, limit

DISK = pattern(1 << 20)


class Nowhere(SourcePart):
    """A source without storage."""

    address = submit = ranges = backing = 0


class State:
    """What a tracer needs of a WorkerState."""

    def __init__(self) -> None:
        self.array: npt.NDArray[np.void] = np.zeros(1, WORKER)
        self.record, self.address, self.slots = self.array[0], int(self.array.ctypes.data), Slots(4)
        self.record["requests"] = self.slots.address


class Traced:
    """A queue of a worker that only traces."""

    def __init__(self, tracer_class: type[Tracer] = Tracer) -> None:
        self.state = State()
        device = Device(1 << 20, read_only=False, block_size=512, serial="", name="data")
        self.queue = Queue(device, 3, Stack(Nowhere()))
        self.tracer = tracer_class(cast(WorkerState, self.state), room_for_events())
        self.tracer.start([self.queue])
        self.request = self.state.slots.requests[0]
        self.traced = 0

    def fetch(self) -> None:
        fetched(self.state.address, self.queue.address, self.state.slots.address, OK)

    def complete(self, status: int = OK) -> None:
        completed(self.state.address, self.queue.address, self.state.slots.address, status)

    def trace(self, count: int) -> None:
        """Trace completions whose sectors count up from zero."""
        for _ in range(count):
            self.request["sector"] = self.traced
            self.complete()
            self.traced += 1

    def reader(self, fetches: bool = True) -> TraceReader:
        self.tracer.want_fetches(fetches)
        return TraceReader(self.tracer, fetches, self.tracer.in_flight([self.queue], FETCH))


def test_what_is_worth_reading() -> None:
    traced = Traced()
    reader = traced.reader()
    traced.trace(3)
    assert reader.look() == 3
    assert sectors(reader) == [0, 1, 2]
    assert reader.look() == 0


def sectors(reader: TraceReader) -> list[int]:
    return [event.sector for event in reader.events()]


def test_every_event_is_seen_once() -> None:
    traced = Traced()
    reader = traced.reader()
    assert sectors(reader) == []
    traced.trace(3)
    assert sectors(reader) == [0, 1, 2]
    traced.trace(2)
    assert sectors(reader) == [3, 4]
    assert sectors(reader) == []
    assert reader.lost == 0


def test_a_reader_begins_with_the_present() -> None:
    traced = Traced()
    traced.trace(5)
    reader = traced.reader()
    traced.trace(1)
    assert sectors(reader) == [5]


def test_readers_do_not_disturb_each_other() -> None:
    traced = Traced()
    one, other = traced.reader(), traced.reader()
    traced.trace(2)
    assert sectors(one) == [0, 1]
    assert sectors(other) == [0, 1]


def test_the_ring_wraps_around() -> None:
    traced = Traced()
    reader = traced.reader()
    traced.trace(CAPACITY - 2)
    assert len(sectors(reader)) == CAPACITY - 2
    traced.trace(5)
    assert sectors(reader) == list(range(CAPACITY - 2, CAPACITY + 3))
    assert reader.lost == 0


@pytest.mark.parametrize("too_many", [1, 100, CAPACITY + 7])
def test_overwritten_events_are_lost(too_many: int) -> None:
    traced = Traced()
    reader = traced.reader()
    traced.trace(CAPACITY + too_many)
    seen = sectors(reader)
    # And some more, which would be overwritten while they are read.
    assert reader.lost == too_many + MARGIN
    assert seen == list(range(reader.lost, CAPACITY + too_many))
    traced.trace(1)
    assert sectors(reader) == [CAPACITY + too_many]


@pytest.mark.parametrize("limit", [1, 100, CAPACITY])
def test_events_overwritten_while_they_are_used_are_lost(limit: int) -> None:
    """The oldest one left is the one that the worker would overwrite next."""
    traced = Traced()
    reader = traced.reader()
    traced.trace(CAPACITY)
    reader.look()
    lent = reader.read(limit)
    traced.trace(9)
    assert reader.overwritten() == min(limit, 10)
    assert list(lent["sector"][10:]) == list(range(10, limit))
    # Each is counted once.
    assert reader.overwritten() == 0
    assert reader.lost == min(limit, 10)


class Racing(Tracer):
    """A ring buffer that advances when its events are read."""

    def lend(self, first: int, last: int) -> npt.NDArray[np.void]:
        self._record["written"] += 10
        return super().lend(first, last)


def test_events_overwritten_during_a_read_are_not_seen() -> None:
    traced = Traced(Racing)
    reader = traced.reader()
    traced.trace(CAPACITY)
    assert [event.sector for event in reader.events(CAPACITY)] == list(range(11, CAPACITY))
    assert reader.lost == 11


def test_the_end_of_a_recording() -> None:
    """Nothing that comes later, and then what is in flight."""
    traced = Traced()
    reader = traced.reader(fetches=False)
    traced.fetch()
    traced.trace(2)
    traced.request["queue"], traced.request["started"] = traced.queue.address, 77
    reader.end(traced.tracer.in_flight([traced.queue], IN_FLIGHT))
    traced.trace(CAPACITY - 3)
    assert [(event.event, event.sector) for event in reader.events()] == [(COMPLETE, 0), (COMPLETE, 1), (IN_FLIGHT, 1)]
    assert list(reader.events()) == []
    assert reader.lost == 0


def test_fields_of_all_kinds_of_events() -> None:
    traced = Traced()
    reader = traced.reader()
    for field, value in (("head", 9), ("type", 0xFFFF_FFFE), ("sector", 1 << 40), ("length", 1 << 39)):
        traced.request[field] = value
    traced.state.record["now"] = traced.request["started"] = 1_500_000_000
    traced.fetch()
    traced.state.record["now"] += 2500
    traced.complete(status=1)
    traced.queue.record["last_avail"], traced.queue.record["size"] = 65535, 128
    traced.tracer.add(START, traced.queue)
    fetch, complete, started = reader.events()
    assert fetch == TraceEvent(1_500_000_000, FETCH, "data", 3, 9, 255, 1 << 40, 1 << 39, 0, 0.0)
    assert complete == TraceEvent(1_500_002_500, COMPLETE, "data", 3, 9, 255, 1 << 40, 1 << 39, 1, 2.5)
    assert (started.event, started.disk, started.queue) == (START, "data", 3)
    assert (started.sector, started.length) == (65535, 128)


@pytest.mark.parametrize("sector", [0, 1 << 32, LAST_SECTOR, LAST_SECTOR + 1, (1 << 63) - 1, -1, -(1 << 63)])
@pytest.mark.parametrize("length", [0, ROUNDED - 1, ROUNDED, ROUNDED + 511, ROUNDED + 512, 256 << 30, 1 << 40, 1 << 50])
def test_large_numbers(sector: int, length: int) -> None:
    """They are rounded downwards, or limited; compiled code and Python store the same."""
    traced = Traced()
    reader = traced.reader(fetches=False)
    traced.request["sector"], traced.request["length"], traced.request["head"] = sector, length, 65535
    traced.state.record["now"] = 3 * length
    traced.complete(status=2)
    reader.look()
    entry = reader.read()
    filled = np.zeros(1, EVENT)
    fill(filled, 2, time=3 * length, event=COMPLETE, sector=sector, length=length, head=65535, lasted=3 * length)
    assert entry.tobytes() == filled.tobytes()
    found = values(entry)
    assert found["sector"] == min(sector % (1 << 64), LAST_SECTOR)
    assert found["length"] == rounded(length, LENGTH_SHIFT)
    assert found["lasted"] == rounded(3 * length, TIME_SHIFT)
    assert (found["event"], found["status"], found["head"]) == (COMPLETE, 2, 65535)


def rounded(number: int, shift: int) -> int:
    return number if number < ROUNDED else min(number >> shift, ROUNDED - 1) << shift


def test_an_event_keeps_no_fields_of_the_overwritten_one() -> None:
    """The ring has wrapped around, so each place contained a completion before."""
    traced = Traced()
    reader = traced.reader()
    for field in ("head", "type", "sector", "length"):
        traced.request[field] = 5
    for _ in range(CAPACITY):
        traced.complete(status=1)
    list(reader.events())
    traced.tracer.add(STOP, traced.queue)
    (stopped,) = reader.events()
    assert (stopped.head, stopped.type, stopped.status, stopped.microseconds) == (0, 0, 0, 0.0)


def test_a_chain_is_in_the_ring_from_when_it_was_seen() -> None:
    """The available index is loaded again when all chains up to there have been fetched."""
    traced = Traced()
    reader = traced.reader()
    waits = []
    for now, seen in ((1000, 10), (1000, 10), (1640, 10), (2000, 11), (2500, 12), (2692, 12)):
        traced.state.record["now"], traced.queue.record["seen_avail"] = now, seen
        traced.fetch()
        traced.complete()
        waits += [event.waited_us for event in reader.events()]
    assert waits[::2] == waits[1::2] == [0.0, 0.0, 0.64, 0.0, 0.0, 0.192]


def test_waits_that_are_very_long() -> None:
    traced = Traced()
    reader = traced.reader(fetches=False)
    traced.queue.record["seen_avail"] = 1
    traced.fetch()
    traced.state.record["now"] = (LONGEST_WAIT << WAIT_SHIFT) + 1_000_000
    traced.fetch()
    traced.complete()
    (event,) = reader.events()
    assert event.waited_us == (LONGEST_WAIT << WAIT_SHIFT) / 1000


def test_what_a_held_queue_has_was_seen_then() -> None:
    traced = Traced()
    reader = traced.reader()
    traced.queue.record["seen_avail"] = 5
    held(traced.state.address, traced.queue.address, HOLD, 1000)
    held(traced.state.address, traced.queue.address, RELEASE, 4000)
    traced.state.record["now"] = 7400
    traced.fetch()
    assert [(event.event, event.waited_us) for event in reader.events()] == [(HOLD, 0), (RELEASE, 0), (FETCH, 6.4)]


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            TraceEvent(1_500_000_000, FETCH, "data", 3, 9, 1, 64, 4096, 0, 0.0),
            "1.500000 fetch    queue=3 head=9 write sector=64 length=4096",
        ),
        (
            TraceEvent(2_000_001_000, COMPLETE, "data", 0, 0, 99, 0, 0, 2, 2.52),
            "2.000001 complete queue=0 head=0 type-99 sector=0 length=0 result=unsupp us=2.5",
        ),
        (
            TraceEvent(2_000_001_000, COMPLETE, "data", 0, 0, 15, 0, 0, 4, 2.52),
            "2.000001 complete queue=0 head=0 zone-append sector=0 length=0 result=zone-unaligned-wp us=2.5",
        ),
        (
            TraceEvent(3_000_000_000, START, "data", 1, 0, 0, 65535, 128, 0, 0.0),
            "3.000000 start    queue=1 index=65535 size=128",
        ),
        (TraceEvent(3_000_000_000, HOLD, "data", 1, 0, 0, 0, 0, 0, 0.0), "3.000000 hold     queue=1"),
    ],
)
def test_events_as_text(event: TraceEvent, text: str) -> None:
    assert str(event) == text


# With a real worker.


@pytest.fixture(params=["aio", "io_uring", "memory"])
def make_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RigFactory]:
    with rig_factory(tmp_path, DISK, engine=request.param) as factory:
        yield factory


def kinds(reader: TraceReader) -> list[int]:
    return [event.event for event in reader.events()]


def start_tracing(line: Line, fetches: bool = True) -> TraceReader:
    return line.worker.start_tracing(fetches).result(PATIENCE)


def stop_tracing(line: Line, reader: TraceReader) -> None:
    line.worker.stop_tracing(reader).result(PATIENCE)


@pytest.mark.parametrize("ring_class", [Ring, PackedRing])
def test_tracing_ends_with_its_last_reader(make_rig: RigFactory, ring_class: type[Any]) -> None:
    line = make_rig().line().start(ring_class=ring_class)
    one, other = start_tracing(line), start_tracing(line)
    line.do(IN, 1, room=512)
    stop_tracing(line, one)
    line.do(IN, 2, room=512)
    line.turn_is_over()
    stop_tracing(line, other)
    assert line.worker.state.record["trace"] == 0
    line.do(IN, 3, room=512)
    assert sectors(other) == [1, 1, 2, 2]
    third = start_tracing(line)
    line.do(IN, 4, room=512)
    line.turn_is_over()
    assert sectors(third) == [4, 4]
    assert kinds(other) == []


def test_requests_in_flight_are_fetched_at_the_start(make_rig: RigFactory) -> None:
    """Their events have the times at which they were fetched, and come before all others."""
    rig = make_rig(layers=[DelayPart(read=60_000 * MS)])
    line = rig.line().start()
    for sector in (7, 8):
        line.put(IN, sector, room=512)
        line.kick()
        assert eventually(lambda sector=sector: line.queue.in_flight == sector - 6)  # type: ignore[misc]
    reader = start_tracing(line)
    line.put(FLUSH)
    line.kick()
    events: list[TraceEvent] = []
    assert eventually(lambda: events.extend(reader.events()) or events[-1].event == COMPLETE)  # type: ignore[func-returns-value]
    assert [(event.event, event.sector) for event in events if event.type == IN] == [(FETCH, 7), (FETCH, 8)]
    assert [event.time_ns for event in events] == sorted(event.time_ns for event in events)
    requests = line.worker.state.slots.requests
    assert {int(each) for each in requests["started"][requests["queue"] != 0]} == {
        event.time_ns for event in events if event.type == IN
    }
    release(line)
    line.wait()


def test_requests_in_flight_at_the_end_of_a_recording(make_rig: RigFactory) -> None:
    """A recording has no events of fetches: one event per request, also of those that began before."""
    rig = make_rig(layers=[DelayPart(read=60_000 * MS)])
    line = rig.line().start()
    line.put(IN, 7, room=512)
    line.kick()
    assert eventually(lambda: line.queue.in_flight == 1)
    reader, other = start_tracing(line, fetches=False), start_tracing(line, fetches=False)
    line.put(FLUSH)
    line.kick()
    assert eventually(lambda: line.queue.counters[KIND_FLUSH]["requests"] == 1)
    line.turn_is_over()
    stop_tracing(line, reader)
    found = {event.event: event for event in reader.events()}
    assert found.keys() == {LEAVE, RETURN, COMPLETE, IN_FLIGHT}
    assert found[IN_FLIGHT].sector == 7
    release(line)
    line.wait()
    line.turn_is_over()
    read = next(event for event in other.events() if event.event == COMPLETE and event.type == IN)
    assert read.time_ns - round(1000 * read.microseconds) == found[IN_FLIGHT].time_ns
    stop_tracing(line, other)
    assert kinds(other) == []


def test_fetches_are_traced_while_somebody_wants_them(make_rig: RigFactory) -> None:
    line = make_rig().line().start()
    recording = start_tracing(line, fetches=False)
    line.do(IN, 1, room=512)
    wanted = start_tracing(line)
    line.do(IN, 2, room=512)
    stop_tracing(line, wanted)
    line.do(IN, 3, room=512)
    line.turn_is_over()
    assert [(each.event, each.sector) for each in recording.events()] == [(COMPLETE, 1), (FETCH, 2), (COMPLETE, 2),
        (COMPLETE, 3)]  # fmt: skip


def test_layers_and_storage_are_told_apart(make_rig: RigFactory) -> None:
    rig = make_rig(layers=[DelayPart(read=2 * MS)])
    line = rig.line().start()
    reader = start_tracing(line)
    line.do(IN, 1, room=512)
    line.turn_is_over()
    fetch, leave, back, complete = events = list(reader.events())
    assert [event.event for event in events] == [FETCH, LEAVE, RETURN, COMPLETE]
    assert leave.time_ns - fetch.time_ns >= 2 * MS
    assert fetch.time_ns <= leave.time_ns <= back.time_ns <= complete.time_ns
    assert {event.sector for event in events} == {1}


def test_tracing_begins_and_ends_while_requests_are_in_layers(make_rig: RigFactory) -> None:
    rig = make_rig(layers=[DelayPart(read=2 * MS)])
    line = rig.line().start()
    for _ in range(20):
        pending = [line.put(IN, sector, room=512) for sector in range(16)]
        line.kick()
        reader = start_tracing(line)
        stop_tracing(line, reader)
        line.wait()
        assert [line.answer(each).data for each in pending] == [DISK[512 * n :][:512] for n in range(16)]


def test_a_queue_that_was_stopped_while_traced_is_served_afterwards(make_rig: RigFactory) -> None:
    rig = make_rig(layers=[DelayPart(read=1)])
    line = rig.line().start()
    reader = start_tracing(line)
    assert line.do(IN, 1, room=512).status == OK
    line.stop()
    stop_tracing(line, reader)
    assert kinds(reader)[-1] == STOP
    line.start()
    assert line.do(IN, 2, room=512).data == DISK[1024:1536]


def test_a_queue_that_starts_while_traced_has_its_name(make_rig: RigFactory) -> None:
    rig = make_rig()
    first = rig.line().start()
    reader = start_tracing(first)
    second = rig.line(layers=[DelayPart(flush=1)]).start()
    second.do(IN, 1, room=512)
    second.turn_is_over()
    assert [(event.queue, event.event) for event in reader.events()] == [(1, START), (1, FETCH), (1, LEAVE),
        (1, RETURN), (1, COMPLETE)]  # fmt: skip
    assert reader.queues == [TracedQueue("disk", 0, False), TracedQueue("disk", 1, True)]


def test_a_queue_that_is_held_by_limits(make_rig: RigFactory) -> None:
    """It looks again after a second, and is held again: its chain has been seen then."""
    line = make_rig().line().start()
    reader = start_tracing(line)
    member = Member()
    hold(line, member, total_iops_sec=1)
    line.put(IN, 1, room=512)
    line.kick()
    events: list[TraceEvent] = []
    assert eventually(lambda: events.extend(reader.events()) or [each.event for each in events[-2:]] == [RELEASE, HOLD])
    limit(line, member, None)
    line.wait()
    line.turn_is_over()
    assert [each.event for each in events if each.event != COMPLETE][:4] == [FETCH, HOLD, RELEASE, HOLD]
    *_, release, fetch, complete = reader.events()
    assert (release.event, fetch.event, complete.event) == (RELEASE, FETCH, COMPLETE)
    # The wait is in units of 64 ns.
    assert fetch.time_ns - round(1000 * fetch.waited_us) <= events[-1].time_ns + (1 << WAIT_SHIFT)


def test_a_queue_that_stops_while_limits_hold_it(make_rig: RigFactory) -> None:
    line = make_rig().line().start()
    reader = start_tracing(line)
    hold(line, Member(), total_iops_sec=1)
    line.put(IN, 1, room=512)
    line.kick()
    assert eventually(lambda: held_by_limits(line))
    line.stop()
    events = [each.event for each in reader.events()]
    assert events[-2:] == [RELEASE, STOP]
    assert events.count(HOLD) == events.count(RELEASE)
