"""What `ringplane trace` writes, as Perfetto's trace processor reads it: asked by SQL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from program.served import DISK, serve
from program.test_trace_command import finish, trace
from program.test_trace_stream import API, Serve, attach
from ringplane.dataplane.trace_layout import COMPLETE, HOLD, IN_FLIGHT, RELEASE
from ringplane.driver.load import Load, run_load
from unit.test_chrome_trace import BEGAN, converted, event, recorded

from .trace_processor import Processor, opened

__all__ = ["serve"]

# What could not be imported.
ERRORS = "select name, value from stats where severity in ('error', 'data_loss') and value > 0"

# Asynchronous slices with their tracks and arguments.
SLICES = """
    select slice.id, slice.parent_id, slice.name, ts, dur, depth, category, process.name as queue, track.name as track,
      extract_arg(slice.arg_set_id, 'args.sector') as sector, extract_arg(slice.arg_set_id, 'args.length') as length,
      extract_arg(slice.arg_set_id, 'args.head') as head, extract_arg(slice.arg_set_id, 'args.result') as result
    from slice join process_track track on slice.track_id = track.id join process using (upid)
    where category = 'request' order by slice.id
"""

COUNTERS = """
    select process.name as place, track.name, ts, cast(value as int) as value
    from counter join process_counter_track track on counter.track_id = track.id join process using (upid)
    order by counter.id
"""


def requests(processor: Processor) -> list[dict[str, Any]]:
    """Each with its stages."""
    slices = {row["id"]: row | {"stages": []} for row in processor.rows(SLICES)}
    for each in slices.values():
        if each["parent_id"] is not None:
            slices[each["parent_id"]]["stages"].append(each)
    return [each for each in slices.values() if each["parent_id"] is None and each["result"]]


def test_a_load(serve: Serve, tmp_path: Path) -> None:
    """Of a real process with a layer: each request is a slice on the track of its type and queue, with its stages."""
    served = serve(*DISK, *API, "--num-queues", "2", "--delay", "read=1")
    with attach(served, queues=2) as driver:
        tracing = trace(served, "--seconds", "3600", "--requests", "2000")
        load = Load(depth=8, queues=2, read_percent=50, flush_every=10, requests=2000, block_size=[4096, 8192])
        result = run_load(driver, load)
        finish(tracing)
    served.end()
    with opened(tmp_path / "trace.json") as processor:
        assert processor.rows(ERRORS) == []
        found, counted = requests(processor), processor.rows(COUNTERS)
    assert len(found) == result.requests == 2000
    assert {each["queue"] for each in found} == {"a queue 0, group", "a queue 1, group"}
    assert {each["name"] for each in found} == {"read", "write", "flush"}
    assert all(each["track"] == each["name"] for each in found)
    assert {each["result"] for each in found} == {"ok"}
    assert sum(each["length"] for each in found) == result.bytes
    assert all(0 <= each["sector"] < 8192 and each["head"] >= 0 for each in found)
    for each in found:
        check_stages(each)
    for queue in ("a queue 0, group", "a queue 1, group"):
        depths = [row["value"] for row in counted if (row["place"], row["name"]) == (queue, "requests in flight")]
        assert (max(depths), depths[-1]) == (8, 0)
    lost = [row["value"] for row in counted if row["name"] == "trace events lost"]
    assert lost == [0]


def check_stages(request: dict[str, Any]) -> None:
    """They follow each other, from the beginning to the end of the request."""
    stages = request["stages"]
    names = [each["name"] for each in stages if each["name"] != "in ring"]
    assert "in engine" in names
    assert ("in layers" in names) or request["name"] != "read"
    assert all(each["depth"] == 1 for each in stages)
    ends = [request["ts"], *(each["ts"] + each["dur"] for each in stages)]
    assert [*(each["ts"] for each in stages), request["ts"] + request["dur"]] == ends


def test_lost_events_and_what_has_no_end(tmp_path: Path) -> None:
    before = [event(COMPLETE, 20, 2, sector=2, lasted=10), event(HOLD, 30), event(RELEASE, 50)]
    after = [event(COMPLETE, 100, 1, sector=11, lasted=30, type=99), event(IN_FLIGHT, 60, 3, sector=1 << 40)]
    converted(tmp_path, recorded((0, before), (7, after)))
    with opened(tmp_path / "trace.json") as processor:
        assert processor.rows(ERRORS) == []
        found = {each["sector"]: each for each in requests(processor)}
        counted = [(row["ts"] - BEGAN, row["value"]) for row in processor.rows(COUNTERS) if "lost" in row["name"]]
        instants = processor.rows("select name, ts from slice where dur = 0 and category is null")
        held = processor.rows("select ts, dur from slice where name = 'held by limits'")
    assert {
        sector: (each["name"], each["result"], each["ts"] - BEGAN, each["dur"]) for sector, each in found.items()
    } == {
        2: ("read", "ok", 10, 10),
        11: ("type-99", "ok", 70, 30),
        1 << 40: ("read", "in flight", 60, 99_940),
    }
    assert counted == [(0, 0), (100, 7)]
    assert instants == [{"name": "7 trace events lost", "ts": BEGAN + 100}]
    assert held == [{"ts": BEGAN + 30, "dur": 20}]


def test_errors_are_found(tmp_path: Path) -> None:
    """The trace processor says what it cannot import."""
    (tmp_path / "trace.json").write_text(
        '{"traceEvents": [{"ph":"e","cat":"request","id2":{"local":"1"},"pid":1,"tid":1}]}'
    )
    with opened(tmp_path / "trace.json") as processor:
        assert processor.rows(ERRORS) != []
