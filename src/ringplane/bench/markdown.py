"""A report as Markdown tables, written between two marker comments of a file; its other text stays unchanged."""

from __future__ import annotations

import itertools
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from ringplane.bench import files, machine
from ringplane.bench.console_tables import heading, loads, number, rounds_of, steadiness
from ringplane.bench.errors import BenchError
from ringplane.bench.results import QSD, SHORT, Report
from ringplane.bench.summary import Compared, compare
from ringplane.options.sizes import format_size

BEGIN = "<!-- ringplane bench: begin (generated: changes made by hand are lost) -->"
END = "<!-- ringplane bench: end -->"
WIDTH = 100


def write(path: Path, report: Report, section: str = "") -> None:
    """Replace the text between the markers of a file, or create the file; raises BenchError without the markers."""
    before, after = _around(path, section)
    begin, end = markers(section)
    files.write(path, f"{before}{begin}\n\n{render(report)}\n{end}\n{after}")


def check(path: Path, section: str = "") -> None:
    """Raise BenchError unless `write` will succeed; called before measuring."""
    files.check(path)
    _around(path, section)


def markers(section: str) -> tuple[str, str]:
    """The two lines around the tables; a file with several reports has a pair for each section."""
    name = f"{section} " if section else ""
    return BEGIN.replace("(", f"{name}(", 1), END.replace("-->", f"{name}-->")


def _around(path: Path, section: str) -> tuple[str, str]:
    """The text before and after the markers of a file; raises BenchError unless it has exactly one pair of them."""
    begin, end = markers(section)
    if not path.exists():
        return "", ""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path}: cannot be read as text: {error}") from None
    if (text.count(begin), text.count(end)) != (1, 1) or text.index(begin) > text.index(end):
        raise BenchError(f"{path}: needs these two lines; the tables are put between them:\n{begin}\n{end}")
    before, _, rest = text.partition(begin)
    return before, rest.partition(end)[2].removeprefix("\n")


def render(report: Report) -> str:
    """The tables, with a description of the measurement."""
    compared = compare(report)
    parts = []
    for _, group in itertools.groupby(
        sorted(compared, key=lambda at: _position(report, at)), key=lambda at: _position(report, at)[:4]
    ):
        rows = list(group)
        variant = f", {rows[0].subject.name}" if len({at.subject for at in compared}) > 1 else ""
        parts.append(f"### {heading(rows[0].storage, rows[0].cell)}{variant}\n\n" + "\n".join(_table(rows)) + "\n")
    return "\n".join([*parts, *_legend(report, compared)])


def _position(report: Report, at: Compared) -> tuple[int, ...]:
    """The position of a cell: its table, then its line."""
    queues, driver, *line = at.cell.order
    return report.storages.index(at.storage), report.subjects.index(at.subject), queues, driver, *line


def _table(rows: Sequence[Compared]) -> Iterator[str]:
    """One line for each cell."""
    lines = [list(_line(at, others=any(at.others for at in rows), raw=any(at.raw for at in rows))) for at in rows]
    names = [name for name, _ in lines[0]]
    yield "| " + " | ".join(names) + " |"
    yield "|---|" + "---:|" * (len(names) - 1)
    for line in lines:
        yield "| " + " | ".join(text for _, text in line) + " |"


def _line(at: Compared, *, others: bool, raw: bool) -> Iterator[tuple[str, str]]:
    """The cells of a line of the table, each with its column's name."""
    figures, best = at.figures, at.best
    yield "load", at.cell.workload
    yield "depth", str(at.cell.depth)
    yield "k IOPS", number(figures.iops / 1000, 1)
    if others:
        yield SHORT, number(best.iops / 1000 if best else None, 1)
        yield "x", number(at.ratio("iops"), 2)
    yield "CPU us", number(figures.cpu_us, 2)
    if others:
        yield SHORT, number(best.cpu_us if best else None, 2)
        yield "x", number(at.ratio("cpu_us"), 2)
    yield "p50 us", number(figures.p50_us, 1)
    if others:
        yield "x", number(at.ratio("p50_us"), 2)
    yield "p99 us", number(figures.p99_us, 1)
    if raw:
        yield "fio k", number(at.raw.iops / 1000 if at.raw else None, 1)


def _legend(report: Report, compared: Sequence[Compared]) -> Iterator[str]:
    """The meaning of the columns, the settings, and the machine."""
    settings, rounds = report.settings, rounds_of(report)
    yield _wrapped(
        f"{loads(report)} CPU us: CPU time of the back end per request, in microseconds; p50 and p99: latency."
        + _about_others(compared)
        + (" fio k: thousand IOPS of fio on the same storage, without a virtqueue." if any(_raws(compared)) else "")
    )
    sizes = ", ".join(format_size(size) for size in settings.get("disk_sizes", [settings["size"]]))
    medians = f"Medians of {rounds} rounds, each of" if rounds > 1 else "One round of"
    yield _wrapped(
        f"{medians} {settings['seconds']:g} s per cell after {settings['warm_up']:g} s of warm-up; disks of "
        f"{sizes}. {_checked(report)} {' '.join(steadiness(report))}"
    )
    yield _wrapped(f"{machine.sentence(report.machine)}.")
    yield "\n".join(f"    {line}" for line in _command(report.machine["command"])) + "\n"


def _about_others(compared: Sequence[Compared]) -> str:
    if not any(at.others for at in compared):
        return ""
    return (
        f" {SHORT}: the best of {QSD}'s variants in that figure; x: ringplane's figure divided by it. More than 1 is "
        "better for IOPS, less than 1 for CPU time and latency."
    )


def _raws(compared: Sequence[Compared]) -> Iterator[bool]:
    return (at.raw is not None for at in compared)


def _checked(report: Report) -> str:
    if report.problems:
        return f"**WRONG DATA OR FAILED REQUESTS**, {len(report.problems)} times; the first: {report.problems[0]}."
    if not report.sectors_checked:
        return "The data was not checked."
    return f"{report.sectors_checked:,} sectors were read and compared, all correct."


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def _command(command: str) -> list[str]:
    """A command that can be copied into a shell, on as many lines as it needs."""
    lines = _filled([shlex.quote(word) for word in shlex.split(command)])
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _filled(words: Sequence[str]) -> list[str]:
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > WIDTH - 8:
            lines.append(" ")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines
