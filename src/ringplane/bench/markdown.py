"""A report as Markdown tables, put between two marker comments of a file whose other text is left alone."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from ringplane.bench import machine
from ringplane.bench.cells import WORKLOADS
from ringplane.bench.errors import BenchError
from ringplane.bench.results import QSD, Report
from ringplane.bench.summary import Compared, Outcome, compare, outcomes
from ringplane.bench.tables import heading, limit, noise, number

BEGIN = "<!-- ringplane bench: begin (generated; what is written here by hand is lost) -->"
END = "<!-- ringplane bench: end -->"


def write(path: Path, report: Report) -> None:
    """Replace what is between the markers of a file, or make the file; raises BenchError without the markers."""
    generated = f"{BEGIN}\n\n{render(report)}\n{END}\n"
    if path.exists():
        text = path.read_text()
        check(path)
        before, _, rest = text.partition(BEGIN)
        generated = before + generated + rest.partition(END)[2].removeprefix("\n")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(generated)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check(path: Path) -> None:
    """Raise BenchError if a file exists and has not exactly one pair of markers: before anything is measured."""
    if not path.exists():
        if not path.parent.is_dir():
            raise BenchError(f"{path}: there is no folder {path.parent}")
        return
    text = path.read_text()
    if (text.count(BEGIN), text.count(END)) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise BenchError(f"{path}: has not these two lines, between which the tables go:\n{BEGIN}\n{END}")


def render(report: Report) -> str:
    """The machine, the tables and the targets."""
    compared = compare(report)
    settings = report.settings
    parts = [
        f"{machine.sentence(report.machine)}.\n",
        f"    {report.machine['command']}\n",
        f"Medians of {settings['rounds']} rounds of {settings['seconds']:g} s after "
        f"{settings['warm_up']:g} s of warm-up, "
        f"images of {settings['size'] / 2**20:.0f} MiB. {_checked(report)} {noise(report).capitalize()}.\n",
    ]
    if any(each.family == QSD for each in report.subjects):
        parts.append(_targets(outcomes(compared)))
    for (storage, _, _), group in itertools.groupby(
        compared, key=lambda at: (at.storage, at.cell.queues, at.cell.driver)
    ):
        rows = list(group)
        parts.append(f"### {heading(storage, rows[0].cell)}\n\n" + "\n".join(_table(rows)) + "\n")
    return "\n".join(parts)


def _checked(report: Report) -> str:
    if report.problems:
        return f"**WRONG DATA OR FAILED REQUESTS**, {len(report.problems)} times; the first: {report.problems[0]}."
    return f"{report.sectors_checked:,} sectors were read and compared: no mismatch, no error."


def _targets(found: list[Outcome]) -> str:
    lines = ["| target | back end | holds in | not in (ratio) |", "|---|---|---|---|"]
    for outcome in found:
        target = outcome.target
        missed = "; ".join(f"{at} ({ratio:.2f})" for at, ratio in outcome.missed)
        lines.append(
            f"| {target.number}. {target.text}: {limit(outcome)} | {outcome.subject.name} | "
            f"{outcome.held} of {outcome.total} | {missed} |"
        )
    return "\n".join(lines) + "\n"


def _table(rows: list[Compared]) -> Iterator[str]:
    """One line for each cell and variant of ringplane; x is its figure over the best of the others."""
    several = len({at.subject for at in rows}) > 1
    raw = any(at.raw for at in rows)
    names = ["workload", "depth", *(["back end"] if several else [])]
    names += ["k IOPS", "x", "MB/s", "p50 us", "x", "p99 us", "x", "p99.9 us", "x", "CPU us", "x", "best of the others"]
    names += ["raw fio k IOPS"] if raw else []
    yield "| " + " | ".join(names) + " |"
    left = 3 if several else 2
    yield "|" + "---|" * left + "---:|" * (len(names) - left - (2 if raw else 1)) + "---|" + ("---:|" if raw else "")
    for at in rows:
        figures = at.figures
        values = [WORKLOADS[at.cell.workload].title, str(at.cell.depth), *([at.subject.name] if several else [])]
        values += [
            number(figures.iops / 1000, 1), number(at.ratio("iops"), 2),
            number(figures.mb_s, 0),
            number(figures.p50_us, 1), number(at.ratio("p50_us"), 2),
            number(figures.p99_us, 1), number(at.ratio("p99_us"), 2),
            number(figures.p999_us, 1), number(at.ratio("p999_us"), 2),
            number(figures.cpu_us, 2), number(at.ratio("cpu_us"), 2),
            _others(at),
        ]  # fmt: skip
        values += [number(at.raw.iops / 1000, 1) if at.raw else ""] if raw else []
        yield "| " + " | ".join(values) + " |"


def _others(at: Compared) -> str:
    """The one with the most IOPS, and how many."""
    if at.best is None or at.best_name is None:
        return ""
    return f"{at.best_name.removeprefix(QSD).strip()} {at.best.iops / 1000:.1f}"
