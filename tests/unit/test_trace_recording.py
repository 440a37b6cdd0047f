"""A recording for a client: I/O threads that hang, clients that are slower than the events, what is lost meanwhile."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ringplane.control import trace_recording
from ringplane.control.operation_errors import Unavailable
from ringplane.control.threads import Threads
from ringplane.control.trace_recording import PORTION, TraceRecorder, TraceRecording, Track
from ringplane.dataplane import worker as worker_module
from ringplane.dataplane.trace_events import room_for_events
from ringplane.dataplane.trace_layout import Events
from ringplane.dataplane.tracer import CAPACITY
from ringplane.dataplane.worker import Worker

from .rig import IN, PATIENCE, RigFactory, held, rig_factory
from .test_trace import DISK, Traced


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[RigFactory]:
    with rig_factory(tmp_path, DISK) as factory:
        yield factory


def recorder(*workers: Worker) -> TraceRecorder:
    return TraceRecorder(cast(Threads, SimpleNamespace(workers={each.name: each for each in workers})))


def traces(worker: Worker) -> bool:
    """Once all calls have been made."""
    worker.call(lambda: None).result(PATIENCE)
    return bool(worker.state.record["trace"])


def test_a_thread_that_hangs_when_a_recording_begins(make_rig: RigFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported, and nothing is traced when the thread no longer hangs."""
    workers = make_rig(workers=2).workers
    recording_ = recorder(*workers)
    monkeypatch.setattr(trace_recording, "PATIENCE", 0.05)
    with held(workers[1]), pytest.raises(Unavailable, match="does not answer"):
        asyncio.run(recording_.start({}))
    assert not any(map(traces, workers))
    monkeypatch.setattr(trace_recording, "PATIENCE", PATIENCE)

    async def begin_and_end() -> None:
        await (await recording_.start({})).stop()

    asyncio.run(begin_and_end())


def test_a_thread_that_hangs_keeps_no_memory(make_rig: RigFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a client tries to trace it."""
    (worker,) = make_rig().workers
    made: list[weakref.ref[Events]] = []

    def room() -> Events:
        events = room_for_events()
        made.append(weakref.ref(events))
        return events

    monkeypatch.setattr(worker_module, "room_for_events", room)
    monkeypatch.setattr(trace_recording, "PATIENCE", 0.01)
    with held(worker):
        for _ in range(2):
            with pytest.raises(Unavailable):
                asyncio.run(recorder(worker).start({}))
        gc.collect()
        assert [each() is None for each in made] == [True, True]


def test_a_thread_that_hangs_does_not_concern_the_disks_of_others(
    make_rig: RigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = make_rig(workers=2).workers
    monkeypatch.setattr(trace_recording, "PATIENCE", PATIENCE)

    async def check() -> None:
        begun = await recorder(one, other).start({"a": [one, one]})
        assert traces(one)
        await begun.stop()

    with held(other):
        asyncio.run(check())
    assert not traces(other)


def test_no_memory_for_the_events(make_rig: RigFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported, and the I/O threads that have begun trace nothing."""
    workers = make_rig(workers=2).workers
    rooms = iter([room_for_events()])

    def room() -> Events:
        for each in rooms:
            return each
        raise MemoryError

    monkeypatch.setattr(worker_module, "room_for_events", room)
    with pytest.raises(Unavailable, match=f"{workers[1].name}: the process has no memory"):
        asyncio.run(recorder(*workers).start({}))
    assert not any(map(traces, workers))


def test_no_memory_on_an_io_thread(make_rig: RigFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace without the events of this thread would look as if it had none."""
    workers = make_rig(workers=2).workers

    def start_tracing(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(workers[1], "_start_tracing", start_tracing)
    with pytest.raises(Unavailable, match=f"{workers[1].name}: the process has no memory"):
        asyncio.run(recorder(*workers).start({}))
    assert not any(map(traces, workers))


@pytest.mark.parametrize("started", [False, True])
def test_a_thread_that_hangs_when_a_recording_ends(
    make_rig: RigFactory, monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    """Also if that happens before it has begun: it stops tracing when it no longer hangs."""
    (worker,) = make_rig().workers
    monkeypatch.setattr(trace_recording, "PATIENCE", PATIENCE)

    async def check() -> None:
        recorder_ = recorder(worker)
        begun = await recorder_.start({}) if started else None
        with held(worker):
            monkeypatch.setattr(trace_recording, "PATIENCE", 0.05)
            if begun:
                await begun.stop()
            else:
                beginning = asyncio.create_task(recorder_.start({}))
                await asyncio.sleep(0)
                beginning.cancel()
                await asyncio.gather(beginning, return_exceptions=True)
            # Whatever was cancelled is cancelled now.
            for _ in range(3):
                await asyncio.sleep(0)
        assert not traces(worker)

    asyncio.run(check())


def test_a_client_that_is_slower_than_the_events() -> None:
    """It gets what was there when it began to read; then it can be seen that the recording is over."""
    traced = Traced()
    track = Track("io0", traced.reader(fetches=False), ())
    traced.trace(CAPACITY // 2)
    assert track.look() == CAPACITY // 2
    sectors: list[int] = []
    for portion in track.read():
        sectors += portion.events["sector"].tolist()
        traced.trace(PORTION)
        assert len(sectors) <= CAPACITY
    assert sectors == list(range(CAPACITY // 2))


def test_no_thread_starves() -> None:
    """A busy one does not keep the client from the events of the others."""
    one, other = Traced(), Traced()
    both = TraceRecording({}, (), lambda: None)
    both._tracks = [Track(name, each.reader(fetches=False), ()) for name, each in (("io0", one), ("io1", other))]
    one.trace(PORTION)
    other.trace(1)
    assert both.look() == PORTION
    threads = []
    for portion in both.read():
        threads.append(portion.thread)
        one.trace(PORTION)
        assert len(threads) < 10
    assert threads == ["io0", "io1"]


def read(track: Track) -> list[Any]:
    track.look()
    return list(track.read())


def test_what_is_overwritten_after_it_was_sent_was_not_lost() -> None:
    traced = Traced()
    track = Track("io0", traced.reader(fetches=False), ())
    traced.trace(100)
    read(track)
    traced.trace(CAPACITY - 10)
    portions = read(track)
    assert sum(len(portion.events) for portion in portions) == CAPACITY - 10
    assert {(portion.lost, portion.overwritten) for portion in portions} == {(0, 0)}


def test_what_is_overwritten_after_the_sender_has_stopped_was_not_lost() -> None:
    """It stops between two portions when the recording ends."""
    traced = Traced()
    track = Track("io0", traced.reader(fetches=False), ())
    traced.trace(2 * PORTION)
    track.look()
    for _ in track.read():
        break
    traced.trace(CAPACITY + 50 - 2 * PORTION)
    portions = read(track)
    assert sum(len(portion.events) for portion in portions) == CAPACITY + 50 - PORTION
    assert {(portion.lost, portion.overwritten) for portion in portions} == {(0, 0)}


@pytest.mark.parametrize("abandoned", [False, True])
def test_what_is_overwritten_while_it_is_sent(abandoned: bool) -> None:
    """The next line says so, also if nothing else comes, or if the sender stopped after that portion."""
    traced = Traced()
    track = Track("io0", traced.reader(fetches=False), ())
    traced.trace(CAPACITY)
    track.look()
    portions = []
    for portion in track.read():
        portions.append(portion)
        if len(portions) == 1:
            # And the one that the thread may be writing now.
            traced.trace(9)
        if abandoned:
            break
    portions += read(track)
    assert [portion.overwritten for portion in portions[:2]] == [0, 10]
    assert sum(portion.lost for portion in portions) == 10
    assert sum(len(portion.events) for portion in portions) == CAPACITY + 9


def test_nothing_comes_after_the_end(make_rig: RigFactory) -> None:
    """Whatever another reader still traces."""
    line = make_rig().line().start()
    line.worker.start_tracing().result(PATIENCE)

    async def check() -> None:
        begun = await recorder(line.worker).start({})
        line.do(IN, 1, room=512)
        await begun.stop()
        line.do(IN, 2, room=512)
        line.turn_is_over()
        begun.look()
        (portion,) = begun.read()
        assert set(portion.events["sector"]) == {1}

    asyncio.run(check())
