"""A strict reader of Chrome's trace event format, as far as `ringplane trace` uses it.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU describes the format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# By phase: the fields that an event must have, and those that it may have.
FIELDS = {
    "M": ({"pid", "tid", "name", "args"}, set[str]()),
    "b": ({"pid", "tid", "ts", "name", "cat", "id2"}, {"args"}),
    "e": ({"pid", "tid", "ts", "name", "cat", "id2"}, set[str]()),
    "C": ({"pid", "tid", "ts", "name", "args"}, set[str]()),
    "i": ({"pid", "tid", "ts", "name", "s"}, set[str]()),
}


@dataclass
class Slice:
    """An asynchronous slice; times are nanoseconds."""

    name: str
    begin: int
    end: int = -1
    args: dict[str, Any] = field(default_factory=dict)
    stages: list[Slice] = field(default_factory=list)


@dataclass
class Group:
    """What a process of the format has."""

    name: str
    slices: list[Slice] = field(default_factory=list)
    counters: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    instants: list[str] = field(default_factory=list)

    @property
    def requests(self) -> list[Slice]:
        return [each for each in self.slices if each.args]


class Trace:
    """A file, checked."""

    def __init__(self, path: Path) -> None:
        document = json.loads(path.read_text(), object_pairs_hook=_without_repetition)
        assert document.keys() == {"traceEvents", "displayTimeUnit", "otherData"}
        assert document["displayTimeUnit"] == "ns"
        self.other = document["otherData"]
        self.groups: dict[str, Group] = {}
        self._pids: dict[int, Group] = {}
        self._open: dict[tuple[int, str], list[Slice]] = {}
        self._ended: set[tuple[int, str]] = set()
        for event in document["traceEvents"]:
            self._take(event)
        assert not self._open, f"slices without an end: {self._open}"

    def _take(self, event: dict[str, Any]) -> None:
        needed, possible = FIELDS[event["ph"]]
        assert needed <= event.keys() - {"ph"} <= needed | possible, event
        assert type(event["pid"]) is int
        assert event["tid"] == event["pid"] > 0
        if event["ph"] == "M":
            assert event["name"] == "process_name"
            assert event["pid"] not in self._pids
            name, _, suffix = event["args"]["name"].rpartition(", ")
            assert suffix == "group"
            group = self._pids[event["pid"]] = self.groups[name] = Group(name)
            assert len(self.groups) == len(self._pids), f"two groups with the same name: {group.name}"
        else:
            # Microseconds with three decimals: exact as nanoseconds.
            getattr(self, f"_{event['ph']}")(event, self._pids[event["pid"]], round(event["ts"] * 1000))

    def _b(self, event: dict[str, Any], group: Group, time: int) -> None:
        key = self._key(event)
        assert key not in self._ended, f"an id is used twice: {event}"
        begun = Slice(event["name"], time, args=event.get("args", {}))
        around = self._open.setdefault(key, [])
        if around:
            before = around[-1].stages
            assert time >= (before[-1].end if before else around[-1].begin), event
            before.append(begun)
        else:
            group.slices.append(begun)
        around.append(begun)

    def _e(self, event: dict[str, Any], group: Group, time: int) -> None:
        key = self._key(event)
        ended = self._open[key].pop()
        assert (ended.name, ended.end) == (event["name"], -1)
        assert time >= (ended.stages[-1].end if ended.stages else ended.begin), event
        ended.end = time
        if not self._open[key]:
            del self._open[key]
            self._ended.add(key)

    def _C(self, event: dict[str, Any], group: Group, time: int) -> None:  # noqa: N802
        ((series, value),) = event["args"].items()
        values = group.counters.setdefault(f"{event['name']} {series}", [])
        assert not values or time > values[-1][0], event
        assert type(value) is int
        assert value >= 0
        values.append((time, value))

    def _i(self, event: dict[str, Any], group: Group, time: int) -> None:
        assert event["s"] in ("p", "g")
        group.instants.append(event["name"])

    @staticmethod
    def _key(event: dict[str, Any]) -> tuple[int, str]:
        assert event["cat"] == "request"
        assert event["id2"].keys() == {"local"}
        return event["pid"], event["id2"]["local"]


def check_depth(group: Group) -> None:
    """The counter is the number of requests between fetch and completion, whenever it changes."""
    changes: dict[int, int] = {}
    for request in group.requests:
        fetched = next((each.end for each in request.stages if each.name == "in ring"), request.begin)
        changes[fetched] = changes.get(fetched, 0) + 1
        if request.args["result"] != "in flight":
            changes[request.end] = changes.get(request.end, 0) - 1
    depth, expected = 0, []
    for time in sorted(changes):
        depth += changes[time]
        expected.append((time, depth))
    assert group.counters["requests in flight"] == expected


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), f"a key is there twice: {pairs}"
    return dict(pairs)
