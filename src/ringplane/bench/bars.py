"""The picture of IOPS and CPU time per I/O: a small panel of bars for each storage, workload and depth.

Each panel has its own scale, because depths of 1 and 128 differ by a factor of 50. Each bar shows its figure.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from ringplane.bench.cells import WORKLOADS, Cell
from ringplane.bench.console_tables import number, rounds_of
from ringplane.bench.results import FIO, QSD, Report, Storage
from ringplane.bench.summary import Figures, cells_of, compare, medians
from ringplane.bench.themes import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Sizes in inches: a bar, the gap below a panel, the minimum of a panel and of half the picture, labels, headings.
BAR, GAP, PANEL, HALF, LABELS, HEADINGS = 0.19, 0.16, 1.42, 3.3, 1.35, 0.5
# A line of the legend, its letters and the rest of its entries; a line of the footnote and its letters.
LINE, LETTER, ENTRY, SMALL_LINE, SMALL_LETTER = 0.22, 0.066, 0.45, 0.16, 0.06
# The width of a panel, in lengths of its longest bar: the rest is for the figures.
ROOM = 2.75


@dataclass(frozen=True, slots=True)
class Quantity:
    """The quantity in the panels of one half of the picture: one of the Figures, divided by `unit`."""

    title: str
    name: str
    unit: float
    decimals: int

    def of(self, figures: Figures) -> float | None:
        """Its value."""
        value: float | None = getattr(figures, self.name)
        return None if value is None else value / self.unit


QUANTITIES = (
    Quantity("Thousand IOPS (more is better)", "iops", 1000, 1),
    Quantity("CPU time per I/O in µs (less is better)", "cpu_us", 1, 2),
)


def draw(report: Report, queues: int, driver: str, theme: Theme) -> Figure:
    """The picture of all cells with this number of queues and this driver."""
    return _Picture(report, queues, driver, theme).draw()


class _Picture:
    def __init__(self, report: Report, queues: int, driver: str, theme: Theme) -> None:
        self._report, self._theme, self._ring = report, theme, (queues, driver)
        cells = [cell for cell in cells_of(report) if (cell.queues, cell.driver) == self._ring]
        depths = dict.fromkeys(cell.depth for cell in cells)
        self._subjects = [each for each in report.subjects if each.family != FIO]
        self._colours = theme.colours(self._subjects)
        self._found = medians(report.rows)
        self._compared = {(at.storage.name, at.cell, at.subject.name): at for at in compare(report)}
        self._columns = [(quantity, depth) for quantity in QUANTITIES for depth in depths]
        self._lines = [
            (storage, workload)
            for storage in report.storages
            for workload in dict.fromkeys(cell.workload for cell in cells)
            if any(row.storage == storage.name and row.cell.workload == workload for row in report.rows)
        ]
        self._panel = max(PANEL, HALF / len(depths))
        self._width = LABELS + self._panel * len(self._columns)
        longest = max(len(subject.name) for subject in self._subjects)
        self._in_a_line = max(1, int(self._width / (longest * LETTER + ENTRY)))
        self._head = HEADINGS + LINE * ceil(len(self._subjects) / self._in_a_line)
        self._footnote = textwrap.wrap(_footnote(report), int((self._width - 0.2) / SMALL_LETTER))
        self._foot = SMALL_LINE * (len(self._footnote) + 1)
        self._height = self._head + self._foot + len(self._lines) * (BAR * len(self._subjects) + GAP)

    def draw(self) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(self._width, self._height))
        axes = figure.subplots(len(self._lines), len(self._columns), squeeze=False)
        figure.subplots_adjust(
            left=LABELS / self._width, right=1, top=1 - self._head / self._height, bottom=self._foot / self._height,
            wspace=0.04, hspace=0.12,
        )  # fmt: skip
        for row, (storage, workload) in zip(axes, self._lines, strict=True):
            self._label(figure, row[0], storage, workload)
            for axis, (quantity, depth) in zip(row, self._columns, strict=True):
                self._bars(axis, quantity, storage.name, Cell(workload, depth, *self._ring))
        self._headings(figure)
        self._legend(figure)
        for line, text in enumerate(reversed(self._footnote)):
            self._text(figure, 0.1, SMALL_LINE * (line + 0.5), text, color=self._theme.quiet, fontsize=8)
        return figure

    def _text(self, figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
        """Text at a place in inches from the lower left."""
        figure.text(x / self._width, y / self._height, text, **{"color": self._theme.text, "fontsize": 8.5, **style})

    def _bars(self, axis: Axes, quantity: Quantity, storage: str, cell: Cell) -> None:
        """One bar per back end, with its figure; ringplane's with the ratio to the best of the others."""
        found = [self._found.get((storage, cell, each.name)) for each in self._subjects]
        values = [quantity.of(figures) if figures else None for figures in found]
        largest = max((value for value in values if value), default=1)
        axis.set(xlim=(0, largest * ROOM), ylim=(len(values) - 0.4, -0.6))
        axis.set_axis_off()
        for position, (subject, value) in enumerate(zip(self._subjects, values, strict=True)):
            if value is None:
                continue
            axis.barh(position, value, height=0.8, color=self._colours[subject.name])
            at = self._compared.get((storage, cell, subject.name))
            ratio = at.ratio(quantity.name) if at else None
            text = number(value, quantity.decimals) + ("" if ratio is None else f"  {ratio:.2f}x")
            style = {"color": self._theme.text, "fontweight": "bold"} if at else {"color": self._theme.quiet}
            axis.text(value + largest * 0.05, position, text, va="center", fontsize=8.5, **style)  # type: ignore[arg-type]

    def _headings(self, figure: Figure) -> None:
        depths = len(self._columns) // len(QUANTITIES)
        top = self._height - self._head
        for position, (quantity, depth) in enumerate(self._columns):
            x = LABELS + position * self._panel
            self._text(figure, x, top + 0.05, f"depth {depth}", color=self._theme.quiet)
            if position % depths == 0:
                self._text(figure, x, top + 0.25, quantity.title, fontsize=10, fontweight="bold")

    def _label(self, figure: Figure, axis: Axes, storage: Storage, workload: str) -> None:
        box = axis.get_position()
        what = WORKLOADS[workload].title.replace(", ", ",\n").replace("sequential ", "sequential\n")
        middle = (box.y0 + box.y1) / 2 * self._height
        self._text(figure, 0.1, middle, f"{_where(storage)}\n{what}", va="center")

    def _legend(self, figure: Figure) -> None:
        from matplotlib.patches import Patch

        figure.legend(
            [Patch(color=self._colours[each.name]) for each in self._subjects],
            [each.name for each in self._subjects],
            loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=self._in_a_line, frameon=False, fontsize=8.5,
            labelcolor=self._theme.text, handlelength=1, handleheight=1, columnspacing=1.5,
        )  # fmt: skip


def _where(storage: Storage) -> str:
    kinds = {
        "tmpfs": f"in memory ({storage.medium})",
        "loop": f"loop device ({storage.medium})",
        "rbd": "in a Ceph cluster",
        "nbd": "on an NBD server",
    }
    return kinds.get(storage.kind, f"on a disk ({storage.medium})")


def _footnote(report: Report) -> str:
    rounds, machine = rounds_of(report), report.machine
    parts = ["Depth: requests in flight", f"Medians of {rounds} rounds" if rounds > 1 else "One round"]
    if any(each.family == QSD for each in report.subjects):
        parts.insert(1, f"x: ringplane's figure divided by the best of {QSD}'s")
    if machine:
        parts.append(f"{machine['cores']} CPUs ({machine['cpu']}), Linux {machine['kernel']}, {machine['date'][:10]}")
    return ". ".join(parts) + "."
