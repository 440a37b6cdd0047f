"""The cost of each stage of the data plane's loop, in nanoseconds per request.

    python benchmarks/stages.py --place /dev/shm

The loop of `ringplane.dataplane.loop.run` is compiled again with a clock reading after each of its statements, which
are the stages, and the worker's thread runs that. Everything else is real: a worker, a socket, and a driver on the
other core that polls the ring. The cost of reading the clock is subtracted. The data plane is compiled for each
measurement, which takes some seconds.
"""

from __future__ import annotations

import ast
import inspect
import statistics
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import click
import numba
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

import ringplane
from ringplane.bench import machine
from ringplane.compiler.jit import Whole
from ringplane.dataplane import loop
from ringplane.dataplane import worker as worker_module
from ringplane.driver import Driver, Load, run_load
from ringplane.native.access import load64, store64
from ringplane.native.syscalls import monotonic_ns

ENGINES = ("null", "memory", "io_uring", "aio")
MAX_STAGES = 32
CLOCK_LOOKS = 100_000
MIB = 1 << 20


def stage_name(statement: ast.stmt) -> str:
    """The name of a statement: the last function that it calls."""
    calls = [node.func.id for node in ast.walk(statement) if isinstance(node, ast.Call)]
    return str(calls[-1]) if calls else ast.unparse(statement)


def timed_loop(laps: int) -> tuple[Callable[[int], None], list[str]]:
    """`run`, with the time of each statement of its loop added up at address `laps`, and the statements' names."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(loop.run)))
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    function.decorator_list = []
    (body,) = [node for node in function.body if isinstance(node, ast.While)]
    names: list[str] = []
    timed: list[ast.stmt] = ast.parse("lap = look(0, -1)").body
    for statement in body.body:
        timed += [statement, *ast.parse(f"lap = look(lap, {len(names)})").body]
        names.append(stage_name(statement))
    body.body = timed

    @numba.njit(nogil=True)
    def look(since, stage):
        now = monotonic_ns()
        if stage >= 0:
            store64(laps + 8 * stage, load64(laps + 8 * stage) + now - since)
            store64(laps + 8 * (MAX_STAGES + stage), load64(laps + 8 * (MAX_STAGES + stage)) + 1)
        return now

    space = {**vars(loop), "look": look}
    exec(compile(ast.unparse(tree), "timed loop", "exec"), space)
    return Whole(space["run"], saved=False), names


@numba.njit(nogil=True)
def look_often(count):
    begin = monotonic_ns()
    for _ in range(count):
        end = monotonic_ns()
    return end - begin


def fill(image: IO[bytes], size: int) -> str:
    """Write an image without holes; returns its path."""
    for _ in range(size // MIB):
        image.write(bytes(MIB))
    image.flush()
    return image.name


def measure(place: Path, size: int, engine: str, block_size: int, depth: int, seconds: float) -> dict[str, float]:
    """Nanoseconds per request in each stage and in total; the image of `size` bytes is in the folder `place`."""
    laps: npt.NDArray[np.int64] = np.zeros(2 * MAX_STAGES, np.int64)
    worker_module.run, names = timed_loop(int(laps.ctypes.data))
    with (
        tempfile.TemporaryDirectory(prefix="ringplane-") as folder,
        tempfile.NamedTemporaryFile(prefix="ringplane-", dir=place) as image,
        ringplane.serve(fill(image, size), Path(folder, "socket"), engine=engine, num_queues=1) as export,
        Driver(Path(folder, "socket")) as disk,
    ):
        load = Load(depth=depth, block_size=block_size, seconds=seconds, busy_poll=True)
        run_load(disk, load)
        before, requests = laps.copy(), export.counters["read"].requests
        run_load(disk, load)
        spent, requests = laps - before, export.counters["read"].requests - requests
    clock = look_often(CLOCK_LOOKS) / CLOCK_LOOKS
    found: dict[str, float] = defaultdict(float)
    for number, name in enumerate(names):
        found[name] += float(max(0.0, spent[number] - clock * spent[MAX_STAGES + number])) / requests
    found["all"] = sum(found.values())
    return found


@click.command()
@click.option("--place", type=Path, default=Path("/dev/shm"), show_default=True, help="A folder for the image.")
@click.option("--engine", "engines", type=click.Choice(ENGINES), multiple=True, default=ENGINES, show_default=True)
@click.option("--size", "size_mib", type=click.IntRange(1), default=1024, show_default=True, help="In MiB.")
@click.option("--depth", type=click.IntRange(1, 1024), default=128, show_default=True)
@click.option("--block-size", type=click.IntRange(512), default=4096, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.05), default=0.5, show_default=True)
def main(
    place: Path, engines: Sequence[str], size_mib: int, depth: int, block_size: int, rounds: int, seconds: float
) -> None:
    """Measure random reads, interleaved, and print the medians."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(rounds):
        for engine in engines if number % 2 == 0 else engines[::-1]:
            found[engine].append(measure(place, size_mib * MIB, engine, block_size, depth, seconds))
    click.echo(machine.sentence(machine.describe()))
    shown = Table(box=None)
    shown.add_column("stage")
    for engine in engines:
        shown.add_column(engine, justify="right")
    for stage in found[engines[0]][0]:
        medians = (statistics.median(each[stage] for each in found[engine]) for engine in engines)
        shown.add_row(stage, *(f"{value:.0f}" for value in medians))
    Console(width=120).print(shown)


if __name__ == "__main__":
    main()
