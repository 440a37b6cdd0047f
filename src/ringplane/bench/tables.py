"""A report as tables in a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ringplane.bench.cells import Cell
from ringplane.bench.results import RINGPLANE, Report, Storage
from ringplane.bench.summary import Compared, Figures, Outcome, cells_of, compare, medians, outcomes, unsteady

# The figures, and whether they are shown in narrow terminals too; x is the ratio of the figure before it.
COLUMNS = (
    ("k IOPS", True), ("x", True), ("MB/s", False), ("p50 us", True), ("x", True), ("p99 us", True), ("x", False),
    ("p99.9 us", False), ("CPU us", True), ("x", True),
)  # fmt: skip

# Terminals with fewer columns than this get fewer figures.
WIDE = 125

# How many of the cells that miss a target are named.
NAMED = 6


def show(console: Console, report: Report) -> None:
    """Print all tables, the targets, and whether the data was right."""
    compared = compare(report)
    for storage in report.storages:
        for queues, driver in dict.fromkeys((cell.queues, cell.driver) for cell in cells_of(report)):
            cells = [cell for cell in cells_of(report) if (cell.queues, cell.driver) == (queues, driver)]
            console.print(_table(report, storage, cells, compared, wide=console.width >= WIDE))
    if any(at.best for at in compared):
        console.print(
            "x: ringplane's figure over the best of qemu-storage-daemon's, which may be of another of its variants in "
            "each column."
        )
        console.print(_targets(outcomes(compared)))
    console.print(noise(report))
    show_problems(console, report)


def show_problems(console: Console, report: Report) -> None:
    """Say whether the data was right."""
    if report.problems:
        console.print(f"[bold red]FAILED: wrong data or failed requests, {len(report.problems)} times[/]; the first:")
        console.print(f"[red]{escape(report.problems[0])}[/]", soft_wrap=True)
    elif report.sectors_checked:
        console.print(f"data checked: {report.sectors_checked:,} sectors were read and compared, all right")
    else:
        console.print("data not checked: nothing is known of what the disk holds")


def noise(report: Report) -> str:
    """How steady the rounds were, in words."""
    restless, total = unsteady(report.rows)
    return f"noise: in {restless} of {total} cells and back ends the rounds' IOPS differ by more than a quarter"


def heading(storage: Storage, cell: Cell) -> str:
    """Of a table of all cells with the queues and driver of one."""
    queues = "one queue" if cell.queues == 1 else f"{cell.queues} queues"
    driver = "event-driven" if cell.driver == "event" else "busy-polling"
    return f"{storage.name}, {queues}, {driver} driver"


def _table(report: Report, storage: Storage, cells: list[Cell], compared: list[Compared], *, wide: bool) -> Table:
    rounds = 1 + max((row.round for row in report.rows), default=0)
    table = Table(title=f"{heading(storage, cells[0])}, medians of {rounds}", title_justify="left")
    if not wide:
        table.box, table.padding = box.SIMPLE_HEAD, (0, 1, 0, 0)
    table.add_column("workload", no_wrap=True)
    table.add_column("depth", justify="right")
    table.add_column("back end", overflow="fold", min_width=12)
    for name in [name for name, always in COLUMNS if wide or always]:
        table.add_column(name, justify="right", no_wrap=True)
    found = medians(report.rows)
    beside = {(at.cell, at.subject.name): at for at in compared if at.storage == storage}
    for cell in cells:
        names = [each.name for each in report.subjects if (storage.name, cell, each.name) in found]
        families = {each.name: each.family for each in report.subjects}
        for position, name in enumerate(names):
            figures = found[storage.name, cell, name]
            first = (cell.workload, str(cell.depth)) if position == 0 else ("", "")
            style = "bold" if families[name] == RINGPLANE else None
            values = zip(COLUMNS, _figures(figures, beside.get((cell, name))), strict=True)
            cells_shown = [value for (_, always), value in values if wide or always]
            table.add_row(*first, name, *cells_shown, end_section=position == len(names) - 1, style=style)
    return table


def _figures(figures: Figures, at: Compared | None) -> list[str]:
    def ratio(name: str) -> str:
        return number(at.ratio(name), 2) if at else ""

    return [
        number(figures.iops / 1000, 1),
        ratio("iops"),
        number(figures.mb_s, 0),
        number(figures.p50_us, 1),
        ratio("p50_us"),
        number(figures.p99_us, 1),
        ratio("p99_us"),
        number(figures.p999_us, 1),
        number(figures.cpu_us, 2),
        ratio("cpu_us"),
    ]


def number(value: float | None, decimals: int) -> str:
    """A figure, or nothing."""
    return "" if value is None else f"{value:.{decimals}f}"


def limit(outcome: Outcome) -> str:
    """A target's limit in words."""
    return f"{'at least' if outcome.target.at_least else 'at most'} {outcome.target.limit:g} x"


def _targets(found: list[Outcome]) -> Table:
    table = Table(title="targets", title_justify="left")
    table.add_column("target", overflow="fold")
    table.add_column("back end", overflow="fold")
    table.add_column("holds", justify="right", no_wrap=True)
    table.add_column("not in", overflow="fold")
    for outcome in found:
        named = "; ".join(f"{at} ({ratio:.2f})" for at, ratio in outcome.missed[:NAMED])
        more = len(outcome.missed) - NAMED
        table.add_row(
            f"{outcome.target.number}. {outcome.target.text}: {limit(outcome)}",
            outcome.subject.name,
            f"{outcome.held} of {outcome.total}",
            named + (f"; and {more} more" if more > 0 else ""),
            style=None if outcome.missed else "green",
            end_section=True,
        )
    return table
