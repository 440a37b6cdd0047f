"""The columns of the table of disks, and which of them a width has room for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ringplane.cli.top.figures import count, latency, megabytes, percent, whole
from ringplane.client.rates import DiskRates

# Of names: digits are compared as numbers.
PIECES = re.compile(r"(\D*)([0-9]*)")

# A latency that is not known is less than all others.
UNKNOWN = -1.0

# Styles of rich.
BAD, LIMITED = "bold red", "yellow"

Text = Callable[[DiskRates], str]
Style = Callable[[DiskRates], str]
Value = Callable[[DiskRates], float]


def _plain(_: DiskRates) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of each disk. Columns beside each other with the same `group` have one heading above theirs."""

    heading: str
    text: Text
    group: str = ""
    width: int = 5
    style: Style = _plain


def _latency(operation: str, field: str) -> Column:
    return Column(field, lambda disk: latency(getattr(disk.of(operation), f"{field}_us")), operation)


def _per_second(operation: str) -> Column:
    return Column("IO/s", lambda disk: count(disk.of(operation).per_second), operation)


def _megabytes(operation: str) -> Column:
    return Column("MB/s", lambda disk: megabytes(disk.of(operation).bytes_per_second), operation)


def depth(disk: DiskRates) -> float:
    """The mean number of requests in flight; if none has completed, how many there are now."""
    return disk.depth if disk.iops else float(disk.in_flight)


def _bad_if(holds: Callable[[DiskRates], object]) -> Style:
    return lambda disk: BAD if holds(disk) else ""


# From left to right.
COLUMNS: Mapping[str, Column] = {
    "state": Column("state", lambda disk: state(disk), width=9, style=_bad_if(lambda disk: disk.flush_failed)),
    "iops": Column("IOPS", lambda disk: count(disk.iops)),
    "mb": Column("MB/s", lambda disk: megabytes(disk.bytes_per_second)),
    "read iops": _per_second("read"),
    "read mb": _megabytes("read"),
    "read p50": _latency("read", "p50"),
    "read p99": _latency("read", "p99"),
    "write iops": _per_second("write"),
    "write mb": _megabytes("write"),
    "write p50": _latency("write", "p50"),
    "write p99": _latency("write", "p99"),
    "flush iops": _per_second("flush"),
    "flush p50": _latency("flush", "p50"),
    "flush p99": _latency("flush", "p99"),
    "depth": Column("depth", lambda disk: count(depth(disk))),
    "busy": Column("util", lambda disk: percent(disk.busy)),
    "limit": Column("limit", lambda disk: percent(disk.limited), style=lambda disk: LIMITED if disk.limited else ""),
    "errors": Column("err", lambda disk: whole(disk.errors), width=4, style=_bad_if(lambda disk: disk.errors)),
}

# What appears together, the most important first, as there is room.
TIERS = (
    ("iops",),
    ("mb",),
    ("depth",),
    ("read p99", "write p99"),
    ("read p50", "write p50"),
    ("limit", "errors"),
    ("flush p50", "flush p99"),
    ("busy",),
    ("read iops", "write iops"),
    ("read mb", "write mb"),
    ("flush iops",),
    ("state",),
)


@dataclass(frozen=True, slots=True)
class Order:
    """An order of the disks: its key on the keyboard is the first letter of its name."""

    value: Value
    # The column by which it is, if that is shown.
    column: str


ORDERS: Mapping[str, Order] = {
    "iops": Order(lambda disk: disk.iops, "iops"),
    "mb": Order(lambda disk: disk.bytes_per_second, "mb"),
    "read": Order(lambda disk: _known(disk.of("read").p99_us), "read p99"),
    "write": Order(lambda disk: _known(disk.of("write").p99_us), "write p99"),
    "flush": Order(lambda disk: _known(disk.of("flush").p99_us), "flush p99"),
    "depth": Order(depth, "depth"),
    "limit": Order(lambda disk: disk.limited, "limit"),
    "errors": Order(lambda disk: disk.errors, "errors"),
    "name": Order(lambda _: 0, "name"),
}


def ordered(disks: Sequence[DiskRates], by: str, reverse: bool) -> list[DiskRates]:
    """The most first, disks that are equal by their names; names from a to z, and `vm-9` before `vm-10`."""
    value = ORDERS[by].value
    return sorted(disks, key=lambda disk: (-value(disk), _in_parts(disk.name), disk.name), reverse=reverse)


def _in_parts(name: str) -> list[tuple[str, int]]:
    """The name in pieces that are a text and a number after it."""
    return [(text, int(digits or 0)) for text, digits in PIECES.findall(name)]


def state(disk: DiskRates) -> str:
    """In a word, the first one of what `ringplane ctl list` shows."""
    return "paused" if disk.paused and disk.state != "stopped" else disk.state


def remark(disk: DiskRates) -> str:
    """What is to be said of a disk in place of its sparkline; mostly nothing."""
    if disk.flush_failed:
        return "flush failed"
    if disk.source is not None and disk.source.state != "ok":
        return disk.source.state
    # One whose front end has just detached still has a minute to show.
    return "" if state(disk) == "attached" or (state(disk) == "listening" and disk.iops) else state(disk)


def _known(microseconds: float | None) -> float:
    return UNKNOWN if microseconds is None else microseconds


def chosen(room: int, first: Sequence[str] = ()) -> list[str]:
    """The names of the columns for which there is room, from left to right; each has a space before it.

    `first`: those that are more important than all others.
    """
    names: set[str] = set()
    for tier in (first, *TIERS):
        room -= sum(COLUMNS[name].width + 1 for name in tier if name not in names)
        if room < 0:
            break
        names.update(tier)
    return [name for name in COLUMNS if name in names]


def width_of(names: Sequence[str]) -> int:
    """Of these columns."""
    return sum(COLUMNS[name].width + 1 for name in names)
