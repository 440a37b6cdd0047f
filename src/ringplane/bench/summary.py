"""Medians of a report's rows, ratios of ringplane to the best of the others, and how many cells meet the targets."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ringplane.bench.cells import BUSY, EVENT, Cell
from ringplane.bench.results import FIO, QSD, RINGPLANE, SOCKET, Report, Row, Storage, Subject
from ringplane.dataplane.worker import POLL_US

# Rounds that differ by more than this factor are worth a remark.
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
    """One variant of ringplane (or who listens at a socket) in one cell, beside what else was measured there.

    `best` has the best of qemu-storage-daemon's figures, each of whichever variant has it; `best_name` is the one with
    the most IOPS. None where nothing was measured.
    """

    storage: Storage
    cell: Cell
    subject: Subject
    figures: Figures
    best: Figures | None
    best_name: str | None
    threads: Figures | None  # qemu-storage-daemon with aio=threads
    raw: Figures | None

    def ratio(self, name: str) -> float | None:
        """ringplane's figure in proportion to the best of the others."""
        return proportion(getattr(self.figures, name), getattr(self.best, name) if self.best else None)

    def __str__(self) -> str:
        return f"{self.storage.name}: {self.cell}"


def proportion(ours: float | None, theirs: float | None) -> float | None:
    """`ours` / `theirs`, if both are there."""
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
            fastest = max(others, key=lambda subject: others[subject].iops, default=None)
            threads = next((each for subject, each in others.items() if "threads" in subject.flags), None)
            # Raw fio is measured with the first driver only, and is the same limit for the other.
            raw = _raw(report, found, storage, cell)
            for subject, figures in here.items():
                if subject.family in (RINGPLANE, SOCKET):
                    name = fastest.name if fastest else None
                    over = best(list(others.values()))
                    compared.append(Compared(storage, cell, subject, figures, over, name, threads, raw))
    return compared


def unsteady(rows: Iterable[Row]) -> tuple[int, int]:
    """How many cells (of a subject) have a round with more than STEADY times the IOPS of another; and of how many."""
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


# Targets


@dataclass(frozen=True, slots=True)
class Target:
    """What shall hold in the cells that `applies` picks: a ratio of at least (or at most) `limit`."""

    number: int
    text: str
    limit: float
    at_least: bool
    applies: Callable[[Compared], bool]
    ratio: Callable[[Compared], float | None]

    def holds(self, ratio: float) -> bool:
        """Whether a ratio is good enough, to the two decimals that are shown."""
        return round(ratio, 2) >= self.limit if self.at_least else round(ratio, 2) <= self.limit


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far one variant of ringplane meets a target: cells that do, and those that do not, the worst first."""

    target: Target
    subject: Subject
    held: int
    missed: list[tuple[Compared, float]]

    @property
    def total(self) -> int:
        return self.held + len(self.missed)


def _engine(subject: Subject) -> str:
    """The engine that a variant was told to use, or auto."""
    return subject.option("--engine") or "auto"


def _polls(subject: Subject) -> bool:
    """Whether a variant may poll before it sleeps: as it was told, or as `ringplane serve` does by default."""
    told = subject.option("--poll-us", "--poll")
    return POLL_US != 0 if told is None else told not in ("0", "never", "off")


def _deep_on_tmpfs(compared: Compared, driver: str) -> bool:
    return compared.storage.kind == "tmpfs" and compared.cell.depth >= 32 and compared.cell.driver == driver


def _over_threads(compared: Compared) -> float | None:
    return proportion(compared.figures.iops, compared.threads.iops if compared.threads else None)


def _over_raw(compared: Compared) -> float | None:
    return proportion(compared.figures.iops, compared.raw.iops if compared.raw else None)


TARGETS = (
    Target(1, "IOPS, every cell", 1.0, True, lambda at: True, lambda at: at.ratio("iops")),
    Target(
        1, "IOPS, tmpfs, depth 32 and up, event-driven, engine aio", 1.4, True,
        lambda at: _deep_on_tmpfs(at, EVENT) and _engine(at.subject) == "aio", lambda at: at.ratio("iops"),
    ),
    Target(
        1, "IOPS, tmpfs, depth 32 and up, event-driven, default engine", 2.2, True,
        lambda at: _deep_on_tmpfs(at, EVENT) and _engine(at.subject) == "auto", lambda at: at.ratio("iops"),
    ),
    Target(
        1, "IOPS over its aio=threads, tmpfs, depth 32 and up, event-driven", 5.0, True,
        lambda at: _deep_on_tmpfs(at, EVENT), _over_threads,
    ),
    Target(
        1, "IOPS, tmpfs, depth 32 and up, busy-polling", 1.5, True,
        lambda at: _deep_on_tmpfs(at, BUSY), lambda at: at.ratio("iops"),
    ),
    Target(2, "CPU per I/O, depth 8 and up", 0.6, False, lambda at: at.cell.depth >= 8, lambda at: at.ratio("cpu_us")),
    Target(
        2, "CPU per I/O, tmpfs, depth 128", 0.5, False,
        lambda at: at.storage.kind == "tmpfs" and at.cell.depth == 128, lambda at: at.ratio("cpu_us"),
    ),
    Target(
        3, "p50, depth 1, without polling", 1.0, False,
        lambda at: at.cell.depth == 1 and not _polls(at.subject), lambda at: at.ratio("p50_us"),
    ),
    Target(
        3, "p50, depth 1, with polling", 0.5, False,
        lambda at: at.cell.depth == 1 and _polls(at.subject), lambda at: at.ratio("p50_us"),
    ),
    Target(
        4, "IOPS over raw fio, depth 32 and up, image on a disk", 0.95, True,
        lambda at: at.storage.kind == "disk" and at.cell.depth >= 32, _over_raw,
    ),
)  # fmt: skip


def outcomes(compared: Sequence[Compared]) -> list[Outcome]:
    """How far each variant of ringplane meets each target that has cells here."""
    found = []
    for target in TARGETS:
        for subject in dict.fromkeys(at.subject for at in compared):
            mine = [at for at in compared if at.subject == subject and target.applies(at)]
            ratios = [(at, ratio) for at in mine if (ratio := target.ratio(at)) is not None]
            missed = [(at, ratio) for at, ratio in ratios if not target.holds(ratio)]
            missed.sort(key=lambda pair: pair[1], reverse=not target.at_least)
            if ratios:
                found.append(Outcome(target, subject, len(ratios) - len(missed), missed))
    return found
