"""Medians of a report's rows, and ringplane's ratios to the best of the others."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ringplane.bench.cells import BUSY, EVENT, Cell
from ringplane.bench.results import FIO, QSD, RINGPLANE, SOCKET, Report, Row, Storage, Subject

# Rounds that differ by more than this factor are counted as unsteady.
STEADY = 1.25


@dataclass(frozen=True, slots=True)
class Figures:
    """The medians of a cell's rounds, or the best of several back ends in each figure. Latencies and CPU time in us."""

    iops: float
    mb_s: float
    p50_us: float
    p99_us: float
    p999_us: float
    cpu_us: float | None


@dataclass(frozen=True, slots=True)
class Compared:
    """One variant of ringplane (or the back end at a socket) in one cell, and what was measured beside it.

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
        """The best of the others in each figure, each from whichever variant has it; None without any."""
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
    def of(name: str) -> float:
        return float(statistics.median(getattr(row, name) for row in rows))

    cpu = [row.cpu_us for row in rows if row.cpu_us is not None]
    return Figures(
        of("iops"), of("mb_s"), of("p50_us"), of("p99_us"), of("p999_us"), statistics.median(cpu) if cpu else None
    )


def best(figures: Sequence[Figures]) -> Figures | None:
    """The best of each figure: the most IOPS and MB/s, the least latency and CPU time."""
    if not figures:
        return None
    cpu = [each.cpu_us for each in figures if each.cpu_us is not None]
    return Figures(
        iops=max(each.iops for each in figures),
        mb_s=max(each.mb_s for each in figures),
        p50_us=min(each.p50_us for each in figures),
        p99_us=min(each.p99_us for each in figures),
        p999_us=min(each.p999_us for each in figures),
        cpu_us=min(cpu, default=None),
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
    """How many measured cells have a round with more than STEADY times the IOPS of another, and how many there are."""
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
