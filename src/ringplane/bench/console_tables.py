"""A report as tables in a terminal, 80 columns wide or 100."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ringplane.bench.cells import WORKLOADS, Cell
from ringplane.bench.results import QSD, RINGPLANE, SHORT, Report, Storage, short
from ringplane.bench.summary import Compared, Figures, cells_of, compare, medians, unsteady

# Terminals with fewer columns than this get fewer figures.
WIDE = 100


@dataclass(frozen=True, slots=True)
class Column:
    """A column for one of the Figures, in `unit`; whether it has a ratio, and whether narrow terminals show it."""

    heading: str
    figure: str
    decimals: int
    ratio: bool = False
    narrow: bool = True
    unit: float = 1

    def text(self, figures: Figures) -> str:
        """The figure as text, or an empty string."""
        value = getattr(figures, self.figure)
        return "" if value is None else number(value / self.unit, self.decimals)


COLUMNS = (
    Column("k IOPS", "iops", 1, ratio=True, unit=1000),
    Column("MB/s", "mb_s", 0, narrow=False),
    Column("p50 us", "p50_us", 1, ratio=True),
    Column("p99 us", "p99_us", 1),
    Column("p99.9 us", "p999_us", 1, narrow=False),
    Column("CPU us", "cpu_us", 2, ratio=True),
)


def show(console: Console, report: Report) -> None:
    """Print all tables, and whether the data was right."""
    compared = compare(report)
    for storage, cells in groups(report):
        console.print(_table(report, storage, cells, compared, wide=console.width >= WIDE))
        console.print()
    console.print(f"{loads(report)} us: microseconds. CPU us: CPU time of the back end per request.")
    if any(at.others for at in compared):
        console.print(
            f"x: ringplane's figure divided by the best of {QSD} ({SHORT}) in that figure. More than 1 is better for "
            "IOPS, less than 1 for latency and CPU time."
        )
    for sentence in steadiness(report):
        console.print(sentence)
    show_problems(console, report)


def show_problems(console: Console, report: Report) -> None:
    """Print whether the data was right."""
    if report.problems:
        console.print(f"[bold red]FAILED: wrong data or failed requests, {len(report.problems)} times[/]; the first:")
        console.print(f"[red]{escape(report.problems[0])}[/]", soft_wrap=True)
    elif report.sectors_checked:
        console.print(f"data checked: {report.sectors_checked:,} sectors were read and compared, all correct")
    else:
        console.print("data not checked: the contents of the disk are unknown")


def steadiness(report: Report) -> Iterator[str]:
    """A sentence about how far the rounds of a cell differ; empty if they do not, or if there is only one round."""
    restless, total = unsteady(report.rows)
    if restless:
        yield (
            f"In {restless} of {total} measured cells the IOPS of the rounds differ by more than a quarter: for better "
            "figures, use an idle machine or more rounds."
        )


def groups(report: Report) -> list[tuple[Storage, list[Cell]]]:
    """The cells of each table: of one storage, with the same number of queues and the same driver."""
    kinds = dict.fromkeys((cell.queues, cell.driver) for cell in cells_of(report))
    return [
        (storage, [cell for cell in cells_of(report) if (cell.queues, cell.driver) == kind])
        for storage in report.storages
        for kind in kinds
    ]


def heading(storage: Storage, cell: Cell) -> str:
    """The heading of the table of all cells with the queues and driver of `cell`."""
    queues = "one queue" if cell.queues == 1 else f"{cell.queues} queues"
    driver = "event-driven" if cell.driver == "event" else "busy-polling"
    return f"{storage.name}, {queues}, {driver} driver"


def loads(report: Report) -> str:
    """The meaning of the names of the loads."""
    names = dict.fromkeys(cell.workload for cell in cells_of(report))
    return "; ".join(f"{name}: {WORKLOADS[name].title}" for name in names) + "."


def rounds_of(report: Report) -> int:
    """How many rounds were measured."""
    return 1 + max((row.round for row in report.rows), default=0)


def number(value: float | None, decimals: int) -> str:
    """A figure with its significant digits, or an empty string."""
    if value is None:
        return ""
    return f"{value:.{0 if value >= 1000 else min(decimals, 1) if value >= 100 else decimals}f}"


def _table(report: Report, storage: Storage, cells: list[Cell], compared: Sequence[Compared], *, wide: bool) -> Table:
    here = {(at.cell, at.subject.name): at for at in compared if at.storage == storage}
    columns = [column for column in COLUMNS if wide or column.narrow]
    ratios = any(at.others for at in here.values())
    table = _empty_table(_title(report, storage, cells[0]), columns, ratios=ratios, wide=wide)
    found = medians(report.rows)
    for cell in cells:
        measured = [each for each in report.subjects if (storage.name, cell, each.name) in found]
        for position, subject in enumerate(measured):
            figures, at = found[storage.name, cell, subject.name], here.get((cell, subject.name))
            table.add_row(
                *((cell.workload, str(cell.depth)) if position == 0 else ("", "")),
                escape(short(subject)),
                *_texts(columns, figures, at, ratios=ratios),
                end_section=len(measured) > 1 and position == len(measured) - 1,
                style="bold" if subject.family == RINGPLANE else None,
            )
    return table


def _title(report: Report, storage: Storage, cell: Cell) -> str:
    rounds = rounds_of(report)
    return escape(heading(storage, cell) + (f", medians of {rounds} rounds" if rounds > 1 else ""))


def _empty_table(title: str, columns: Sequence[Column], *, ratios: bool, wide: bool) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.padding = (0, 1, 0, 0) if wide else 0
    table.add_column("load", no_wrap=True)
    table.add_column("depth", justify="right")
    table.add_column("back end", overflow="fold")
    for column in columns:
        table.add_column(column.heading, justify="right", overflow="fold")
        if ratios and column.ratio:
            table.add_column("x", justify="right", overflow="fold")
    return table


def _texts(columns: Sequence[Column], figures: Figures, at: Compared | None, *, ratios: bool) -> Iterator[str]:
    for column in columns:
        yield column.text(figures)
        if ratios and column.ratio:
            yield number(at.ratio(column.figure), 2) if at else ""
