"""What does a policy cost, beside a filter of nbdkit? IOPS, latency and CPU time per I/O of a disk in memory.

    python benchmarks/policy_filters.py

Each row is a fault and a depth. The disk is in memory, and is served in three ways:

  ringplane  an image on tmpfs, engine memory, with a policy
  qsd        nbdkit's plugin `memory` with a filter, exported by qemu-storage-daemon over vhost-user-blk
  nbd        the same nbdkit, exported by ringplane's own NBD client

CPU time is that of all processes of such a way, nbdkit's included. The load is 4 KiB random, 70 % reads, one queue, an
event-driven driver. Each round starts every process again, and every other round runs in reverse order, because two
processes with the same sources differ by 10 % from one start to the next. A figure is the median of its rounds.

All of it takes some 5 minutes on two CPUs, and needs Debian's packages nbdkit and qemu-system-common.
"""

from __future__ import annotations

import contextlib
import itertools
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from trees import table

from ringplane.bench import backends, machine, qsd
from ringplane.bench.console_tables import number
from ringplane.bench.errors import BenchError
from ringplane.driver import Driver, Load, run_load
from ringplane.driver.frontend import SharedMemory
from ringplane.driver.load import fill
from ringplane.driver.process import cpu_ns
from ringplane.options.nbd_uri import NbdUri

NBDKIT = "nbdkit"
DEPTHS = (1, 32, 128)
SIZE = 256 << 20
READ_PERCENT = 70
WARM_UP = 0.2
# Seconds until nbdkit listens.
PATIENCE = 20

RINGPLANE, QSD, NBD = WAYS = ("ringplane", "qsd", "nbd")
COUNTING = Path(__file__).with_name("counting.py")
# A filter that never fails a request may return before it has drawn a random number: nbdkit's does at a rate of 0.
NEVER = "1e-12"


@dataclass(frozen=True, slots=True)
class Fault:
    """A policy, and the filter of nbdkit with its parameters that does the same."""

    policy: str = ""
    filter: tuple[str, ...] = ()


FAULTS = {
    "none": Fault(),
    "counting": Fault(f"{COUNTING}:counting", ("stats", "statsfile=/dev/null")),
    "error that never fires": Fault(f"error,probability={NEVER}", ("error", f"error-rate={NEVER}")),
    "delay of 0": Fault("delay,time=0", ("delay", "rdelay=0", "wdelay=0")),
    "delay of 1 ms": Fault("delay,time=1ms", ("delay", "rdelay=1ms", "wdelay=1ms")),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; times in microseconds."""

    fault: str
    way: str
    depth: int
    iops: float
    cpu_us: float
    p50_us: float


@dataclass(frozen=True, slots=True)
class Served:
    """A disk at a socket, and the processes that serve it."""

    socket: Path
    pids: Sequence[int]

    def cpu_us(self) -> float:
        return sum(map(cpu_ns, self.pids)) / 1000


@contextlib.contextmanager
def served(way: str, fault: Fault, folder: Path) -> Iterator[Served]:
    with contextlib.ExitStack() as stack:
        if way == RINGPLANE:
            policy = ["--policy", fault.policy] if fault.policy else []
            subject = backends.ringplane(shlex.join(["--engine", "memory", *policy]))
            image, pids = empty_image(folder), []
        else:
            subject = qsd.remote_subject() if way == QSD else backends.ringplane()
            socket = folder / "nbdkit.sock"
            image, pids = NbdUri("", socket=socket), [stack.enter_context(nbdkit(fault, socket))]
        running = stack.enter_context(backends.running(subject, image, folder, 1))
        yield Served(running.socket, [running.process.pid, *pids])


def empty_image(folder: Path) -> Path:
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    return image


@contextlib.contextmanager
def nbdkit(fault: Fault, socket: Path) -> Iterator[int]:
    """Its process ID."""
    name, *parameters = fault.filter or ("",)
    # As one allocation, which is its faster way.
    plugin = ["memory", f"size={SIZE}", "allocator=malloc"]
    command = [NBDKIT, "--foreground", "--unix", str(socket), *([f"--filter={name}"] if name else [])]
    process = subprocess.Popen([*command, *plugin, *parameters], stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(socket, process)
        yield process.pid
    finally:
        process.terminate()
        process.wait()
        socket.unlink(missing_ok=True)


def wait_for(socket: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not socket.exists():
        if process.poll() is not None:
            raise click.ClickException(f"{NBDKIT} ended with status {process.returncode}")
        if time.monotonic() > deadline:
            raise click.ClickException(f"{NBDKIT} did not listen within {PATIENCE} s")
        time.sleep(0.01)


def measure(name: str, way: str, depths: Sequence[int], seconds: float, memory: SharedMemory) -> Iterator[Row]:
    """A row for each depth. The disk is written once before: what was never written costs less to read."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        served(way, FAULTS[name], Path(folder)) as disk,
        Driver(disk.socket, memory=memory) as driver,
    ):
        fill(driver)
        for depth in depths:
            run_load(driver, Load(depth=depth, read_percent=READ_PERCENT, seconds=WARM_UP))
            before = disk.cpu_us()
            result = run_load(driver, Load(depth=depth, read_percent=READ_PERCENT, seconds=seconds))
            used = disk.cpu_us() - before
            if result.errors or not result.requests:
                raise click.ClickException(f"{name}, {way}: {result.first_error or 'no request ended'}")
            yield Row(name, way, depth, result.iops, used / result.requests, result.p50_us)


def figures(rows: Sequence[Row], fault: str, depth: int) -> Iterator[str]:
    """The cells of a line: of each figure that of each way."""
    for figure, unit, digits in (("iops", 1000, 1), ("cpu_us", 1, 2), ("p50_us", 1, 1)):
        for way in WAYS:
            mine = [row for row in rows if (row.fault, row.way, row.depth) == (fault, way, depth)]
            yield number(statistics.median(getattr(row, figure) for row in mine) / unit, digits) if mine else ""


def described(rows: Sequence[Row]) -> str:
    """Markdown, of what was measured."""
    heading = ["fault", "depth"]
    for title in ("k IOPS", "CPU us", "p50 us"):
        heading += [title, *WAYS[1:]]
    measured = dict.fromkeys((row.fault, row.depth) for row in rows)
    order = itertools.product(FAULTS, sorted({depth for _, depth in measured}))
    return table(heading, [[name, str(depth), *figures(rows, name, depth)]
                           for name, depth in order if (name, depth) in measured])  # fmt: skip


@click.command(help=__doc__.replace("\n\n    ", "\n\n\b\n    ").replace("\n\n  r", "\n\n\b\n  r"))
@click.option("--fault", "names", type=click.Choice(list(FAULTS)), multiple=True, default=list(FAULTS))
@click.option("--depth", "depths", type=click.IntRange(1), multiple=True, default=DEPTHS, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seconds", type=float, default=1.0, show_default=True, help="Length of each measurement.")
def main(names: tuple[str, ...], depths: tuple[int, ...], rounds: int, seconds: float) -> None:
    for program, package in ((NBDKIT, "nbdkit"), (backends.QSD, "qemu-system-common")):
        if not shutil.which(program):
            raise click.ClickException(f"{program} is not installed: apt install {package}")
    about, cells = machine.sentence(machine.describe()), list(itertools.product(names, WAYS))
    memory, rows = SharedMemory(), list[Row]()
    for number_of_round in range(rounds):
        for name, way in cells[:: -1 if number_of_round % 2 else 1]:
            try:
                rows += measure(name, way, depths, seconds, memory)
            except BenchError as error:
                raise click.ClickException(str(error)) from None
        click.echo(f"round {number_of_round + 1} of {rounds}", err=True)
    click.echo(f"{described(rows)}\n\nMedians of {rounds} rounds, each of {seconds:g} s. {about}")


if __name__ == "__main__":
    main()
