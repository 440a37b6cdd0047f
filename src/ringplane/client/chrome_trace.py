"""A trace in Chrome's "trace event format" (JSON), which Perfetto opens: https://ui.perfetto.dev.

Perfetto groups tracks by process. Here each queue is a group: it has a track for each type of request, on which each
request is an asynchronous slice ("b" and "e") with its stages below it, and the counter of requests in flight. Tracks
have the names of their slices: there are no other names in this format. Each I/O thread is a group too, with the
counter of events that were lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any, NamedTuple, TextIO

import numpy as np

from ringplane.client.trace_receiver import Block, Recorded
from ringplane.dataplane.trace_layout import (
    COMPLETE,
    FETCH,
    HOLD,
    IN_FLIGHT,
    LEAVE,
    RELEASE,
    RETURN,
    Events,
    values,
)

IN_RING, IN_LAYERS, IN_ENGINE, HELD = "in ring", "in layers", "in engine", "held by limits"

# The result of a request that has none at the end.
NO_RESULT = '"in flight"'

FIELDS = ("time", "event", "queue", "type", "sector", "length", "head", "status", "lasted", "waited")

# Lines that are written at a time.
LINES = 10_000


@dataclass(eq=False, slots=True)
class Group:
    """A group of tracks: a queue, or an I/O thread."""

    pid: int
    layers: bool = False
    # Of each request: when it was fetched, and when it ended.
    fetched: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    held_since: int = 0


@dataclass(eq=False, slots=True)
class Thread:
    """What is known of an I/O thread so far."""

    group: Group
    queues: dict[int, Group] = field(default_factory=dict)
    # By queue and head: the stages of a request that has not ended, and when each began.
    stages: dict[tuple[int, int], list[tuple[int, str]]] = field(default_factory=dict)
    # The time of its last event, or of the beginning.
    last: int = 0
    lost: int = 0
    # The time of the last loss, or of the beginning: some stages of requests that were fetched before may be missing.
    lost_at: int = 0


class Request(NamedTuple):
    """What a request's event says. `seen`: when its chain was seen in the ring."""

    queue: int
    seen: int
    fetched: int
    type: int
    sector: int
    length: int
    head: int


@dataclass(slots=True)
class Summary:
    """What was written."""

    requests: int = 0
    in_flight: int = 0
    lost: int = 0
    queues: int = 0


def write_chrome_trace(recorded: Recorded, file: TextIO, check: Callable[[], None]) -> Summary:
    """Write all of it; `check` is called now and then, and may raise."""
    conversion = Conversion(recorded)
    file.write('{"traceEvents": [')
    separator = "\n"
    for lines in conversion.lines():
        check()
        if lines:
            file.write(separator + ",\n".join(lines))
            separator = ",\n"
    file.write('\n],\n"displayTimeUnit": "ns",\n"otherData": ')
    json.dump(conversion.other_data(), file)
    file.write("}\n")
    return conversion.summary


class Conversion:
    """From the events of I/O threads to those of Chrome's format, each a line of JSON."""

    def __init__(self, recorded: Recorded) -> None:
        self._recorded = recorded
        description = recorded.description
        self._types = {number: json.dumps(name) for number, name in description.types.items()}
        self._statuses = {number: json.dumps(name) for number, name in description.statuses.items()}
        self._threads: dict[str, Thread] = {}
        self._ids, self._pids = count(1), count(1)
        self._last = description.began
        self._lines: list[str] = []
        self.summary = Summary()

    def lines(self) -> Iterator[list[str]]:
        """Some at a time."""
        for block in self._recorded.blocks:
            self._add(block)
            yield self._take()
        for thread in self._threads.values():
            for group in thread.queues.values():
                self._end_hold(group, self._end)
                yield from self._depths(group)

    def other_data(self) -> dict[str, Any]:
        """About the trace as a whole."""
        return {
            "made by": "ringplane trace",
            "clock": "CLOCK_MONOTONIC",
            "complete": not self._recorded.cut_off,
            "requests": self.summary.requests,
            "requests in flight at the end": self.summary.in_flight,
            "trace events lost": self.summary.lost,
        }

    def _take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines

    def _add(self, block: Block) -> None:
        thread = self._threads.get(block.thread) or self._new_thread(block.thread)
        for queue in block.queues:
            name = f"{queue.disk} queue {queue.queue}"
            thread.queues[queue.number] = self._new_group(name, queue.layers)
            self.summary.queues += 1
        if block.lost:
            self._lose(thread, block)
        self._add_events(thread, block.events)
        if len(block.events):
            thread.last = max(thread.last, int(block.events["time"][-1]))
            self._last = max(self._last, thread.last)

    def _add_events(self, thread: Thread, events: Events) -> None:
        columns = values(events)
        entries = zip(*(columns[name].tolist() for name in FIELDS), strict=True)
        for time, event, queue, kind, sector, length, head, status, lasted, waited in entries:
            group = thread.queues[queue]
            if event in (COMPLETE, IN_FLIGHT):
                fetched = time - lasted
                request = Request(queue, fetched - waited, fetched, kind, sector, length, head)
                if event == COMPLETE:
                    self._add_completed(thread, group, request, time, status)
                else:
                    self._add_in_flight(thread, group, request)
            elif event in (LEAVE, RETURN):
                thread.stages.setdefault((queue, head), []).append((time, IN_ENGINE if event == LEAVE else IN_LAYERS))
            elif event != FETCH:
                # A fetch is there because somebody else wants it.
                self._add_event_of_queue(group, time, event)

    def _add_completed(self, thread: Thread, group: Group, request: Request, time: int, status: int) -> None:
        self._add_request(thread, group, request, time, self._statuses.get(status, f'"{status}"'))
        group.ended.append(time)
        self.summary.requests += 1

    def _add_in_flight(self, thread: Thread, group: Group, request: Request) -> None:
        self._add_request(thread, group, request, self._end, NO_RESULT)
        self.summary.in_flight += 1

    @property
    def _end(self) -> int:
        """The time of the end."""
        return max(self._recorded.ended, self._last)

    def _add_request(self, thread: Thread, group: Group, request: Request, end: int, result: str) -> None:
        """Add a request with its stages."""
        stages = self._stages(thread, group, request, end)
        group.fetched.append(request.fetched)
        slice_ = self._slice(group)
        what = f'{{"sector":{request.sector},"length":{request.length},"head":{request.head},"result":{result}}}'
        name = self._types.get(request.type, f'"type-{request.type}"')
        add = self._lines.append
        add(f'{{"ph":"b",{slice_},"ts":{_us(request.seen)},"name":{name},"args":{what}}}')
        for (begin, stage), (until, _) in pairwise(stages):
            if until > begin:
                self._add_stage(slice_, stage, begin, until)
        add(f'{{"ph":"e",{slice_},"ts":{_us(end)},"name":{name}}}')

    def _stages(self, thread: Thread, group: Group, request: Request, end: int) -> list[tuple[int, str]]:
        """The stages of a request and when each began, and its end."""
        before = [(request.seen, IN_RING)] if request.seen < request.fetched else []
        if not group.layers:
            return [*before, (request.fetched, IN_ENGINE), (end, "")]
        # Those of another request with this chain, whose completion was lost, were earlier.
        known = [stage for stage in thread.stages.pop((request.queue, request.head), ()) if stage[0] >= request.fetched]
        if request.fetched < thread.lost_at:
            return [*before, (request.fetched, "")]
        return [*before, (request.fetched, IN_LAYERS), *known, (end, "")]

    def _add_stage(self, slice_: str, name: str, begin: int, end: int) -> None:
        self._lines.append(f'{{"ph":"b",{slice_},"ts":{_us(begin)},"name":"{name}"}}')
        self._lines.append(f'{{"ph":"e",{slice_},"ts":{_us(end)},"name":"{name}"}}')

    def _slice(self, group: Group) -> str:
        """What the events of one asynchronous slice have in common."""
        return f'"cat":"request","id2":{{"local":"{next(self._ids):x}"}},{_of(group)}'

    def _depths(self, group: Group) -> Iterator[list[str]]:
        """How many requests were in flight, at each time at which it changed."""
        times = np.array(group.fetched + group.ended, np.int64)
        changes = np.repeat([1, -1], [len(group.fetched), len(group.ended)])
        order = np.argsort(times, kind="stable")
        times, depths = times[order], changes[order].cumsum()
        # Of several changes at the same time the last one.
        last = np.append(times[1:] != times[:-1], True)[: len(times)]
        for number, (time, depth) in enumerate(zip(times[last].tolist(), depths[last].tolist(), strict=True), 1):
            self._add_counter(group, time, "requests", "in flight", depth)
            if not number % LINES:
                yield self._take()
        yield self._take()

    def _add_counter(self, group: Group, time: int, name: str, series: str, value: int) -> None:
        values = f'{{"{series}":{value}}}'
        self._lines.append(f'{{"ph":"C",{_of(group)},"ts":{_us(time)},"name":"{name}","args":{values}}}')

    def _add_event_of_queue(self, group: Group, time: int, event: int) -> None:
        # Whatever happens to the queue, its hold has ended.
        self._end_hold(group, time)
        if event == HOLD:
            group.held_since = time
        elif event != RELEASE:
            name = f"ring: {self._recorded.description.events.get(event, event)}"
            self._lines.append(f'{{"ph":"i","s":"p",{_of(group)},"ts":{_us(time)},"name":{json.dumps(name)}}}')

    def _end_hold(self, group: Group, time: int) -> None:
        if group.held_since:
            self._add_stage(self._slice(group), HELD, group.held_since, max(time, group.held_since))
        group.held_since = 0

    def _lose(self, thread: Thread, block: Block) -> None:
        """Events were lost before this block."""
        for group in thread.queues.values():
            # What ended it may be among them.
            self._end_hold(group, thread.last)
        thread.lost_at = max(thread.last, *block.events["time"][:1].tolist())
        thread.lost += block.lost
        self.summary.lost += block.lost
        name = f"{block.lost} trace events lost"
        self._lines.append(f'{{"ph":"i","s":"g",{_of(thread.group)},"ts":{_us(thread.lost_at)},"name":"{name}"}}')
        self._add_counter(thread.group, thread.lost_at, "trace events", "lost", thread.lost)

    def _new_thread(self, name: str) -> Thread:
        group = self._new_group(f"I/O thread {name}")
        began = self._recorded.description.began
        thread = self._threads[name] = Thread(group, last=began, lost_at=began)
        self._add_counter(group, began, "trace events", "lost", 0)
        return thread

    def _new_group(self, name: str, layers: bool = False) -> Group:
        group = Group(next(self._pids), layers)
        # Perfetto shows the number of the process behind its name: "data queue 0 2" would be misread.
        args = json.dumps({"name": f"{name}, group"})
        self._lines.append(f'{{"ph":"M",{_of(group)},"name":"process_name","args":{args}}}')
        return group


def _of(group: Group) -> str:
    return f'"pid":{group.pid},"tid":{group.pid}'


def _us(nanoseconds: int) -> str:
    """In microseconds, the unit of the format."""
    return f"{nanoseconds // 1000}.{nanoseconds % 1000:03}"
