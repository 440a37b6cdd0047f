"""A recording of what happens to requests, for a client: the trace events of all I/O threads, for some time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from ringplane.control.operation_errors import Unavailable, WrongState
from ringplane.control.threads import Threads
from ringplane.dataplane.trace_events import Events, TracedQueue, TraceReader
from ringplane.dataplane.worker import Worker

# Events that are sent at a time: 0.8 MB.
PORTION = 1 << 14
WORTHWHILE = PORTION // 4

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


class Recorder:
    """Of a process; used on one thread."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._recording: Recording | None = None

    async def start(self, disks: Collection[str]) -> Recording:
        """Record the requests of these disks; of all if there is none. Raises WrongState, Unavailable."""
        if self._recording is not None:
            raise WrongState("a trace is being recorded already", "", "wait for its end, or end its client")
        self._recording = recording = Recording(self._threads.workers, disks, self._forget)
        try:
            await recording.start()
        except BaseException:
            await recording.stop()
            raise
        return recording

    def end(self) -> None:
        """Have the recording end; what it has is still sent to its client. Raises WrongState."""
        if self._recording is None:
            raise WrongState("no trace is being recorded", "", "POST /v1/trace begins one")
        self._recording.ending.set()

    def _forget(self) -> None:
        self._recording = None


class Recording:
    """From `start` to `stop`."""

    def __init__(self, workers: Mapping[str, Worker], disks: Collection[str], ended: Callable[[], None]) -> None:
        """`ended` is called once, when another one can begin."""
        self._workers, self._disks, self._ended = workers, disks, ended
        self._stopped = False
        # Set when somebody wants it to end; any thread may wait for it.
        self.ending = threading.Event()
        self._tracks: list[Track] = []

    async def start(self) -> None:
        """Record from now on. Raises Unavailable; it has to be stopped then too."""
        workers = self._workers
        started = {name: worker.start_tracing(fetches=False) for name, worker in workers.items()}
        await _all(started.values())
        for name, future in started.items():
            # A thread that has failed has no events, and the log says why it has failed.
            if not future.cancelled() and not future.exception():
                self._tracks.append(Track(name, workers[name], future.result(), self._disks))
        if hanging := [name for name, future in started.items() if future.cancelled()]:
            raise Unavailable(f"{hanging[0]}: this I/O thread does not answer", "", "wait until its disks do")

    async def stop(self) -> None:
        """Record no more; what has been recorded can still be read. May be called again."""
        if not self._stopped:
            self._stopped = True
            self._ended()
            await _all([each.worker.stop_tracing(each.reader) for each in self._tracks])

    @property
    def unread(self) -> int:
        """How many events have come since the last `read`, of the I/O thread that had most."""
        return max((each.reader.unread for each in self._tracks), default=0)

    def read(self) -> Iterator[Portion]:
        """What has been recorded since the last call, but for few events that would not be worth it."""
        for each in self._tracks:
            while portion := each.read():
                yield portion
                if each.reader.unread < WORTHWHILE and not self._stopped:
                    break


class Track:
    """What is recorded of one I/O thread."""

    def __init__(self, name: str, worker: Worker, reader: TraceReader, disks: Collection[str]) -> None:
        """`disks`: the names of those that are of interest; empty: all."""
        self.name, self.worker, self.reader = name, worker, reader
        self._disks = disks
        self._known = self._lost = 0
        self._wanted: list[int] = []

    def read(self) -> Portion | None:
        """What is new, if anything is."""
        overwritten = self.reader.overwritten()
        events = self.reader.read(PORTION)
        if not len(events) and self.reader.lost == self._lost:
            return None
        # After the events, whose queues are known now.
        queues = self._new_queues()
        if self._disks:
            self._wanted += queues
            events = self._selected(events)
        lost, self._lost = self.reader.lost - self._lost, self.reader.lost
        return Portion(self.name, queues, events, lost, overwritten)

    def _selected(self, events: Events) -> Events:
        """A copy of those of interest."""
        copied = events.copy()[self.reader.overwritten() :]
        return copied[np.isin(copied["queue"], self._wanted)]

    def _new_queues(self) -> dict[int, TracedQueue]:
        first, self._known = self._known, len(self.reader.queues)
        new = enumerate(self.reader.queues[first : self._known], first)
        return {number: queue for number, queue in new if not self._disks or queue.disk in self._disks}


async def _all(futures: Iterable[Future[Any]]) -> None:
    """Wait for all, but not for I/O threads that hang: they will not do it."""
    if waiting := [asyncio.wrap_future(each) for each in futures]:
        done, late = await asyncio.wait(waiting, timeout=PATIENCE)
        for each in late:
            each.cancel()
        # Otherwise their exceptions would be logged; the callers ask for those that matter.
        for each in done:
            each.cancelled() or each.exception()
