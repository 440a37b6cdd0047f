"""The table of disks: a line for each, with the columns that there is room for."""

from __future__ import annotations

from itertools import groupby

from ringplane.cli.top.disk_columns import BAD, COLUMNS, ORDERS, chosen, ordered, remark, width_of
from ringplane.cli.top.known import LONGEST_NAME, LONGEST_SPARK, SPARK, Known, View
from ringplane.cli.top.lines import CHOSEN, HEADING, REMARK, SPARKS, STALE, Line, shortened
from ringplane.client.rates import DiskRates

# Of names, while there is little room.
NAME = 14

SPARK_HEADING = "IOPS, 60 s"


class _Widths:
    """How a width is divided: the names, the columns, and the sparkline at the end."""

    def __init__(self, known: Known, width: int) -> None:
        disks = known.rates.disks if known.rates else ()
        longest = max([len("disk"), *(len(disk.name) for disk in disks)])
        least = min(max(longest, 8), NAME)
        # With its space. A terminal that is too narrow for it and a figure has the figure.
        spark = SPARK + 1 if known.bars else 0
        # A sparkline says it in its place.
        first = () if known.bars else ("state",)
        self.columns = chosen(width - least - spark, first) or chosen(width - least)
        room = width - least - width_of(self.columns)
        self.name = least + max(min(longest - least, room - spark, LONGEST_NAME - least), 0)
        room -= self.name - least
        self.spark = min(room - 1, LONGEST_SPARK) if spark and room >= spark else 0


def headings(known: Known, view: View, width: int) -> list[Line]:
    """Two lines."""
    widths = _Widths(known, width)
    groups: Line = [(" " * widths.name, "")]
    for group, names in groupby(widths.columns, key=lambda name: COLUMNS[name].group):
        room = width_of(list(names)) - 1
        groups.append((f" {f' {group} '.center(room, '-') if group else '':<{room}}", HEADING))
    by = ORDERS[view.sort].column
    headings: Line = [("disk".ljust(widths.name), CHOSEN if by == "name" else HEADING)]
    for name in widths.columns:
        column = COLUMNS[name]
        headings += [(" ", ""), (f"{column.heading:>{column.width}}", CHOSEN if by == name else HEADING)]
    if widths.spark:
        headings.append((f" {SPARK_HEADING:>{widths.spark}}", HEADING))
    return [groups, headings]


def rows(known: Known, view: View, width: int) -> list[Line]:
    """A line for each disk."""
    if known.rates is None:
        return []
    if not known.rates.disks:
        return [[("there is no disk; ringplane ctl add adds one", REMARK)]]
    widths = _Widths(known, width)
    return [_row(known, disk, widths) for disk in ordered(known.rates.disks, view.sort, view.reverse)]


def _row(known: Known, disk: DiskRates, widths: _Widths) -> Line:
    style = STALE if known.trouble else REMARK if disk.state != "attached" else ""
    line: Line = [(shortened(disk.name, widths.name).ljust(widths.name), style)]
    for name in widths.columns:
        column = COLUMNS[name]
        line.append((f" {column.text(disk):>{column.width}}", style if known.trouble else column.style(disk) or style))
    if widths.spark:
        sparks = remark(disk)[: widths.spark] or known.spark((disk.name,), widths.spark)
        line.append((f" {sparks}", BAD if disk.flush_failed else style or SPARKS))
    return line
