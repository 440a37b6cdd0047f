"""A long mixed load on one process: does anything grow, and is a steady guest served as well at the end as at first?

    cd tests && python -m hostile.soak --seconds 7200

There are three disks on two I/O threads. The first has a steady, verified load all the time. The front ends of the
second connect and disconnect; in between they add and remove memory, resize the image, and stop and start rings. The
front ends of the third misbehave in all the ways of the fuzzer. Now and then all but the steady one pause while the
resources of the process are compared: fds, threads and mappings have to be as at first. Memory and latency are printed
for the reader to judge; the test only rejects what is clearly a leak.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

from ringplane.driver import Driver, Load, run_load
from ringplane.driver.content import Model
from ringplane.driver.frontend import Refused
from ringplane.vhost_user.messages import ProtocolError
from ringplane.vhost_user.payloads import MemoryRegion
from unit.rig import eventually

from .conftest import Victim, serving
from .fuzz import COMMON, Tally, message_case, ring_case

SIZE, LARGER, MIB = 8 << 20, 12 << 20, 1 << 20

CONFIG = """\
[[io-thread]]
name = "io0"
engine = "{engine}"

[[io-thread]]
name = "io1"
engine = "{engine}"

[[disk]]
image = "steady.img"
socket-path = "steady.sock"
create = "64M"
num-queues = 2
io-threads = ["io0", "io1"]

[[disk]]
image = "changing.img"
socket-path = "changing.sock"
create = "8M"
num-queues = 2
io-threads = ["io0", "io1"]

[[disk]]
image = "bad.img"
socket-path = "bad.sock"
create = "8M"
num-queues = 2
io-threads = ["io1", "io0"]
features = {{ in-order = true, inband-notifications = true }}
"""


@dataclass
class Sample:
    """The resources of the process while two of its disks are idle, and the steady load since the last sample."""

    seconds: float
    rss_kib: int
    anonymous_kib: int
    fds: int
    threads: int
    mappings: int
    iops: float
    p50_us: float
    p99_us: float

    @property
    def held(self) -> tuple[int, int, int]:
        """The resources that may not grow at all."""
        return self.fds, self.threads, self.mappings

    def __str__(self) -> str:
        return (
            f"{self.seconds:7.0f} s {self.rss_kib:8} {self.anonymous_kib:8} KiB {self.fds:5} fds "
            f"{self.threads:4} threads {self.mappings:5} mappings {self.iops:9.0f} IOPS "
            f"{self.p50_us:8.0f} us {self.p99_us:8.0f} us"
        )


@dataclass
class Process(Victim):
    """A ringplane process with the three disks in `folder`; its neighbour is the steady disk."""

    began: float = field(default_factory=time.monotonic)

    def memory_kib(self) -> tuple[int, int]:
        """Resident memory, and its anonymous part, which is not shared with a guest or a file (proc(5))."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        return int(values["VmRSS"].split()[0]), int(values["RssAnon"].split()[0])


@contextlib.contextmanager
def soaked(engine: str) -> Iterator[Process]:
    """A process that serves the three disks."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        (folder / "disks.toml").write_text(CONFIG.format(engine=engine))
        with (
            serving(folder) as process,
            Driver(folder / "steady.sock", queues=2, memory_size=32 * MIB) as steady,
        ):
            yield Process(folder, process, steady)


class Part(threading.Thread):
    """Calls a function repeatedly. Holding `turn` pauses it while no front end is attached."""

    def __init__(self, once: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._once, self.turn = once, threading.Lock()
        self.times, self.stopping = 0, False
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.stopping:
                with self.turn:
                    self._once()
                self.times += 1
                # A lock is not fair: give other waiters a chance.
                time.sleep(0.01)
        except BaseException as error:
            self.error = error

    def check(self) -> None:
        if self.error is not None:
            raise self.error


class Changes:
    """The successive front ends of the changing disk."""

    def __init__(self, process: Process) -> None:
        self.process, self.chance = process, random.Random(1)
        self.image = process.folder / "changing.img"

    def once(self) -> None:
        """Attach, change everything that can be changed under load, stop the rings and start them again, detach."""
        queues = self.chance.choice([1, 2])
        with Driver(self.process.folder / "changing.sock", queues=queues, memory_size=16 * MIB) as driver:
            load = Load(
                pattern="random", read_percent=70, depth=8, queues=queues, seconds=0.5, verify=True, region=(0, SIZE)
            )
            results = []
            thread = threading.Thread(target=lambda: results.append(run_load(driver, load)))
            thread.start()
            for _ in range(3):
                self.add_memory(driver)
                self.resize(driver)
            thread.join()
            assert results, "the load has failed"
            assert (results[0].errors, results[0].mismatches) == (0, 0), results[0]
            driver.start(driver.stop())
            data = self.chance.randbytes(4096)
            driver.write(0, data)
            driver.flush()
            assert driver.read(0, 4096) == data

    def add_memory(self, driver: Driver) -> None:
        """Add a region and remove it again."""
        with contextlib.closing(_Memory(4 * MIB)) as memory:
            driver.front_end.add_mem_reg(memory.region, memory.fd)
            driver.front_end.rem_mem_reg(memory.region)

    def resize(self, driver: Driver) -> None:
        size = LARGER if driver.capacity == SIZE else SIZE
        os.truncate(self.image, size)
        self.process.process.send_signal(signal.SIGHUP)

        def seen() -> bool:
            driver.read_config()
            return driver.capacity == size

        assert eventually(seen), "the new size is not served"


class _Memory:
    """A region at an address where the guest has no other memory."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("hot-added")
        os.ftruncate(self.fd, size)
        self.region = MemoryRegion(1 << 40, size, 1 << 41, 0)

    def close(self) -> None:
        os.close(self.fd)


class Misbehaviour:
    """The front ends of the bad disk, which are the fuzzer's."""

    def __init__(self, process: Process) -> None:
        self.process, self.chance, self.tally = process, random.Random(2), Tally()
        self.expected = COMMON.build_fence(process.folder)

    def once(self) -> None:
        draw = random.Random(self.chance.getrandbits(48))
        if draw.random() < 0.7:
            with contextlib.suppress(ProtocolError, Refused, ConnectionError):
                ring_case(self.process.folder, COMMON, draw, self.tally, self.expected)
        else:
            message_case(self.process.socket, draw)
        self.tally.cases += 1


def soak(process: Process, seconds: float, window: float, report: Callable[[Sample], None]) -> list[Sample]:
    """Take a sample every `window` seconds. Raises AssertionError if data is wrong or resources have grown."""
    changes, misbehaviour = Changes(process), Misbehaviour(process)
    parts = [Part(changes.once), Part(misbehaviour.once)]
    samples: list[Sample] = []
    model = Model((0, process.neighbour.capacity))
    at_first = process.resources()
    for part in parts:
        part.start()
    try:
        while time.monotonic() < process.began + seconds:
            samples.append(_sample(process, model, window, parts, at_first))
            report(samples[-1])
            assert samples[-1].held == at_first, f"{at_first} at first, {samples[-1].held} now"
    finally:
        for part in parts:
            part.stopping = True
        for part in parts:
            part.join()
    for part in parts:
        part.check()
    return samples


def _sample(process: Process, model: Model, window: float, parts: list[Part], at_first: tuple[int, int, int]) -> Sample:
    load = Load(
        pattern="random", read_percent=70, depth=8, queues=2, seconds=window, verify=True, model=model, flush_every=100
    )
    result = run_load(process.neighbour, load)
    assert (result.errors, result.mismatches) == (0, 0), result
    with contextlib.ExitStack() as resting:
        for part in parts:
            resting.enter_context(part.turn)
            part.check()
        # The resources of a front end that has just disconnected are released in a moment.
        eventually(lambda: process.resources() == at_first)
        return Sample(
            time.monotonic() - process.began,
            *process.memory_kib(),
            *process.resources(),
            result.iops,
            result.p50_us,
            result.p99_us,
        )


def thirds(samples: list[Sample], value: Callable[[Sample], float]) -> tuple[float, float]:
    """Medians of the second and the last third, which leaves out memory that is allocated once at the start."""
    third = max(1, len(samples) // 3)
    return statistics.median(map(value, samples[third : 2 * third] or samples)), statistics.median(
        map(value, samples[-third:])
    )


@click.command(help=__doc__)
@click.option("--seconds", type=float, default=3600.0, show_default=True)
@click.option("--window", type=float, default=20.0, show_default=True, help="Seconds from one sample to the next.")
@click.option("--engine", type=click.Choice(["io_uring", "aio"]), default="io_uring", show_default=True)
def main(seconds: float, window: float, engine: str) -> None:
    with soaked(engine) as process:
        samples = soak(process, seconds, window, lambda sample: print(sample, flush=True))
        for name in ("rss_kib", "anonymous_kib", "p50_us", "p99_us", "iops"):
            before, after = thirds(samples, lambda sample, name=name: float(getattr(sample, name)))  # type: ignore[misc]
            click.echo(f"{name:14}: {before:10.1f} in the second third, {after:10.1f} in the last")


if __name__ == "__main__":
    main()
