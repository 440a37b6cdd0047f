"""How far a report of `ringplane bench` meets the targets that this project has set itself.

    ringplane bench --against qemu-storage-daemon --full --json report.json /dev/shm
    python benchmarks/targets.py report.json

A target is a ratio of a figure of ringplane to the best of qemu-storage-daemon's, or to raw fio's, in some cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from ringplane.bench.cells import BUSY, EVENT
from ringplane.bench.errors import BenchError
from ringplane.bench.results import Subject, load
from ringplane.bench.summary import Compared, compare, proportion
from ringplane.options.thread_options import POLL_US


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio of at least (or at most) `limit` in the cells that `applies` picks."""

    text: str
    limit: float
    at_least: bool
    applies: Callable[[Compared], bool]
    ratio: Callable[[Compared], float | None]

    def holds(self, ratio: float) -> bool:
        """Whether a ratio is good enough, to the two decimals that are printed."""
        return round(ratio, 2) >= self.limit if self.at_least else round(ratio, 2) <= self.limit

    def __str__(self) -> str:
        return f"{self.text}: {'at least' if self.at_least else 'at most'} {self.limit:g} x"


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
    """The engine that a variant was started with, or auto."""
    return subject.option("--engine") or "auto"


def _polls(subject: Subject) -> bool:
    """Whether a variant may poll before it sleeps."""
    chosen = subject.option("--poll-us")
    return POLL_US != 0 if chosen is None else chosen != "0"


def _is_local(at: Compared) -> bool:
    return at.storage.kind not in ("nbd", "rbd")


def _deep_on_tmpfs(at: Compared, driver: str) -> bool:
    return at.storage.kind == "tmpfs" and at.cell.depth >= 32 and at.cell.driver == driver


def _over_threads(at: Compared) -> float | None:
    threads = next((each for subject, each in at.others.items() if "threads" in subject.flags), None)
    return proportion(at.figures.iops, threads.iops if threads else None)


def _over_raw(at: Compared) -> float | None:
    return proportion(at.figures.iops, at.raw.iops if at.raw else None)


TARGETS = (
    Target("IOPS, every cell", 1.0, True, lambda at: True, lambda at: at.ratio("iops")),
    Target(
        "IOPS, tmpfs, depth 32 and up, event-driven, engine aio", 1.4, True,
        lambda at: _deep_on_tmpfs(at, EVENT) and _engine(at.subject) == "aio", lambda at: at.ratio("iops"),
    ),
    Target(
        "IOPS, tmpfs, depth 32 and up, event-driven, default engine", 2.2, True,
        lambda at: _deep_on_tmpfs(at, EVENT) and _engine(at.subject) == "auto", lambda at: at.ratio("iops"),
    ),
    Target(
        "IOPS over its aio=threads, tmpfs, depth 32 and up, event-driven", 5.0, True,
        lambda at: _deep_on_tmpfs(at, EVENT), _over_threads,
    ),
    Target(
        "IOPS, tmpfs, depth 32 and up, busy-polling", 1.5, True,
        lambda at: _deep_on_tmpfs(at, BUSY), lambda at: at.ratio("iops"),
    ),
    Target(
        "CPU per I/O, depth 8 and up", 0.6, False,
        lambda at: _is_local(at) and at.cell.depth >= 8, lambda at: at.ratio("cpu_us"),
    ),
    Target("CPU per I/O, NBD", 0.45, False, lambda at: at.storage.kind == "nbd", lambda at: at.ratio("cpu_us")),
    Target("CPU per I/O, RBD", 0.75, False, lambda at: at.storage.kind == "rbd", lambda at: at.ratio("cpu_us")),
    Target(
        "CPU per I/O, tmpfs, depth 128", 0.5, False,
        lambda at: at.storage.kind == "tmpfs" and at.cell.depth == 128, lambda at: at.ratio("cpu_us"),
    ),
    Target(
        "p50, depth 1, without polling", 1.0, False,
        lambda at: _is_local(at) and at.cell.depth == 1 and not _polls(at.subject), lambda at: at.ratio("p50_us"),
    ),
    Target(
        "p50, depth 1, with polling", 0.5, False,
        lambda at: _is_local(at) and at.cell.depth == 1 and _polls(at.subject), lambda at: at.ratio("p50_us"),
    ),
    Target(
        "IOPS over raw fio, depth 32 and up, image on a disk", 0.95, True,
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


@click.command()
@click.argument("report", type=Path)
def main(report: Path) -> None:
    """Print how far a REPORT (a --json FILE of `ringplane bench`) meets the targets, and the cells that do not."""
    try:
        compared = compare(load(report))
    except BenchError as error:
        raise click.ClickException(str(error)) from None
    for outcome in outcomes(compared):
        click.echo(f"{outcome.target} ({outcome.subject.name}): in {outcome.held} of {outcome.total}")
        for at, ratio in outcome.missed:
            click.echo(f"    {ratio:5.2f} x  {at}")


if __name__ == "__main__":
    main()
