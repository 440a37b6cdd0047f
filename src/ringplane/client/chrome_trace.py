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
from typing import Any, TextIO

from ringplane.client.trace_receiver import Block, Recorded

IN_RING, IN_LAYERS, IN_ENGINE, HELD = "in ring", "in layers", "in engine", "held by limits"

# Results of requests whose completion is not in the trace.
IN_FLIGHT, UNKNOWN = "in flight", "unknown, trace events were lost"

FIELDS = ("time", "event", "queue", "slot", "type", "sector", "length", "head", "status", "nanoseconds")


@dataclass(eq=False, slots=True)
class Group:
    """A group of tracks: a queue, or an I/O thread."""

    pid: int
    layers: bool = False
    # Requests in flight, and when their number changed last.
    depth: int = 0
    changed: int = 0
    held_since: int = 0


@dataclass(eq=False, slots=True)
class Fetched:
    """A request that was fetched. `stages`: when each began."""

    group: Group
    time: int
    waited: int
    type: int
    sector: int
    length: int
    head: int
    stages: list[tuple[int, str]]
    # Whether it counts in the depth of its group.
    counted: bool = True


@dataclass(eq=False, slots=True)
class Thread:
    """What is known of an I/O thread so far."""

    group: Group
    queues: dict[int, Group] = field(default_factory=dict)
    open: dict[int, Fetched] = field(default_factory=dict)
    lost: int = 0


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
        self._finish()
        yield self._take()

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
        fetch, leave, back, complete = self._recorded.numbers("fetch", "leave", "return", "complete")
        events = zip(*(block.events[name].tolist() for name in FIELDS), strict=True)
        for time, event, queue, slot, kind, sector, length, head, status, nanoseconds in events:
            group = thread.queues[queue]
            if event == fetch:
                request = Fetched(group, time, nanoseconds, kind, sector, length, head, [(time, _first_stage(group))])
                self._begin(thread, slot, request)
            elif event == complete:
                begun = [(time - nanoseconds, _first_stage(group))]
                request = Fetched(group, time - nanoseconds, 0, kind, sector, length, head, begun, counted=False)
                self._end(self._find(thread, slot, request), time, self._statuses.get(status, f'"{status}"'))
                self.summary.requests += 1
            elif event in (leave, back):
                if slot in thread.open:
                    thread.open[slot].stages.append((time, IN_ENGINE if event == leave else IN_LAYERS))
            else:
                self._add_event_of_queue(group, time, event)
        if len(block.events):
            self._last = max(self._last, int(block.events["time"][-1]))

    def _begin(self, thread: Thread, slot: int, request: Fetched) -> None:
        if slot in thread.open:
            # Its completion was lost.
            self._end(thread.open[slot], request.time, json.dumps(UNKNOWN))
        thread.open[slot] = request
        self._change_depth(request.group, request.time, 1)

    def _find(self, thread: Thread, slot: int, completed: Fetched) -> Fetched:
        """The request that is completed now, as it is known from its completion alone or from its fetch too."""
        request = thread.open.pop(slot, completed)
        if request.time == completed.time:
            return request
        # Its fetch was lost, and so was the completion of the one before.
        self._end(request, completed.time, json.dumps(UNKNOWN))
        return completed

    def _end(self, request: Fetched, time: int, result: str) -> None:
        """Write a request with its stages."""
        if request.counted:
            self._change_depth(request.group, time, -1)
        time = max(time, request.stages[-1][0])
        seen = request.time - request.waited
        slice_ = self._slice(request.group)
        what = f'{{"sector":{request.sector},"length":{request.length},"head":{request.head},"result":{result}}}'
        name = self._types.get(request.type, f'"type-{request.type}"')
        add = self._lines.append
        add(f'{{"ph":"b",{slice_},"ts":{_us(seen)},"name":{name},"args":{what}}}')
        if request.waited:
            self._add_stage(slice_, IN_RING, seen, request.time)
        for (begin, stage), (end, _) in pairwise([*request.stages, (time, "")]):
            if end > begin:
                self._add_stage(slice_, stage, begin, end)
        add(f'{{"ph":"e",{slice_},"ts":{_us(time)},"name":{name}}}')

    def _add_stage(self, slice_: str, name: str, begin: int, end: int) -> None:
        self._lines.append(f'{{"ph":"b",{slice_},"ts":{_us(begin)},"name":"{name}"}}')
        self._lines.append(f'{{"ph":"e",{slice_},"ts":{_us(end)},"name":"{name}"}}')

    def _slice(self, group: Group) -> str:
        """What the events of one asynchronous slice have in common."""
        return f'"cat":"request","id2":{{"local":"{next(self._ids):x}"}},{_of(group)}'

    def _change_depth(self, group: Group, time: int, by: int) -> None:
        """Only the last of several changes at the same time is written."""
        if group.changed not in (0, time):
            self._add_depth(group)
        group.depth += by
        group.changed = time

    def _add_depth(self, group: Group) -> None:
        self._add_counter(group, group.changed, "requests", "in flight", group.depth)

    def _add_counter(self, group: Group, time: int, name: str, series: str, value: int) -> None:
        values = f'{{"{series}":{value}}}'
        self._lines.append(f'{{"ph":"C",{_of(group)},"ts":{_us(time)},"name":"{name}","args":{values}}}')

    def _add_event_of_queue(self, group: Group, time: int, event: int) -> None:
        hold, release = self._recorded.numbers("hold", "release")
        if event == hold:
            group.held_since = time
        elif event == release:
            if group.held_since:
                self._add_stage(self._slice(group), HELD, group.held_since, time)
            group.held_since = 0
        else:
            name = f"ring: {self._recorded.description.events.get(event, event)}"
            self._lines.append(f'{{"ph":"i","s":"p",{_of(group)},"ts":{_us(time)},"name":{json.dumps(name)}}}')

    def _lose(self, thread: Thread, block: Block) -> None:
        """Events were lost before this block: what is in flight is not certain any more."""
        time = int(block.events["time"][0]) if len(block.events) else self._last
        thread.lost += block.lost
        self.summary.lost += block.lost
        name = f"{block.lost} trace events lost"
        self._lines.append(f'{{"ph":"i","s":"g",{_of(thread.group)},"ts":{_us(time)},"name":"{name}"}}')
        self._add_counter(thread.group, time, "trace events", "lost", thread.lost)
        for group in thread.queues.values():
            self._change_depth(group, time, -group.depth)
        for request in thread.open.values():
            request.counted = False

    def _finish(self) -> None:
        """Write what has no end yet."""
        end = max(self._recorded.ended, self._last)
        for thread in self._threads.values():
            for request in thread.open.values():
                self.summary.in_flight += request.counted
                result, request.counted = IN_FLIGHT if request.counted else UNKNOWN, False
                self._end(request, end, json.dumps(result))
            for group in thread.queues.values():
                if group.changed:
                    self._add_depth(group)
                if group.held_since:
                    self._add_stage(self._slice(group), HELD, group.held_since, end)

    def _new_thread(self, name: str) -> Thread:
        group = self._new_group(f"I/O thread {name}")
        thread = self._threads[name] = Thread(group)
        self._add_counter(group, self._last, "trace events", "lost", 0)
        return thread

    def _new_group(self, name: str, layers: bool = False) -> Group:
        group = Group(next(self._pids), layers)
        args = json.dumps({"name": name})
        self._lines.append(f'{{"ph":"M",{_of(group)},"name":"process_name","args":{args}}}')
        return group


def _first_stage(group: Group) -> str:
    return IN_LAYERS if group.layers else IN_ENGINE


def _of(group: Group) -> str:
    return f'"pid":{group.pid},"tid":{group.pid}'


def _us(nanoseconds: int) -> str:
    """In microseconds, the unit of the format."""
    return f"{nanoseconds // 1000}.{nanoseconds % 1000:03}"
