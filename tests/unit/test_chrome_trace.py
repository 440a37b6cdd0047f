"""From the events of a recording to Chrome's trace event format, read by a strict reader of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ringplane.client.chrome_trace import write_chrome_trace
from ringplane.client.trace_receiver import Block, Description, NewQueue, Recorded
from ringplane.dataplane.trace_events import EVENT_NAMES, STATUS_NAMES, TYPE_NAMES
from ringplane.dataplane.tracer import COMPLETE, EVENT, FETCH, HOLD, LEAVE, RELEASE, RETURN, START

from .chrome_format import Trace

READ, WRITE, OK, IOERR = 0, 1, 0, 1
BEGAN = 1_000_000


def event(kind: int, time: int, slot: int = 0, **fields: int) -> Any:
    made = np.zeros((), EVENT)
    made["event"], made["time"], made["slot"] = kind, BEGAN + time, slot
    for name, value in fields.items():
        made[name] = value
    return made


def recorded(*blocks: tuple[int, list[Any]], layers: bool = False, ended: int = 100_000) -> Recorded:
    """Of one queue; each block has the number of events that were lost before it."""
    description = Description(
        version=1, fields=[(name, EVENT[name].str) for name in EVENT.names or ()], began=BEGAN,
        events=EVENT_NAMES, types=TYPE_NAMES, statuses=STATUS_NAMES,
    )  # fmt: skip
    made = Recorded(description)
    queues = [NewQueue(number=0, disk="data", queue=0, layers=layers)]
    for lost, events in blocks:
        made.blocks.append(Block("io0", queues, lost, np.array(events, EVENT)))
        queues = []
    made.ended = BEGAN + ended if ended else 0
    return made


def converted(tmp_path: Path, made: Recorded) -> Trace:
    path = tmp_path / "trace.json"
    with path.open("w") as file:
        write_chrome_trace(made, file, lambda: None)
    return Trace(path)


def test_a_request_and_its_stages(tmp_path: Path) -> None:
    fields = {"type": WRITE, "sector": 8, "length": 4096, "head": 5}
    fetch = event(FETCH, 3000, nanoseconds=2000, **fields)
    complete = event(COMPLETE, 10_001, nanoseconds=7001, status=IOERR, **fields)
    trace = converted(tmp_path, recorded((0, [fetch, complete])))
    (request,) = trace.groups["data queue 0"].requests
    assert (request.name, request.begin - BEGAN, request.end - BEGAN) == ("write", 1000, 10_001)
    assert request.args == {"sector": 8, "length": 4096, "head": 5, "result": "ioerr"}
    stages = [(each.name, each.begin - BEGAN, each.end - BEGAN) for each in request.stages]
    assert stages == [("in ring", 1000, 3000), ("in engine", 3000, 10_001)]
    assert trace.groups["data queue 0"].counters == {"requests in flight": [(BEGAN + 3000, 1), (BEGAN + 10_001, 0)]}
    assert trace.other["requests"] == 1
    assert trace.other["complete"] is True


def test_layers_are_stages(tmp_path: Path) -> None:
    events = [event(FETCH, 0), event(LEAVE, 100), event(RETURN, 300), event(COMPLETE, 350, nanoseconds=350)]
    (request,) = converted(tmp_path, recorded((0, events), layers=True)).groups["data queue 0"].requests
    assert [(each.name, each.end - each.begin) for each in request.stages] == [
        ("in layers", 100), ("in engine", 200), ("in layers", 50),
    ]  # fmt: skip


def test_what_is_in_flight_at_the_end_ends_there(tmp_path: Path) -> None:
    trace = converted(tmp_path, recorded((0, [event(FETCH, 50, slot=3)])))
    (request,) = trace.groups["data queue 0"].requests
    assert (request.args["result"], request.end) == ("in flight", BEGAN + 100_000)
    assert trace.groups["data queue 0"].counters["requests in flight"] == [(BEGAN + 50, 1)]
    assert trace.other["requests in flight at the end"] == 1


def test_lost_events_are_counted_and_mix_nothing(tmp_path: Path) -> None:
    """Slot 1: completed and fetched again unseen; slot 2: fetched unseen; slot 3: completed unseen, fetched again."""
    before = [event(FETCH, 10, slot, sector=slot) for slot in (1, 2, 3, 4)] + [
        event(COMPLETE, 20, 2, sector=2, nanoseconds=10)
    ]
    after = [
        event(COMPLETE, 100, 1, sector=11, nanoseconds=30),
        event(COMPLETE, 110, 2, sector=12, nanoseconds=40),
        event(FETCH, 120, 3, sector=13),
        event(COMPLETE, 130, 3, sector=13, nanoseconds=10),
    ]
    trace = converted(tmp_path, recorded((0, before), (7, after)))
    group = trace.groups["data queue 0"]
    spans = {each.args["sector"]: (each.begin - BEGAN, each.end - BEGAN) for each in group.requests}
    results = {each.args["sector"]: each.args["result"] for each in group.requests}
    unknown = "unknown, trace events were lost"
    assert spans == {2: (10, 20), 1: (10, 70), 11: (70, 100), 12: (70, 110), 3: (10, 120), 13: (120, 130),
        4: (10, 100_000)}  # fmt: skip
    assert results == {2: "ok", 1: unknown, 11: "ok", 12: "ok", 3: unknown, 13: "ok", 4: unknown}
    thread = trace.groups["I/O thread io0"]
    assert thread.counters["trace events lost"] == [(BEGAN, 0), (BEGAN + 100, 7)]
    assert thread.instants == ["7 trace events lost"]
    assert trace.other["trace events lost"] == 7
    assert group.counters["requests in flight"][-1][1] == 0


def test_holds_and_starts(tmp_path: Path) -> None:
    events = [event(START, 0), event(HOLD, 10), event(RELEASE, 30), event(HOLD, 50)]
    group = converted(tmp_path, recorded((0, events))).groups["data queue 0"]
    assert [(each.name, each.begin - BEGAN, each.end - BEGAN) for each in group.slices] == [
        ("held by limits", 10, 30), ("held by limits", 50, 100_000),
    ]  # fmt: skip
    assert group.instants == ["ring: start"]


def test_names_that_are_not_known(tmp_path: Path) -> None:
    events = [event(FETCH, 0, type=99), event(COMPLETE, 5, type=99, status=77, nanoseconds=5)]
    (request,) = converted(tmp_path, recorded((0, events))).groups["data queue 0"].requests
    assert (request.name, request.args["result"]) == ("type-99", "77")
