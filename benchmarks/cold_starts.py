"""What does a start take? Compares cold and warm starts of two source trees, BEFORE and this one, interleaved.

    git worktree add --detach /tmp/before COMMIT
    python benchmarks/cold_starts.py /tmp/before

A cold start finds nothing compiled; the next start with the same cache is a warm one. CPU time (of the process and its
children) and wall time are until `listening on`; PSS is the process's memory then, with its share of pages that it has
in common with others. One more start of each, which is not timed, counts the functions that are compiled.
"""

from __future__ import annotations

import os
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import click
from trees import THIS, commit, serving, table

SIZE = 64 << 20
ENGINES = ("io_uring", "aio", "memory")
ZONED = "--engine io_uring --zoned 16M"
ALL = "all together"
CONFIGURATIONS = {**{name: f"--engine {name}" for name in ENGINES}, "zoned": ZONED, ALL: ""}

TOML = """
[[io-thread]]
name = "uring"
engine = "io_uring"
[[io-thread]]
name = "aio"
engine = "aio"
"""
DISK = """
[[disk]]
image = "{0}.img"
create = "64M"
socket-path = "{0}.sock"
io-threads = ["{1}"]
{2}
"""
DISKS = (
    DISK.format("io_uring", "uring", 'engine = "io_uring"')
    + DISK.format("aio", "aio", 'engine = "aio"')
    + DISK.format("memory", "uring", 'engine = "memory"')
    + DISK.format("zoned", "uring", 'engine = "io_uring"\nzoned = "16M"')
)

# Python runs it at the start of each process: it adds a byte to a file for each function that Numba compiles.
COUNTING = """
import os
from numba.core import event
file = os.open(os.environ["COMPILED"], os.O_WRONLY | os.O_APPEND)
class Count(event.Listener):
    def on_start(self, _): os.write(file, b".")
    def on_end(self, _): pass
event.register("numba:compile", Count())
"""


@dataclass(frozen=True, slots=True)
class Start:
    cpu: float  # seconds
    wall: float  # seconds
    pss: float  # MB


def start(tree: Path, configuration: str, folder: Path, environment: dict[str, str]) -> Start:
    """Start a process in a folder that may have a cache of an earlier start."""
    disks, options = 1, ["--blk-file", f"{folder}/disk.img", "--create", str(SIZE), "--socket-path", f"{folder}/sock"]
    options += CONFIGURATIONS[configuration].split()
    if configuration == ALL:
        disks, options = DISKS.count("[[disk]]"), ["--config", f"{folder}/disks.toml"]
        Path(folder, "disks.toml").write_text(TOML + DISKS)
    Path(folder, "cache").mkdir(exist_ok=True)
    began = time.monotonic()
    caches = {"RINGPLANE_CACHE_DIR": f"{folder}/cache", "XDG_CACHE_HOME": f"{folder}/cache"}
    with serving(tree, options, disks, {**environment, **caches}) as pid:
        wall = time.monotonic() - began
        # utime, stime, and those of children that were waited for, in ticks (proc(5))
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        cpu = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        pss = re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        assert pss
        return Start(cpu, wall, int(pss[1]) * 1024 / 1e6)


def cold_and_warm(tree: Path, configuration: str) -> tuple[Start, Start]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        cold, warm = (start(tree, configuration, Path(folder), {}) for _ in range(2))
        return cold, warm


def compiled_functions(tree: Path, configuration: str) -> tuple[int, int]:
    """How many functions a cold and then a warm start compile, in all their processes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        count = Path(folder, "compiled")
        count.touch()
        Path(folder, "sitecustomize.py").write_text(COUNTING)
        # ringplane sets the last one before NumPy is imported, because confinement wants no earlier threads.
        environment = {"PYTHONPATH": folder, "COMPILED": str(count), "OPENBLAS_NUM_THREADS": "1"}
        sizes = [0]
        for _ in range(2):
            start(tree, configuration, Path(folder), environment)
            sizes.append(count.stat().st_size)
        return sizes[1], sizes[2] - sizes[1]


def median(starts: Iterable[Start]) -> list[float]:
    return [statistics.median(values) for values in zip(*map(astuple, starts), strict=True)]


def lines(
    name: str, trees: Sequence[Path], taken: dict[tuple[str, Path], list[tuple[Start, Start]]]
) -> list[list[str]]:
    """The lines of a configuration: medians of both trees, and the ratio of the medians."""
    functions = [compiled_functions(tree, name) for tree in trees]
    result = []
    for position, kind in enumerate(("cold", "warm")):
        line = [f"{name}, {kind}", *(str(counts[position]) for counts in functions)]
        sides = [median(starts[position] for starts in taken[name, tree]) for tree in trees]
        for decimals, before, after in zip((2, 2, 1), *sides, strict=True):
            line += [f"{before:.{decimals}f}", f"{after:.{decimals}f}", f"{after / before:.2f}"]
        result.append(line)
    return result


@click.command(help=__doc__.replace("\n\n    git", "\n\n\b\n    git"))
@click.argument("before", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--only", type=click.Choice(list(CONFIGURATIONS)), multiple=True, default=list(CONFIGURATIONS))
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
def main(before: Path, only: tuple[str, ...], rounds: int) -> None:
    trees = before.resolve(), THIS
    taken: dict[tuple[str, Path], list[tuple[Start, Start]]] = defaultdict(list)
    for number in range(rounds):
        for configuration in only:
            for tree in trees if number % 2 == 0 else trees[::-1]:
                taken[configuration, tree].append(cold_and_warm(tree, configuration))
        click.echo(f"round {number + 1} of {rounds}", err=True)
    figures = ("CPU s", "wall s", "PSS MB")
    heading = ["start", "functions", "after", *(text for name in figures for text in (name, "after", "x"))]
    rows = [line for name in only for line in lines(name, trees, taken)]
    click.echo(
        f"{table(heading, rows)}\n\nBefore: {commit(before)}, after: {commit(THIS)}; rounds: {rounds} (medians)."
    )


if __name__ == "__main__":
    main()
