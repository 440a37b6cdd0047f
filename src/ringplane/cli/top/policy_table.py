"""The table of policies: a line for each counter of each policy of each disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ringplane.cli.top.disk_columns import ORDERS, ordered
from ringplane.cli.top.figures import count
from ringplane.cli.top.known import LONGEST_NAME, LONGEST_SPARK, Known, View
from ringplane.cli.top.lines import CHOSEN, HEADING, REMARK, SPARKS, STALE, Line, shortened
from ringplane.client.rates import CounterRates

# To which names are shortened before the sparklines are left out.
NAME = 8

NAMES = ("disk", "policy", "counter")
RATE, TOTAL, SPARK_HEADING = "per s", "total", "per s, 60 s"
RATE_WIDTH = 5
# The narrowest sparkline: there is room for its heading, and a bar is five seconds.
SPARK = 12


@dataclass(frozen=True, slots=True)
class _Counter:
    """`first`: the one before is of another policy."""

    disk: str
    policy: str
    name: str
    enabled: bool
    first: bool
    rates: CounterRates

    @property
    def names(self) -> tuple[str, str, str]:
        """As they are shown."""
        return self.disk, self.policy if self.enabled else f"{self.policy} (off)", self.name


def headings(known: Known, view: View, width: int) -> list[Line]:
    """One line."""
    widths = _Widths(list(_counters(known, view)), width, bool(known.bars))
    line: Line = []
    for heading, room in zip(NAMES, widths.names, strict=True):
        chosen = heading == "disk" and ORDERS[view.sort].column == "name"
        line += [(heading.ljust(room), CHOSEN if chosen else HEADING), (" ", "")]
    line.append((f"{RATE:>{RATE_WIDTH}} {TOTAL:>{widths.total}}", HEADING))
    if widths.spark:
        line.append((f" {SPARK_HEADING:>{widths.spark}}", HEADING))
    return [line]


def rows(known: Known, view: View, width: int) -> list[Line]:
    """A line for each counter."""
    counters = list(_counters(known, view))
    if known.rates is not None and not counters:
        return [[("no disk has a policy; ringplane ctl policy add adds one", REMARK)]]
    widths = _Widths(counters, width, bool(known.bars))
    return [_row(known, each, widths) for each in counters]


def _counters(known: Known, view: View) -> Iterator[_Counter]:
    for disk in ordered(known.rates.disks, view.sort, view.reverse) if known.rates else ():
        for policy in disk.policies:
            first = next(iter(policy.counters), "")
            for name, rates in policy.counters.items():
                yield _Counter(disk.name, policy.name, name, policy.enabled, name == first, rates)


class _Widths:
    """How a width is divided: three names, the figures, and the sparkline at the end."""

    def __init__(self, counters: Sequence[_Counter], width: int, bars: bool) -> None:
        names = zip(NAMES, *(each.names for each in counters), strict=True)
        longest = [min(max(map(len, column)), LONGEST_NAME) for column in names]
        self.total = max(len(TOTAL), *(len(str(each.rates.total)) for each in counters), 0)
        # Each name with its space.
        room = width - len(NAMES) - RATE_WIDTH - 1 - self.total
        spark = SPARK + 1 if bars else 0
        self.names = _fitted(longest, room - spark)
        room -= sum(self.names)
        self.spark = min(room - 1, LONGEST_SPARK) if spark and room >= spark else 0


def _fitted(widths: Sequence[int], room: int) -> list[int]:
    """As wide as there is room for: the widest are narrowed first."""
    fitted = list(widths)
    while sum(fitted) > room and max(fitted) > NAME:
        fitted[fitted.index(max(fitted))] -= 1
    return fitted


def _row(known: Known, counter: _Counter, widths: _Widths) -> Line:
    style = STALE if known.trouble else "" if counter.enabled else REMARK
    repeated = style if counter.first else REMARK
    line: Line = []
    for name, room, how in zip(counter.names, widths.names, (repeated, repeated, style), strict=True):
        line.append((f"{shortened(name, room).ljust(room)} ", how))
    line.append((f"{count(counter.rates.per_second):>{RATE_WIDTH}} {counter.rates.total:>{widths.total}}", style))
    if widths.spark:
        sparks = known.spark((counter.disk, counter.policy, counter.name), widths.spark)
        line.append((f" {sparks}", style or SPARKS))
    return line
