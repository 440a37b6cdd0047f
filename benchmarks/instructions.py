"""Instructions per request of two source trees, BEFORE and this one: does what a disk does not use cost nothing?

    git worktree add --detach /tmp/before COMMIT
    python benchmarks/instructions.py /tmp/before

Times differ by some percent from one start to the next, counts hardly, whatever else the machine does. Virtual machines
often have no counters for perf(1), so the I/O thread is single-stepped (ptrace(2)); a system call is one step. It finds
a number of reads in its ring when it is kicked, and the steps are counted until all of them are used. The figures are
steps per read, of a disk that reads nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
from trees import THIS, commit, serving, table

from ringplane.driver import Driver, Load, run_load
from ringplane.system.notes import in_words

BATCHES, WARM_UP = (1, 8, 64, 200), 20_000

# include/uapi/linux/ptrace.h, include/uapi/linux/wait.h
PTRACE_SINGLESTEP, PTRACE_SEIZE, PTRACE_INTERRUPT = 9, 0x4206, 0x4207
WALL = 0x40000000

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def ptrace(request: int, thread: int) -> None:
    if libc.ptrace(request, thread, None, None):
        error = OSError(ctypes.get_errno(), "")
        raise click.ClickException(f"the I/O thread cannot be traced: {in_words(error)}")


@contextlib.contextmanager
def driving(tree: Path) -> Iterator[Driver]:
    """A driver of a process that runs from the sources of a tree, and does not poll before it sleeps."""
    with tempfile.TemporaryDirectory() as folder:
        socket = f"{folder}/disk.sock"
        options = ["--blk-file", f"{folder}/disk.img", "--create", "64M", "--socket-path", socket, "--num-queues", "1"]
        with serving(tree, [*options, "--engine", "null", "--poll-us", "0"]), Driver(socket, timeout=300) as driver:
            yield driver


def count(tree: Path, reads: int) -> float:
    """Instructions per read. The process is ended, and with it the tracing."""
    with contextlib.suppress(ConnectionError), driving(tree) as driver:
        thread = busiest_thread(driver)
        ptrace(PTRACE_SEIZE, thread)
        ptrace(PTRACE_INTERRUPT, thread)
        os.waitpid(thread, WALL)
        counted = step(thread, put(driver, reads)) / reads
        os.kill(driver.backend_pid, signal.SIGKILL)
        os.waitpid(thread, WALL)
    return counted


def busiest_thread(driver: Driver) -> int:
    """The one that serves a load, which also loads all code."""

    def spent() -> dict[int, int]:
        tasks = Path(f"/proc/{driver.backend_pid}/task")
        return {int(each.name): int((each / "schedstat").read_text().split()[0]) for each in tasks.iterdir()}

    before = spent()
    run_load(driver, Load(depth=32, requests=WARM_UP))
    return max(spent().items(), key=lambda item: item[1] - before.get(item[0], 0))[0]


def put(driver: Driver, reads: int) -> Callable[[], bool]:
    """Kick once for all of them; whether all are done."""
    header, data = driver.memory.allocate(64), driver.memory.allocate(512)
    ctypes.memmove(header, struct.pack("<IIQ", 0, 0, 0), 16)
    segments = [(header, 16, False), (data, 512, True), (header + 32, 1, True)]
    tickets = [driver.submit(segments, kick=False) for _ in range(reads)]
    driver.queues[0].kick()

    def done() -> bool:
        driver._reap(driver.queues[0])
        return tickets[-1].used is not None

    return done


def step(thread: int, done: Callable[[], bool]) -> int:
    """How many instructions the thread executes until then."""
    steps = 0
    while not done():
        ptrace(PTRACE_SINGLESTEP, thread)
        os.waitpid(thread, WALL)
        steps += 1
    return steps


@click.command(help=__doc__.replace("\n\n    git", "\n\n\b\n    git"))
@click.argument("before", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--reads", "batches", multiple=True, type=click.IntRange(1, 200), default=BATCHES, show_default=True)
def main(before: Path, batches: Sequence[int]) -> None:
    trees = (before.resolve(), THIS)
    counts = [[count(tree, reads) for reads in batches] for tree in trees]
    lines = [
        [str(reads), f"{then:.1f}", f"{now:.1f}", f"{now / then:.3f}"]
        for reads, then, now in zip(batches, *counts, strict=True)
    ]
    click.echo(table(["reads", *map(commit, trees), "x"], lines))


if __name__ == "__main__":
    main()
