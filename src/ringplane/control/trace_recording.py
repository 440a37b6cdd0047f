"""A recording of what happens to requests, for a client: the trace events of all I/O threads, for some time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from ringplane.control.operation_errors import Unavailable, WrongState
from ringplane.control.threads import Threads
from ringplane.dataplane.trace_events import TracedQueue, TraceReader
from ringplane.dataplane.trace_layout import Events
from ringplane.dataplane.worker import Worker, WorkerEnded

# Events that are sent at a time: half a megabyte. In smaller portions, or with a larger SO_SNDBUF, sending took a fifth
# to a third more CPU time per event; with larger ones the client needed that.
PORTION = 1 << 14

# Seconds that an I/O thread may take to begin or end it.
PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Portion:
    """Some events of an I/O thread, in their order, which are lent until the next portion (TraceReader).

    `queues`: those that had no events before, by number. `overwritten`: so many events of the thread's last portion,
    the first ones, were overwritten before they were sent; they are among those that were `lost` before this one.
    """

    thread: str
    queues: dict[int, TracedQueue]
    events: Events
    lost: int
    overwritten: int


class TraceRecorder:
    """Of a process; used on one thread."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._recording: TraceRecording | None = None

    async def start(self, disks: Mapping[str, Iterable[Worker]]) -> TraceRecording:
        """Record the requests of these disks, which these I/O threads serve; of all disks if none is named.

        Raises WrongState, Unavailable.
        """
        if self._recording is not None:
            raise WrongState("a trace is being recorded already", "", "wait for its end, or end its client")
        self._recording = recording = TraceRecording(self._workers_of(disks), disks, self._forget)
        try:
            await recording.start()
        except BaseException:
            await recording.stop()
            raise
        return recording

    def end(self, began: int | None = None) -> None:
        """Have the recording end, or only the one that began then; its client still gets what it has.

        Raises WrongState.
        """
        if self._recording is None:
            raise WrongState("no trace is being recorded", "", "POST /v1/trace begins one")
        if began not in (None, self._recording.began):
            raise WrongState("another trace is being recorded", "began", "leave it out to end whatever is recorded")
        self._recording.ending.set()

    def _workers_of(self, disks: Mapping[str, Iterable[Worker]]) -> Mapping[str, Worker]:
        """No others: what hangs on them does not concern these disks."""
        if not disks:
            return self._threads.workers
        return {worker.name: worker for workers in disks.values() for worker in workers}

    def _forget(self) -> None:
        self._recording = None


class TraceRecording:
    """From `start` to `stop`."""

    def __init__(self, workers: Mapping[str, Worker], disks: Collection[str], ended: Callable[[], None]) -> None:
        """`ended` is called once, when another one can begin."""
        self._workers, self._disks, self._ended = workers, disks, ended
        self._stopped = False
        # Nanoseconds, CLOCK_MONOTONIC. Clients know the recording by it: no other one has the same.
        self.began = time.monotonic_ns()
        # Set when somebody wants it to end; any thread may wait for it.
        self.ending = threading.Event()
        self._starts: dict[str, Future[TraceReader]] = {}
        self._tracks: list[Track] = []

    async def start(self) -> None:
        """Record from now on. Raises Unavailable; it has to be stopped then too."""
        self._begin()
        await _settled(self._starts.values())
        for name, started in self._starts.items():
            if not started.done():
                raise Unavailable(f"{name}: this I/O thread does not answer", "", "wait until its disks do")
            try:
                self._tracks.append(Track(name, started.result(), self._disks))
            except WorkerEnded:
                # It has no events, and the log says why it has failed.
                pass
            except MemoryError:
                raise _no_memory(name) from None

    def _begin(self) -> None:
        """Raises Unavailable; those that have begun are known nevertheless, so that `stop` ends them."""
        for name, worker in self._workers.items():
            try:
                self._starts[name] = worker.start_tracing(fetches=False)
            except MemoryError:
                raise _no_memory(name) from None

    async def stop(self) -> None:
        """Record no more; what has been recorded can still be read. May be called again."""
        if not self._stopped:
            self._stopped = True
            self._ended()
            await _settled(list(self._stops()))

    def _stops(self) -> Iterator[Future[None]]:
        """Have each I/O thread stop; those that hang do it when they no longer do."""
        for name, started in self._starts.items():
            # If it cannot be cancelled, it has been made, or is made at this moment.
            if not started.cancel() and not started.exception():
                yield self._workers[name].stop_tracing(started.result())

    def look(self) -> int:
        """Have `read` return what has been recorded until now; returns how many events, of the thread with most."""
        return max((each.look() for each in self._tracks), default=0)

    def read(self) -> Iterator[Portion]:
        """What was recorded until the last `look`, and has not been read."""
        for each in self._tracks:
            yield from each.read()


class Track:
    """What is recorded of one I/O thread."""

    def __init__(self, name: str, reader: TraceReader, disks: Collection[str]) -> None:
        """`disks`: the names of those that are of interest; empty: all."""
        self.name, self._reader = name, reader
        self._disks = disks
        self._known = self._lost = self._overwritten = 0
        self._wanted: list[int] = []

    def look(self) -> int:
        """See TraceReader."""
        return self._reader.look()

    def read(self) -> Iterator[Portion]:
        """See TraceRecording. A portion is used when the next one is asked for, or none any more."""
        while portion := self._next():
            try:
                yield portion
            finally:
                self._overwritten = self._reader.overwritten()

    def _next(self) -> Portion | None:
        events = self._reader.read(PORTION)
        if not len(events) and self._reader.lost == self._lost:
            return None
        # After the events, whose queues are known now.
        queues = self._new_queues()
        if self._disks:
            self._wanted += queues
            events = self._selected(events)
        lost, self._lost = self._reader.lost - self._lost, self._reader.lost
        overwritten, self._overwritten = self._overwritten, 0
        return Portion(self.name, queues, events, lost, overwritten)

    def _selected(self, events: Events) -> Events:
        """A copy of those of interest."""
        copied = events.copy()[self._reader.overwritten() :]
        return copied[np.isin(copied["queue"], self._wanted)]

    def _new_queues(self) -> dict[int, TracedQueue]:
        first, self._known = self._known, len(self._reader.queues)
        new = enumerate(self._reader.queues[first : self._known], first)
        return {number: queue for number, queue in new if not self._disks or queue.disk in self._disks}


def _no_memory(thread: str) -> Unavailable:
    what = f"{thread}: the process has no memory for the trace events of this I/O thread"
    return Unavailable(what, "", "trace disks of fewer I/O threads, or give it more memory")


async def _settled(futures: Iterable[Future[Any]]) -> None:
    """Return when all are done, or soon: I/O threads that hang do not do it now."""
    if waiting := [asyncio.wrap_future(each) for each in futures]:
        for each in waiting:
            # Otherwise it would be logged that nobody asks for their exceptions.
            each.add_done_callback(lambda each: each.cancelled() or each.exception())
        # It does not cancel those that are late: an I/O thread that no longer hangs has to stop tracing.
        await asyncio.wait(waiting, timeout=PATIENCE)
