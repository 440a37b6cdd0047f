"""Does a change slow down the hot path? Compares CPU time per I/O and IOPS of two source trees, BEFORE and this one.

    git worktree add --detach /tmp/before COMMIT
    python benchmarks/compare_trees.py /tmp/before --results results.jsonl

Two processes with the same sources differ by 10 % from one start to the next, for as long as they run. So each round
starts both again for each engine, and measures them in turn. A ratio (x) is the median of the rounds' ratios, AFTER
divided by BEFORE; the spread is from the lowest to the highest round. The load is 4 KiB random, 70 % reads, one queue.
The image is on tmpfs, and all front ends use the same memory.

With --also the processes of this tree have more options, so it can be compared with itself:

    python benchmarks/compare_trees.py . --also=--policy=benchmarks/counting.py --engine memory --engine io_uring

All of it takes 20 minutes on two CPUs. With --results, the same command continues where it was stopped, and with
--rounds 0 it prints the table again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from trees import THIS, commit, serving, table

from ringplane.bench.cells import BUSY, DRIVERS, FULL_DEPTHS
from ringplane.bench.console_tables import number
from ringplane.driver import Driver, Load, run_load
from ringplane.driver.frontend import SharedMemory

ENGINES = ("io_uring", "aio", "memory", "null")
SIZE = 256 << 20
# Both trees are measured so many times in each round, for so long, in seconds.
TURNS, SECONDS, WARM_UP = 3, 0.4, 0.15
# A tree is as fast as the other if its CPU time is not above, and its IOPS not below by more than this.
NOISE = 0.03


@dataclass(frozen=True, slots=True)
class Cell:
    engine: str
    driver: str
    depth: int


@dataclass(frozen=True, slots=True)
class Row:
    """A cell in one round: medians of both trees, before and after."""

    trees: tuple[str, str]
    cell: Cell
    cpu_us: tuple[float, float]
    iops: tuple[float, float]


@dataclass
class Results:
    """The rows of these two trees; `path` keeps them for the next run."""

    trees: tuple[str, str]
    path: Path | None
    rows: list[Row]

    def load(self) -> None:
        for line in self.path.read_text().splitlines() if self.path and self.path.exists() else []:
            row = json.loads(line)
            if tuple(row["trees"]) == self.trees:
                self.rows.append(Row(**{**row, "cell": Cell(**row["cell"])}))

    def add(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        if self.path:
            with self.path.open("a") as file:
                file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)

    def rounds(self, cells: Sequence[Cell]) -> int:
        """How many rounds all of these cells have."""
        return min(sum(row.cell == cell for row in self.rows) for cell in cells)


@contextlib.contextmanager
def driving(tree: Path, engine: str, image: Path, memory: SharedMemory, more: Sequence[str]) -> Iterator[Driver]:
    """A driver of a process that runs from the sources of a tree, with more options."""
    with tempfile.TemporaryDirectory() as folder:
        socket = f"{folder}/disk.sock"
        options = ["--blk-file", str(image), "--socket-path", socket, "--engine", engine, "--num-queues", "1"]
        with serving(tree, [*options, "--share-rw", *more]), Driver(socket, queue_size=256, memory=memory) as driver:
            yield driver


def measure(
    trees: Sequence[Path], names: tuple[str, str], cells: Sequence[Cell], image: Path, also: Sequence[str] = ()
) -> list[Row]:
    """One round of these cells, which have the same engine; `also`: more options of the second tree."""
    memory = SharedMemory()
    cpu: dict[tuple[Cell, int], list[float]] = defaultdict(list)
    iops: dict[tuple[Cell, int], list[float]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        drivers = [
            stack.enter_context(driving(tree, cells[0].engine, image, memory, more))
            for tree, more in zip(trees, ((), also), strict=True)
        ]
        for turn, cell in itertools.product(range(TURNS), cells):
            load = Load(
                read_percent=70, depth=cell.depth, busy_poll=cell.driver == BUSY, seconds=SECONDS, warm_up=WARM_UP
            )
            for tree in (0, 1) if turn % 2 else (1, 0):
                result = run_load(drivers[tree], load)
                if result.errors or not result.requests:
                    raise click.ClickException(f"{names[tree]}, {cell}: {result.first_error or 'no request ended'}")
                cpu[cell, tree].append(result.backend_cpu_per_io_us or 0.0)
                iops[cell, tree].append(result.iops)
    return [Row(names, cell, medians(cpu, cell), medians(iops, cell)) for cell in cells]


def medians(taken: dict[tuple[Cell, int], list[float]], cell: Cell) -> tuple[float, float]:
    return statistics.median(taken[cell, 0]), statistics.median(taken[cell, 1])


def figures(pairs: Sequence[tuple[float, float]], worse: float) -> Iterator[str]:
    """Before, after, ratio and spread; the ratio is bold if it is beyond the noise, on this side of 1."""
    ratios = [after / before for before, after in pairs]
    ratio = statistics.median(ratios)
    yield from (number(statistics.median(side), 2) for side in zip(*pairs, strict=True))
    yield f"**{ratio:.3f}**" if (ratio - 1) * worse > NOISE else f"{ratio:.3f}"
    yield f"{min(ratios):.2f}-{max(ratios):.2f}"


def described(results: Results, cells: Sequence[Cell]) -> str:
    lines = []
    for cell in cells:
        rows = [row for row in results.rows if row.cell == cell]
        if rows:
            cpu = figures([row.cpu_us for row in rows], worse=1)
            iops = figures([(row.iops[0] / 1000, row.iops[1] / 1000) for row in rows], worse=-1)
            lines.append([cell.engine, cell.driver, str(cell.depth), str(len(rows)), *cpu, *iops])
    heading = ["engine", "driver", "depth", "rounds"]
    heading += [*("CPU us", "after", "x", "spread"), *("k IOPS", "after", "x", "spread")]
    slower = sum("**" in line[6] for line in lines), sum("**" in line[10] for line in lines)
    return (
        f"{table(heading, lines)}\n\nBefore: {results.trees[0]}, after: {results.trees[1]}. Bold: worse by more than "
        f"{NOISE:.0%}: CPU time per I/O in {slower[0]}, IOPS in {slower[1]} of {len(lines)} cells."
    )


@click.command(help=__doc__.replace("\n\n    ", "\n\n\b\n    "))
@click.argument("before", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--engine", "engines", type=click.Choice(ENGINES), multiple=True, default=ENGINES, show_default=True)
@click.option("--driver", "drivers", type=click.Choice(DRIVERS), multiple=True, default=DRIVERS, show_default=True)
@click.option("--depth", "depths", type=click.IntRange(1), multiple=True, default=FULL_DEPTHS, show_default=True)
@click.option("--rounds", type=click.IntRange(0), default=9, show_default=True, help="Measured before and now.")
@click.option("--minutes", type=float, default=25, show_default=True, help="No round begins that may end later.")
@click.option("--also", multiple=True, help="One more option of the second tree's processes, as --also=--delay=1.")
@click.option("--results", "path", type=click.Path(dir_okay=False, path_type=Path), help="Keeps all rounds.")
def main(
    before: Path,
    engines: tuple[str, ...],
    drivers: tuple[str, ...],
    depths: tuple[int, ...],
    rounds: int,
    minutes: float,
    also: tuple[str, ...],
    path: Path | None,
) -> None:
    results = Results((commit(before), " ".join([commit(THIS), *also])), path, [])
    results.load()
    cells = [Cell(*values) for values in itertools.product(engines, drivers, depths)]
    try:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            image = Path(folder) / "disk.img"
            image.write_bytes(os.urandom(SIZE))
            trees = before.resolve(), THIS
            fill(results, cells, trees, image, rounds, time.monotonic() + minutes * 60, also)
    except KeyboardInterrupt:
        click.echo("interrupted: the table has the complete rounds", err=True)
    click.echo(described(results, cells))


def fill(
    results: Results,
    cells: Sequence[Cell],
    trees: Sequence[Path],
    image: Path,
    rounds: int,
    deadline: float,
    also: Sequence[str] = (),
) -> None:
    """Measure until all cells have these rounds, or until the deadline, by time.monotonic()."""
    longest = 0.0
    for wanted, engine in itertools.product(range(1, rounds + 1), dict.fromkeys(cell.engine for cell in cells)):
        mine = [cell for cell in cells if cell.engine == engine]
        began = time.monotonic()
        if results.rounds(mine) >= wanted:
            continue
        if began + longest > deadline:
            click.echo(f"the time is over in round {wanted} of {rounds}", err=True)
            return
        results.add(measure(trees, results.trees, mine, image, also))
        longest = max(longest, time.monotonic() - began)
        click.echo(f"round {wanted} of {rounds}, {engine}: {time.monotonic() - began:.0f} s", err=True)


if __name__ == "__main__":
    main()
