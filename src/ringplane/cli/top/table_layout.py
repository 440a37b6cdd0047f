"""The screen as lines of styled pieces: pure functions of what is known, of the view, and of the size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from ringplane.cli.top.disk_columns import BAD, COLUMNS, ORDERS, chosen, ordered, remark, width_of
from ringplane.cli.top.figures import BARS, Sample, count, megabytes, percent, sparkline, spread
from ringplane.client.rates import DiskRates, IoThreadRates, Rates
from ringplane.options.counted import counted

# A text, and how it looks (a style of rich).
Piece = tuple[str, str]
Line = list[Piece]

MINUTE = 60.0

# Of names, while there is little room, and of sparklines; a cell for each second at most.
NAME, LONGEST_NAME, SPARK, LONGEST_SPARK = 14, 64, 10, 60

SPARK_HEADING = "IOPS, 60 s"

# The columns of an I/O thread, which is `width` wide with the space beside it.
THREAD_FIGURES = ("busy", "poll", "sleep")
THREAD_FIGURE, BESIDE = 6, 3

HEADING, CHOSEN, REMARK, TROUBLE, STALE = "bold", "bold reverse", "dim", "bold yellow", "dim"


@dataclass(frozen=True, slots=True)
class View:
    """How a user looks at the disks: their order, and how many of them are above the screen."""

    sort: str = "iops"
    reverse: bool = False
    first: int = 0


@dataclass(frozen=True, slots=True)
class Known:
    """What there is to show. `trouble`: why there is nothing newer; `bars`: of sparklines. Empty: there are none."""

    title: str
    rates: Rates | None = None
    iops: Mapping[str, Iterable[Sample]] = field(default_factory=dict)
    end: float = 0.0
    trouble: str = ""
    bars: str = BARS


def screen(known: Known, view: View, width: int, height: int) -> list[Line]:
    """Exactly `height` lines of at most `width` characters."""
    above = _above(known, view, width, _most_threads(height))
    shown = _window(_rows(known, view, width), view.first, _room(above, height))
    lines = [*above, *shown][: height - 1]
    lines += [[] for _ in range(height - 1 - len(lines))]
    return [_cut(line, width) for line in [*lines, _keys(view)]]


def last_first(known: Known, view: View, width: int, height: int) -> int:
    """The largest useful `View.first`: with it the last disk is at the end of the screen."""
    disks = len(known.rates.disks) if known.rates else 0
    return _last_first(disks, _room(_above(known, view, width, _most_threads(height)), height))


def listing(known: Known, view: View, width: int) -> list[Line]:
    """All of it, however long, for what is not a terminal."""
    lines = [*_above(known, view, width, len(known.rates.io_threads) if known.rates else 0), *_rows(known, view, width)]
    return [_cut(line, width) for line in lines]


def shortened(name: str, width: int) -> str:
    """A name in at most so many characters: its middle is left out, because names differ mostly at their end."""
    end = width // 2
    return name if len(name) <= width else f"{name[: width - end - 1]}~{name[len(name) - end :]}"


def plain(line: Line) -> str:
    """Without styles."""
    return "".join(text for text, _ in line).rstrip()


def _above(known: Known, view: View, width: int, most_threads: int) -> list[Line]:
    """Everything above the first disk."""
    lines = [_summary(known, width)]
    if known.rates is None:
        return [*lines, []]
    lines += _threads(known.rates.io_threads, width, most_threads)
    return [*lines, [], *_headings(known, view, width)]


def _summary(known: Known, width: int) -> Line:
    if known.trouble:
        return [(f"{known.title}: ", HEADING), (known.trouble, TROUBLE)]
    if known.rates is None:
        return [(known.title, HEADING), (": measuring", "")]
    disks = known.rates.disks
    attached = sum(disk.state == "attached" for disk in disks)
    iops, size = sum(disk.iops for disk in disks), sum(disk.bytes_per_second for disk in disks)
    figures = f"{counted(len(disks), 'disk')}, {attached} attached, {count(iops)} IOPS, {megabytes(size)} MB/s"
    return [(known.title, HEADING), (f": {figures}", "")]


def _threads(threads: Sequence[IoThreadRates], width: int, most: int) -> list[Line]:
    """The I/O threads beside each other, in at most so many lines below a heading."""
    name = max([len("I/O thread"), *(len(thread.name) for thread in threads)])
    cell = name + THREAD_FIGURE * len(THREAD_FIGURES)
    beside = max(min((width + BESIDE) // (cell + BESIDE), len(threads)), 1)
    if len(threads) > beside * most:
        # The last place says how many are missing.
        threads = sorted(threads, key=lambda thread: -thread.busy)
        left = len(threads) - (beside * most - 1)
        cells = [_thread(thread, name) for thread in threads[:-left]] + [(f"and {left} more".ljust(cell), REMARK)]
    else:
        cells = [_thread(thread, name) for thread in threads]
    headings = "I/O thread".ljust(name) + "".join(f"{figure:>{THREAD_FIGURE}}" for figure in THREAD_FIGURES)
    rows = [cells[start : start + beside] for start in range(0, len(cells), beside)]
    return [_joined([(headings, HEADING)] * beside), *map(_joined, rows)]


def _thread(thread: IoThreadRates, name: int) -> Piece:
    shares = (thread.busy, thread.polling, thread.asleep)
    return thread.name.ljust(name) + "".join(f"{percent(share):>{THREAD_FIGURE}}" for share in shares), ""


def _joined(cells: Sequence[Piece]) -> Line:
    return [piece for cell in cells for piece in (cell, (" " * BESIDE, ""))][:-1]


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


def _headings(known: Known, view: View, width: int) -> list[Line]:
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


def _rows(known: Known, view: View, width: int) -> list[Line]:
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
        line.append((f" {_spark(known, disk, widths.spark)}", BAD if disk.flush_failed else style or "cyan"))
    return line


def _spark(known: Known, disk: DiskRates, cells: int) -> str:
    if words := remark(disk):
        return words[:cells]
    return sparkline(spread(known.iops.get(disk.name, ()), known.end, MINUTE, cells), known.bars)


def _most_threads(height: int) -> int:
    """Lines of I/O threads, so that most of the screen is for disks."""
    return max(height // 6, 1)


def _room(above: Sequence[Line], height: int) -> int:
    """Lines for disks; the last line of the screen is for keys."""
    return max(height - len(above) - 1, 0)


def _last_first(rows: int, room: int) -> int:
    """One line is needed to say what is not shown."""
    return max(rows - max(room - 1, 1), 0) if rows > room else 0


def _window(rows: Sequence[Line], first: int, room: int) -> list[Line]:
    """The rows from `first` on that fit; the last line says how many there are below."""
    if len(rows) <= room:
        return list(rows)
    first = min(first, _last_first(len(rows), room))
    shown = rows[first : first + max(room - 1, 1)]
    left = len(rows) - first - len(shown)
    return [*shown, [(f"and {left} more" if left else f"the end; {first} are above", REMARK)]]


def _keys(view: View) -> Line:
    line: Line = [(f"q quit, arrows, {'reversed' if view.reverse else 'sort'}:", REMARK)]
    for name in ORDERS:
        chosen = name == view.sort
        line += [(" ", ""), (name[0], CHOSEN if chosen else HEADING), (name[1:], CHOSEN if chosen else REMARK)]
    return line


def _cut(line: Line, width: int) -> Line:
    """At most `width` characters of it."""
    cut: Line = []
    for text, style in line:
        cut.append((text[:width], style))
        width -= len(text)
        if width <= 0:
            break
    return cut
