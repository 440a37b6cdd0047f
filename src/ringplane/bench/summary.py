"""Medians of a report's rows, and ringplane's ratios to the best of the others."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ringplane.bench.cells import BUSY, EVENT, Cell
from ringplane.bench.results import FIO, QSD, RINGPLANE, SOCKET, Report, Row, Storage, Subject

# Figures per request: less is better.
OF_REQUESTS = ("p50_us", "p99_us", "p999_us", "cpu_us")
# Rounds that differ by more than this factor are counted as unsteady.
STEADY = 1.25


@dataclass(frozen=True, slots=True)
class Figures:
    """The medians of a cell's rounds, or the best of several back ends in each figure.

    Latencies and CPU time (of one request) are in microseconds. They are None if no request was completed; the CPU time
    is also None if the process is not visible.
    """

    iops: float
    mb_s: float
    p50_us: float | None
    p99_us: float | None
    p999_us: float | None
    cpu_us: float | None


@dataclass(frozen=True, slots=True)
class Compared:
    """One variant of ringplane (or the back end at a socket) in one cell, and the figures of the others there.

    `others` are the variants of qemu-storage-daemon; `raw` is raw fio.
    """

    storage: Storage
    cell: Cell
    subject: Subject
    figures: Figures
    others: Mapping[Subject, Figures]
    raw: Figures | None

    @property
    def best(self) -> Figures | None:
        """The best of the others in each figure, possibly from different variants; None without any."""
        return best(list(self.others.values()))

    @property
    def fastest(self) -> Subject | None:
        """The variant of the others with the most IOPS; None without any."""
        return max(self.others, key=lambda subject: self.others[subject].iops, default=None)

    def ratio(self, name: str) -> float | None:
        """The figure divided by the best of the others."""
        return proportion(getattr(self.figures, name), getattr(self.best, name) if self.best else None)

    def __str__(self) -> str:
        return f"{self.storage.name}: {self.cell}"


def proportion(ours: float | None, theirs: float | None) -> float | None:
    """`ours` / `theirs`, if both exist."""
    return ours / theirs if ours is not None and theirs else None


def medians(rows: Iterable[Row]) -> dict[tuple[str, Cell, str], Figures]:
    """The medians of all rounds, by storage, cell and subject (names)."""
    grouped: dict[tuple[str, Cell, str], list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row.storage, row.cell, row.subject].append(row)
    return {key: _median(rounds) for key, rounds in grouped.items()}


def _median(rows: Sequence[Row]) -> Figures:
    served = [row for row in rows if row.requests]

    def of_requests(name: str) -> float | None:
        values = [value for row in served if (value := getattr(row, name)) is not None]
        return float(statistics.median(values)) if values else None

    return Figures(
        statistics.median(row.iops for row in rows),
        statistics.median(row.mb_s for row in rows),
        *(of_requests(name) for name in OF_REQUESTS),
    )


def best(figures: Sequence[Figures]) -> Figures | None:
    """The best of each figure: the most IOPS and MB/s, the least latency and CPU time."""
    if not figures:
        return None

    def least(name: str) -> float | None:
        return min((value for each in figures if (value := getattr(each, name)) is not None), default=None)

    return Figures(
        max(each.iops for each in figures), max(each.mb_s for each in figures), *(least(name) for name in OF_REQUESTS)
    )


def compare(report: Report) -> list[Compared]:
    """Each variant of ringplane in each cell, in the order of a table."""
    found = medians(report.rows)
    compared = []
    for storage in report.storages:
        for cell in cells_of(report):
            here = {
                subject: found[storage.name, cell, subject.name]
                for subject in report.subjects
                if (storage.name, cell, subject.name) in found
            }
            others = {subject: each for subject, each in here.items() if subject.family == QSD}
            # Raw fio is measured with the first driver only, and is the same limit for the other.
            raw = _raw(report, found, storage, cell)
            compared += [
                Compared(storage, cell, subject, figures, others, raw)
                for subject, figures in here.items()
                if subject.family in (RINGPLANE, SOCKET)
            ]
    return compared


def unsteady(rows: Iterable[Row]) -> tuple[int, int]:
    """The number of cells in which one round has more than STEADY times the IOPS of another, and that of all cells."""
    grouped: dict[tuple[str, Cell, str], list[float]] = defaultdict(list)
    for row in rows:
        grouped[row.storage, row.cell, row.subject].append(row.iops)
    return sum(max(rounds) > STEADY * min(rounds) for rounds in grouped.values()), len(grouped)


def _raw(report: Report, found: dict[tuple[str, Cell, str], Figures], storage: Storage, cell: Cell) -> Figures | None:
    for subject in report.subjects:
        for driver in (EVENT, BUSY):
            key = (storage.name, Cell(cell.workload, cell.depth, cell.queues, driver), subject.name)
            if subject.family == FIO and key in found:
                return found[key]
    return None


def cells_of(report: Report) -> list[Cell]:
    """All cells of a report, in the order of a table."""
    return sorted({row.cell for row in report.rows}, key=lambda cell: cell.order)
