"""What tracing costs: CPU time and instructions per I/O while nobody traces, and while somebody does.

    python benchmarks/tracing.py

One process of this tree with an API for each round and engine. It is measured without a trace, with one whose stream is
read and dropped, and so on in turn. CPU time is that of the whole process, the reading of events and their stream
included; `I/O thread` is the part of the thread that serves the disk. A ratio (x) is the median of the rounds' ratios.
Instructions are those of the I/O thread, in user mode, counted by perf(1) where it can. `lost` are events. The load is
4 KiB random reads on one queue of an image on tmpfs.

The same without a trace for another tree: compare_trees.py. All of it takes 4 minutes on two CPUs.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from trees import THIS, serving, table

from ringplane.bench.console_tables import number
from ringplane.client.client import Client
from ringplane.client.trace_receiver import Receiver
from ringplane.driver import Driver, Load, run_load

ENGINES = ("memory", "io_uring", "null")
DEPTHS = (1, 32, 128)
SIZE = 256 << 20
# Short ones in turn, because the machine changes meanwhile.
SECONDS, WARM_UP = 0.6, 0.15
TURNS = 3


@dataclass(frozen=True, slots=True)
class Cell:
    engine: str
    depth: int
    busy: bool


@dataclass(frozen=True, slots=True)
class Taken:
    """One measurement; times in microseconds per I/O, instructions per I/O (0: unknown), and events lost."""

    cpu: float
    thread: float
    instructions: float
    iops: float
    lost: int


class Dropping(Receiver):
    """Reads a trace, and keeps only how many events were lost."""

    def keep(self, block: object) -> None:
        pass


@contextlib.contextmanager
def tracing(api: Path | None) -> Iterator[Dropping | None]:
    if api is None:
        yield None
        return
    client = Client(api)
    receiver = Dropping(client, client.send("POST", "/v1/trace"), 1 << 62)
    try:
        yield receiver
    finally:
        receiver.stop()


class Instructions:
    """Counts those of a thread while it is entered."""

    def __init__(self, tid: int) -> None:
        command = ["perf", "stat", "-x,", "-e", "instructions:u", "-t", str(tid)]
        try:
            self._perf = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        except FileNotFoundError:
            self._perf = None

    def end(self) -> int:
        if self._perf is None:
            return 0
        self._perf.send_signal(2)
        _, text = self._perf.communicate()
        found = re.search(r"^(\d+),", text, re.MULTILINE)
        return int(found[1]) if found else 0


def io_thread(pid: int) -> int:
    """The ID of the I/O thread."""
    names = {int(path.parent.name): path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/comm")}
    return next(tid for tid, name in names.items() if name.startswith("ringplane-io"))


def thread_us(pid: int, tid: int) -> float:
    return int(Path(f"/proc/{pid}/task/{tid}/schedstat").read_text().split()[0]) / 1000


def measure(pid: int, driver: Driver, cell: Cell, api: Path | None) -> Taken:
    load = Load(depth=cell.depth, busy_poll=cell.busy, seconds=SECONDS)
    run_load(driver, Load(depth=cell.depth, busy_poll=cell.busy, seconds=WARM_UP))
    tid = io_thread(pid)
    with tracing(api) as receiver:
        counting, before = Instructions(tid), thread_us(pid, tid)
        result = run_load(driver, load)
        spent, instructions = thread_us(pid, tid) - before, counting.end()
    if result.errors or not result.requests:
        raise click.ClickException(f"{cell}: {result.first_error or 'no request ended'}")
    lost = receiver.recorded.lost if receiver else 0
    cpu = result.backend_cpu_per_io_us or 0.0
    return Taken(cpu, spent / result.requests, instructions / result.requests, result.iops, lost)


def one_round(engine: str, cells: Sequence[Cell], image: Path) -> Iterator[tuple[Cell, bool, Taken]]:
    with tempfile.TemporaryDirectory() as folder:
        socket, api = f"{folder}/disk.sock", Path(folder, "api.sock")
        options = ["--blk-file", str(image), "--socket-path", socket, "--engine", engine, "--num-queues", "1"]
        with serving(THIS, [*options, "--api-socket", str(api)]) as pid, Driver(socket, queue_size=256) as driver:
            for turn in range(TURNS):
                for cell in cells:
                    for traced in (False, True) if turn % 2 else (True, False):
                        yield cell, traced, measure(pid, driver, cell, api if traced else None)


def lines(taken: dict[tuple[Cell, bool], list[Taken]], cells: Sequence[Cell]) -> Iterator[list[str]]:
    for cell in cells:
        off, on = taken[cell, False], taken[cell, True]
        yield [
            cell.engine, "busy" if cell.busy else "event", str(cell.depth),
            *figures([(a.cpu, b.cpu) for a, b in zip(off, on, strict=True)]),
            *figures([(a.thread, b.thread) for a, b in zip(off, on, strict=True)]),
            *figures([(a.instructions, b.instructions) for a, b in zip(off, on, strict=True)]),
            *figures([(a.iops / 1000, b.iops / 1000) for a, b in zip(off, on, strict=True)]),
            str(sum(each.lost for each in on)),
        ]  # fmt: skip


def figures(pairs: Sequence[tuple[float, float]]) -> list[str]:
    """Off, on, ratio."""
    sides = [statistics.median(side) for side in zip(*pairs, strict=True)]
    if not all(first for first, _ in pairs):
        return ["-", "-", "-"]
    return [*(number(side, 2) for side in sides), f"{statistics.median(on / off for off, on in pairs):.3f}"]


@click.command(help=__doc__.replace("\n\n    python", "\n\n\b\n    python"))
@click.option("--engine", "engines", type=click.Choice(ENGINES), multiple=True, default=ENGINES, show_default=True)
@click.option("--depth", "depths", type=click.IntRange(1), multiple=True, default=DEPTHS, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True)
def main(engines: Sequence[str], depths: Sequence[int], rounds: int) -> None:
    taken: dict[tuple[Cell, bool], list[Taken]] = defaultdict(list)
    cells = [Cell(engine, depth, busy) for engine in engines for busy in (False, True) for depth in depths]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        image = Path(folder) / "disk.img"
        image.write_bytes(os.urandom(SIZE))
        for turn in range(rounds):
            for engine in engines:
                for cell, traced, one in one_round(engine, [each for each in cells if each.engine == engine], image):
                    taken[cell, traced].append(one)
            click.echo(f"round {turn + 1} of {rounds}", err=True)
    heading = ["engine", "driver", "depth", *("CPU us", "on", "x"), *("I/O thread us", "on", "x")]
    heading += [*("instructions", "on", "x"), *("k IOPS", "on", "x"), "lost"]
    click.echo(table(heading, list(lines(taken, cells))))


if __name__ == "__main__":
    main()
