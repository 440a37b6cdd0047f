"""From the events of a recording to Chrome's trace event format, read by a strict reader of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ringplane.client.chrome_trace import write_chrome_trace
from ringplane.client.trace_receiver import VERSION, Block, Description, NewQueue, Recorded
from ringplane.dataplane.trace_events import EVENT_NAMES, STATUS_NAMES, TYPE_NAMES
from ringplane.dataplane.trace_layout import (
    COMPLETE,
    EVENT,
    FETCH,
    HOLD,
    IN_FLIGHT,
    LEAVE,
    RELEASE,
    RETURN,
    START,
    STOP,
    fill,
)

from .chrome_format import Trace, check_depth

READ, WRITE, OK, IOERR = 0, 1, 0, 1
BEGAN = 1_000_000


def event(kind: int, time: int, head: int = 0, **fields: int) -> Any:
    made = np.zeros(1, EVENT)
    fill(made, event=kind, time=BEGAN + time, head=head, **fields)
    return made[0]


def recorded(*blocks: tuple[int, list[Any]], layers: bool = False, ended: int = 100_000) -> Recorded:
    """Of one queue; each block has the number of events that were lost before it."""
    description = Description(
        version=VERSION, began=BEGAN, events=EVENT_NAMES, types=TYPE_NAMES, statuses=STATUS_NAMES,
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
    fields = {"type": WRITE, "sector": 8, "length": 4096, "head": 5, "waited": 30}
    complete = event(COMPLETE, 10_001, lasted=7001, status=IOERR, **fields)
    trace = converted(tmp_path, recorded((0, [complete])))
    (request,) = trace.groups["data queue 0"].requests
    assert (request.name, request.begin - BEGAN, request.end - BEGAN) == ("write", 1080, 10_001)
    assert request.args == {"sector": 8, "length": 4096, "head": 5, "result": "ioerr"}
    stages = [(each.name, each.begin - BEGAN, each.end - BEGAN) for each in request.stages]
    assert stages == [("in ring", 1080, 3000), ("in engine", 3000, 10_001)]
    assert trace.groups["data queue 0"].counters == {"requests in flight": [(BEGAN + 3000, 1), (BEGAN + 10_001, 0)]}
    assert trace.other["requests"] == 1
    assert trace.other["complete"] is True


def test_layers_are_stages(tmp_path: Path) -> None:
    events = [event(LEAVE, 100), event(RETURN, 300), event(COMPLETE, 350, lasted=350)]
    (request,) = converted(tmp_path, recorded((0, events), layers=True)).groups["data queue 0"].requests
    assert [(each.name, each.end - each.begin) for each in request.stages] == [
        ("in layers", 100), ("in engine", 200), ("in layers", 50),
    ]  # fmt: skip


def test_stages_that_are_not_known_are_not_there(tmp_path: Path) -> None:
    """Of requests that were in flight at the beginning, or when events were lost, some may be missing."""
    before = [event(LEAVE, 10, 1), event(LEAVE, 10, 2), event(COMPLETE, 20, 3, sector=3, lasted=30, waited=1)]
    after = [
        event(COMPLETE, 100, 1, sector=1, lasted=95),
        event(LEAVE, 110, 2),
        event(RETURN, 120, 2),
        event(COMPLETE, 130, 2, sector=2, lasted=25),
    ]
    trace = converted(tmp_path, recorded((0, before), (1, after), layers=True))
    stages = {
        each.args["sector"]: [stage.name for stage in each.stages] for each in trace.groups["data queue 0"].requests
    }
    assert stages == {3: ["in ring"], 1: [], 2: ["in layers", "in engine", "in layers"]}


def test_what_is_in_flight_at_the_end_ends_there(tmp_path: Path) -> None:
    trace = converted(tmp_path, recorded((0, [event(IN_FLIGHT, 50, head=3)])))
    (request,) = trace.groups["data queue 0"].requests
    assert (request.args["result"], request.end) == ("in flight", BEGAN + 100_000)
    assert trace.groups["data queue 0"].counters["requests in flight"] == [(BEGAN + 50, 1)]
    assert trace.other["requests in flight at the end"] == 1


def test_depth_whatever_ends_first(tmp_path: Path) -> None:
    events = [
        event(COMPLETE, 20, 2, lasted=10),
        event(COMPLETE, 20, 3, lasted=5),
        event(FETCH, 25, 4),
        event(COMPLETE, 30, 1, lasted=29),
        event(COMPLETE, 40, 4, lasted=15),
        event(IN_FLIGHT, 40, 2),
    ]
    group = converted(tmp_path, recorded((0, events))).groups["data queue 0"]
    assert group.counters["requests in flight"] == [
        (BEGAN + time, depth) for time, depth in ((1, 1), (10, 2), (15, 3), (20, 1), (25, 2), (30, 1), (40, 1))
    ]
    check_depth(group)


def test_lost_events_are_counted(tmp_path: Path) -> None:
    before = [event(COMPLETE, 20, 2, sector=2, lasted=10)]
    after = [event(COMPLETE, 100, 1, sector=11, lasted=30)]
    trace = converted(tmp_path, recorded((0, before), (7, after)))
    group = trace.groups["data queue 0"]
    spans = {each.args["sector"]: (each.begin - BEGAN, each.end - BEGAN) for each in group.requests}
    assert spans == {2: (10, 20), 11: (70, 100)}
    thread = trace.groups["I/O thread io0"]
    assert thread.counters["trace events lost"] == [(BEGAN, 0), (BEGAN + 100, 7)]
    assert thread.instants == ["7 trace events lost"]
    assert trace.other["trace events lost"] == 7


def test_holds_and_starts(tmp_path: Path) -> None:
    events = [event(START, 0), event(HOLD, 10), event(RELEASE, 30), event(HOLD, 50)]
    group = converted(tmp_path, recorded((0, events))).groups["data queue 0"]
    assert [(each.name, each.begin - BEGAN, each.end - BEGAN) for each in group.slices] == [
        ("held by limits", 10, 30), ("held by limits", 50, 100_000),
    ]  # fmt: skip
    assert group.instants == ["ring: start"]


def held(group: Any) -> list[tuple[int, int]]:
    return [(each.begin - BEGAN, each.end - BEGAN) for each in group.slices if each.name == "held by limits"]


def test_a_hold_ends_whatever_ends_it(tmp_path: Path) -> None:
    """A ring can stop while it is held, or be held again."""
    events = [event(HOLD, 10), event(STOP, 30), event(START, 40), event(HOLD, 50), event(HOLD, 70), event(RELEASE, 90)]
    group = converted(tmp_path, recorded((0, events))).groups["data queue 0"]
    assert held(group) == [(10, 30), (50, 70), (70, 90)]


def test_a_hold_is_known_until_events_are_lost(tmp_path: Path) -> None:
    """Its end may be among them."""
    before = [event(HOLD, 10), event(COMPLETE, 20, lasted=15)]
    after = [event(COMPLETE, 80, lasted=15), event(RELEASE, 90), event(HOLD, 95)]
    group = converted(tmp_path, recorded((0, before), (3, after))).groups["data queue 0"]
    assert held(group) == [(10, 20), (95, 100_000)]


def test_a_loss_is_where_the_thread_was(tmp_path: Path) -> None:
    """Whatever other threads have traced meanwhile: requests that were fetched after it have their stages."""
    after = [event(COMPLETE, 90, lasted=5), event(LEAVE, 200), event(RETURN, 300), event(COMPLETE, 350, lasted=250)]
    made = recorded((0, [event(COMPLETE, 10, lasted=5)]), (1, after), layers=True)
    queue = NewQueue(number=0, disk="other", queue=0, layers=False)
    made.blocks.insert(1, Block("io1", [queue], 0, np.array([event(COMPLETE, 5000, lasted=5)], EVENT)))
    trace = converted(tmp_path, made)
    assert [each.name for each in trace.groups["data queue 0"].requests[2].stages] == [
        "in layers", "in engine", "in layers",
    ]  # fmt: skip
    assert trace.groups["I/O thread io0"].counters["trace events lost"] == [(BEGAN, 0), (BEGAN + 90, 1)]


def test_names_that_are_not_known(tmp_path: Path) -> None:
    events = [event(COMPLETE, 5, type=99, status=7, lasted=5)]
    (request,) = converted(tmp_path, recorded((0, events))).groups["data queue 0"].requests
    assert (request.name, request.args["result"]) == ("type-99", "7")
