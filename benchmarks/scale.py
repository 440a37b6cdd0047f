"""CPU time per request with many devices in one process, or many queues on one device; medians.

    python benchmarks/scale.py --rounds 5

One I/O thread serves them all. The total number of requests in flight is always the same, spread over the rings. One
thread of the driver visits the rings in turn: it takes the completed requests, submits as many again, and never sleeps.
The result is the daemon's CPU time per request. "busy" is the share of time that it worked; IOPS are only meaningful if
that is nearly all. One driver thread per ring would measure the scheduler, and a driver that sleeps would measure how
many requests one call covers.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from ringplane.bench import backends
from ringplane.bench.errors import BenchError
from ringplane.compiler.jit import compiled
from ringplane.driver.driver import Driver
from ringplane.driver.generator import AGAIN, BROKEN, DONE, FOREVER, drive
from ringplane.driver.load import Load, _Worker
from ringplane.driver.process import cpu_ns
from ringplane.native.access import load64
from ringplane.native.syscalls import monotonic_ns
from ringplane.virtio.blk import SECTOR

MIB = 1 << 20
START_DEADLINE = 120.0
STOP_DEADLINE = 20.0
DRAIN_SECONDS = 10.0
DEVICES, QUEUES = (1, 4, 16, 64), (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Setup:
    """A process: `devices` of `queues` queues each, of which the first `active` devices are used."""

    devices: int
    queues: int
    active: int

    @property
    def rings(self) -> int:
        """The number of rings that are used."""
        return self.active * self.queues

    def __str__(self) -> str:
        text = f"{self.devices} device{'s' * (self.devices > 1)}, {self.queues} queue{'s' * (self.queues > 1)}"
        return text if self.active == self.devices else f"{text}, {self.active} used"


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; `cpu_us` is the daemon's CPU time per request, memory is in MiB."""

    setup: str
    round: int
    kiops: float
    cpu_us: float
    resident_mib: float
    anonymous_mib: float


@compiled
def drive_all(addresses, count, until):
    """Visit the loads whose addresses are in an array, in turn, until all are DONE or the time is `until`."""
    while monotonic_ns() < until:
        busy = 0
        for index in range(count):
            # It returns after one visit, because this time has always passed.
            outcome = drive(load64(addresses + 8 * index), 0)
            if outcome == BROKEN:
                return BROKEN
            if outcome != DONE:
                busy += 1
        if busy == 0:
            return DONE
    return AGAIN


def write_config(folder: Path, setup: Setup, size: int, engine: str) -> Path:
    """Write images without holes, and the configuration that serves them.

    The used images have `size` bytes in total, whatever their number, because the CPU's caches matter.
    """
    block = os.urandom(MIB)
    lines = ["[[io-thread]]", f'engine = "{engine}"']
    for number in range(setup.devices):
        with (folder / f"{number}.img").open("wb") as image:
            for _ in range(max(1, size // setup.active // MIB) if number < setup.active else 1):
                image.write(block)
        lines += [
            "[[disk]]",
            f'image = "{number}.img"',
            f'socket-path = "{number}.sock"',
            f"num-queues = {setup.queues}",
        ]
    path = folder / "ringplane.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


@contextlib.contextmanager
def serving(config: Path, setup: Setup, cpus: set[int]) -> Iterator[int]:
    """A daemon that serves the configuration; its pid. Raises BenchError when it does not start."""
    log = config.with_suffix(".log")
    command = [sys.executable, "-m", "ringplane", "serve", "--config", str(config), "--log-level", "warning"]
    with log.open("wb") as output, backends.pinned(cpus):
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + START_DEADLINE
        while not all(config.with_name(f"{number}.sock").is_socket() for number in range(setup.devices)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"ringplane did not start: {log.read_text().strip()}")
            time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def memory_mib(pid: int, field: str) -> float:
    """A value of /proc/PID/status that is in kB, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise BenchError(f"/proc/{pid}/status tells no {field}")


@contextlib.contextmanager
def loading(disks: Sequence[Driver], load: Load) -> Iterator[list[_Worker]]:
    """This load on each queue of the disks, to be driven without notifications."""
    workers: list[_Worker] = []
    stop = np.zeros(1, np.int64)
    with contextlib.ExitStack() as stack:
        for disk in disks:
            for vring in disk.queues:
                part = (0, disk.capacity // SECTOR)
                workers.append(_Worker(disk, vring, load, part, None, stop))
                stack.callback(workers[-1].free)
                workers[-1].run["random"] = len(workers)
                vring.ring.disable_notifications()
        yield workers


def drain(workers: Sequence[_Worker]) -> None:
    """Wait until nothing is in flight; raises BenchError, also if requests have failed."""
    for worker in workers:
        worker.run["deadline"] = 0
    if drive_until(workers, time.monotonic_ns() + int(DRAIN_SECONDS * 1e9)) != DONE:
        raise BenchError(f"requests are unanswered after {DRAIN_SECONDS:g} s")
    if any(worker.run["errors"] for worker in workers):
        raise BenchError("requests failed")


def drive_until(workers: Sequence[_Worker], until: int) -> int:
    """`drive_all` for Python; raises BenchError."""
    addresses = np.array([worker.address for worker in workers], np.int64)
    outcome = int(drive_all(int(addresses.ctypes.data), len(workers), until))
    if outcome == BROKEN:
        raise BenchError("the daemon used a chain that is not in flight")
    return outcome


def measure(config: Path, setup: Setup, in_flight: int, seconds: float, warm_up: float, pin: bool) -> tuple[float, ...]:
    """Start the daemon, load all rings, and return thousands of requests per second, CPU us, and memory."""
    driver_cpu, *others = sorted(os.sched_getaffinity(0))
    pinned = pin and others
    load = Load(depth=in_flight // setup.rings, queues=setup.queues, busy_poll=True, seconds=seconds)
    with contextlib.ExitStack() as stack:
        pid = stack.enter_context(serving(config, setup, set(others) if pinned else set()))
        disks = [
            stack.enter_context(Driver(config.with_name(f"{number}.sock"), queues=setup.queues, memory_size=64 * MIB))
            for number in range(setup.devices)
        ]
        workers = stack.enter_context(loading(disks[: setup.active], load))
        # Compiles or loads `drive_all` before the measurement.
        drive_until(workers, 0)
        stack.enter_context(backends.pinned({driver_cpu} if pinned else set()))
        start = time.monotonic_ns() + int(warm_up * 1e9)
        end = start + int(seconds * 1e9)
        for worker in workers:
            worker.run["measure_from"], worker.run["deadline"] = start, FOREVER
        drive_until(workers, start)
        before = cpu_ns(pid), time.monotonic_ns()
        drive_until(workers, end)
        after = cpu_ns(pid), time.monotonic_ns()
        requests = sum(int(worker.run["requests"]) for worker in workers)
        drain(workers)
        memory = memory_mib(pid, "VmRSS") - memory_mib(pid, "RssShmem"), memory_mib(pid, "RssAnon")
    return requests / (after[1] - before[1]) * 1e6, (after[0] - before[0]) / 1000 / requests, *memory


def show(rows: Sequence[Row], groups: dict[str, list[Setup]], in_flight: int, console: Console) -> None:
    """Medians; each group is compared with its first setup."""
    values: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        values[row.setup].append(row)
    title = f"4 KiB random reads, {in_flight} in flight in all, one I/O thread, a driver that never sleeps"
    shown = Table(title=title)
    for heading in ("setup", "k IOPS", "CPU us per I/O", "x", "spread", "busy", "RSS MiB", "its own MiB"):
        shown.add_column(heading, justify="left" if heading == "setup" else "right")
    for setups in groups.values():
        first = statistics.median(row.cpu_us for row in values[str(setups[0])])
        for setup in setups:
            found = values[str(setup)]
            cpu = statistics.median(row.cpu_us for row in found)
            shown.add_row(
                str(setup),
                f"{statistics.median(row.kiops for row in found):.1f}",
                f"{cpu:.2f}",
                f"{cpu / first:.2f}",
                f"{min(row.cpu_us for row in found):.2f} to {max(row.cpu_us for row in found):.2f}",
                f"{statistics.median(row.kiops * row.cpu_us / 1000 for row in found):.0%}",
                f"{statistics.median(row.resident_mib for row in found):.0f}",
                f"{statistics.median(row.anonymous_mib for row in found):.0f}",
                end_section=setup is setups[-1],
            )
    console.print(shown)


@click.command()
@click.option("--devices", "device_counts", type=click.IntRange(1), multiple=True, default=DEVICES, show_default=True)
@click.option("--queues", "queue_counts", type=click.IntRange(1, 64), multiple=True, default=QUEUES, show_default=True)
@click.option("--in-flight", type=click.IntRange(1), default=64, show_default=True, help="Requests, in all rings.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1), default=1.0, show_default=True)
@click.option("--warm-up", type=click.FloatRange(0), default=0.3, show_default=True)
@click.option("--size", "size_mib", type=click.IntRange(1), default=256, show_default=True, help="MiB of all images.")
@click.option("--place", type=Path, default=Path("/dev/shm"), show_default=True, help="A folder for the images.")
@click.option("--engine", default="auto", show_default=True)
@click.option("--pin/--no-pin", default=True, show_default=True, help="One CPU for the driver, others for the daemon.")
@click.option("--json", "json_path", type=Path, help="Write all results there.")
def main(
    device_counts: Sequence[int], queue_counts: Sequence[int], in_flight: int, rounds: int, seconds: float,
    warm_up: float, size_mib: int, place: Path, engine: str, pin: bool, json_path: Path | None,
) -> None:  # fmt: skip
    """Measure all setups in turn, in rounds, and print the medians."""
    most = max(device_counts)
    groups = {
        "devices": [Setup(count, 1, count) for count in device_counts],
        "idle devices": [Setup(1, 1, 1), Setup(most, 1, 1)],
        "queues": [Setup(1, count, 1) for count in queue_counts],
    }
    setups = list(dict.fromkeys(setup for group in groups.values() for setup in group))
    for setup in setups:
        if in_flight % setup.rings:
            raise click.UsageError(f"--in-flight {in_flight} cannot be spread evenly over {setup.rings} rings")
    rows: list[Row] = []
    try:
        with contextlib.ExitStack() as stack:
            configs = {}
            for setup in setups:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringplane-scale-", dir=place))
                configs[setup] = write_config(Path(folder), setup, size_mib * MIB, engine)
            for number in range(rounds):
                for setup in setups if number % 2 == 0 else setups[::-1]:
                    figures = measure(configs[setup], setup, in_flight, seconds, warm_up, pin)
                    rows.append(Row(str(setup), number, *figures))
                if json_path:
                    json_path.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    except (BenchError, OSError) as error:
        raise click.ClickException(str(error)) from None
    show(rows, groups, in_flight, Console(width=120))


if __name__ == "__main__":
    main()
