"""Does a change slow down the hot path? Compares CPU per I/O of two source trees, an earlier one and this one.

    git worktree add /tmp/before COMMIT --detach
    python benchmarks/compare_trees.py /tmp/before

Two processes with the same sources differ by 10 % from one start to the next, for as long as they run. So each round
starts both again and measures them in turn; the result is the median of the rounds' ratios. The image is on tmpfs, and
all front ends use the same memory.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from ringplane.driver import Driver, Load, run_load
from ringplane.driver.frontend import SharedMemory

THIS = Path(__file__).resolve().parent.parent
SIZE = 256 << 20
TURNS = 7


@contextlib.contextmanager
def served(tree: Path, engine: str, image: Path, memory: SharedMemory) -> Iterator[Driver]:
    """A driver of a ringplane process that runs from the sources of a tree."""
    socket = image.with_name(f"{tree.name}.sock")
    command = [sys.executable, "-m", "ringplane", "serve", "--blk-file", str(image), "--socket-path", str(socket)]
    command += ["--engine", engine, "--num-queues", "1", "--share-rw", "--log-level", "warning"]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        while "listening" not in process.stdout.readline():
            if process.poll() is not None:
                sys.exit(f"{tree}: ringplane ended with status {process.returncode}")
        with Driver(socket, queue_size=256, memory=memory) as driver:
            yield driver
    finally:
        process.terminate()
        process.wait()


def round_of(trees: list[Path], engine: str, depths: Sequence[int], image: Path, memory: SharedMemory) -> list[float]:
    """For each depth: CPU per I/O of the second tree divided by that of the first."""
    taken: dict[tuple[Path, int], list[float]] = {}
    with contextlib.ExitStack() as stack:
        drivers = {tree: stack.enter_context(served(tree, engine, image, memory)) for tree in trees}
        for turn in range(TURNS):
            for depth in depths:
                load = Load(pattern="random", read_percent=70, depth=depth, queues=1, seconds=0.4, warm_up=0.15)
                for tree in trees if turn % 2 else trees[::-1]:
                    cpu = run_load(drivers[tree], load).backend_cpu_per_io_us
                    taken.setdefault((tree, depth), []).append(cpu or 0.0)
    before, after = trees
    return [statistics.median(taken[after, depth]) / statistics.median(taken[before, depth]) for depth in depths]


@click.command(help=__doc__)
@click.argument("before", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--engine", type=click.Choice(["io_uring", "aio", "memory"]), default="io_uring", show_default=True)
@click.option("--depth", "depths", type=int, multiple=True, default=(8, 32, 128), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
def main(before: Path, engine: str, depths: tuple[int, ...], rounds: int) -> None:
    memory = SharedMemory()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        image = Path(folder) / "disk.img"
        image.write_bytes(os.urandom(SIZE))
        found = [round_of([before.resolve(), THIS], engine, depths, image, memory) for _ in range(rounds)]
    for depth, ratios in zip(depths, zip(*found, strict=True), strict=True):
        listed = " ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
        click.echo(f"{engine} depth {depth}: {statistics.median(ratios):.3f} x CPU per I/O ({listed})")


if __name__ == "__main__":
    main()
