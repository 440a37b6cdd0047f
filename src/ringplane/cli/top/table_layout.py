"""The screen as lines of styled pieces: pure functions of what is known, of the view, and of the size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ringplane.cli.top import disk_table, policy_table
from ringplane.cli.top.disk_columns import ORDERS
from ringplane.cli.top.figures import count, megabytes, percent
from ringplane.cli.top.known import Known, View
from ringplane.cli.top.lines import CHOSEN, HEADING, REMARK, TROUBLE, Line, Piece, cut
from ringplane.client.rates import IoThreadRates
from ringplane.options.counted import counted

# The columns of an I/O thread, which is `width` wide with the space beside it.
THREAD_FIGURES = ("busy", "poll", "sleep")
THREAD_FIGURE, BESIDE = 6, 3


def screen(known: Known, view: View, width: int, height: int) -> list[Line]:
    """Exactly `height` lines of at most `width` characters."""
    above = _above(known, view, width, _most_threads(height))
    shown = _window(_table(view).rows(known, view, width), view.first, _room(above, height))
    lines = [*above, *shown][: height - 1]
    lines += [[] for _ in range(height - 1 - len(lines))]
    return [cut(line, width) for line in [*lines, _keys(known, view)]]


def last_first(known: Known, view: View, width: int, height: int) -> int:
    """The largest useful `View.first`: with it the last line is at the end of the screen."""
    rows = len(_table(view).rows(known, view, width))
    return _last_first(rows, _room(_above(known, view, width, _most_threads(height)), height))


def listing(known: Known, view: View, width: int) -> list[Line]:
    """All of it, however long, for what is not a terminal."""
    above = _above(known, view, width, len(known.rates.io_threads) if known.rates else 0)
    return [cut(line, width) for line in [*above, *_table(view).rows(known, view, width)]]


@dataclass(frozen=True, slots=True)
class _Table:
    """What the view is at: its headings and its rows, for a width."""

    headings: Callable[[Known, View, int], list[Line]]
    rows: Callable[[Known, View, int], list[Line]]


DISKS = _Table(disk_table.headings, disk_table.rows)
POLICIES = _Table(policy_table.headings, policy_table.rows)


def _table(view: View) -> _Table:
    return POLICIES if view.policies else DISKS


def _above(known: Known, view: View, width: int, most_threads: int) -> list[Line]:
    """Everything above the first line of the table."""
    lines = [_summary(known)]
    if known.rates is None:
        return [*lines, []]
    lines += _threads(known.rates.io_threads, width, most_threads)
    return [*lines, [], *_table(view).headings(known, view, width)]


def _summary(known: Known) -> Line:
    if known.trouble:
        return [(f"{known.title}: ", HEADING), (known.trouble, TROUBLE)]
    if known.rates is None:
        return [(known.title, HEADING), (": measuring", "")]
    disks = known.rates.disks
    attached = sum(disk.state == "attached" for disk in disks)
    iops, size = sum(disk.iops for disk in disks), sum(disk.bytes_per_second for disk in disks)
    policies = f", {counted(known.policies, 'policy', 'policies')}" if known.policies else ""
    figures = (
        f"{counted(len(disks), 'disk')}, {attached} attached, {count(iops)} IOPS, {megabytes(size)} MB/s{policies}"
    )
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


def _most_threads(height: int) -> int:
    """Lines of I/O threads, so that most of the screen is for the table."""
    return max(height // 6, 1)


def _room(above: Sequence[Line], height: int) -> int:
    """Lines for the table; the last line of the screen is for keys."""
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


def _keys(known: Known, view: View) -> Line:
    # The other table, if there is something in it.
    other = "p disks" if view.policies else "p policies" if known.policies else "arrows"
    line: Line = [(f"q quit, {other}, {'reversed' if view.reverse else 'sort'}:", REMARK)]
    for name in ORDERS:
        chosen = name == view.sort
        line += [(" ", ""), (name[0], CHOSEN if chosen else HEADING), (name[1:], CHOSEN if chosen else REMARK)]
    return line
