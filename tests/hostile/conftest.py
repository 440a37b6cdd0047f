"""A ringplane process with several disks on one I/O thread: one front end misbehaves, the others must not be affected.

The fixture `target` is for the tests of one class of docs/hostile-drivers.md. At the end of each test it checks what is
guaranteed of the process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ringplane.dataplane import ring_rules
from ringplane.dataplane.state import MAX_RANGES
from ringplane.driver import Driver
from ringplane.system.aside import NAME as CALLS
from unit.combinations import FORMATS
from unit.rig import (
    IN,
    LOGGING_AT_ONCE,
    OK,
    PATIENCE,
    WRITE_ZEROES,
    Answer,
    Line,
    Pending,
    eventually,
    need_engine,
    take_events,
    wait_for_event,
)
from unit.waiting import is_idle

from .attacker import Attacker, RemoteLine

SIZE = 8 << 20

# The size and the capacity of the zoned disk's zones, in sectors.
ZONE, CAPACITY = (128 << 10) // 512, (96 << 10) // 512

CONFIG = """\
[[io-thread]]
name = "io0"
engine = "{engine}"

[[disk]]
image = "bad.img"
socket-path = "bad.sock"
create = "8M"
num-queues = 2
features = {{ in-order = true, inband-notifications = true }}

[[disk]]
image = "good.img"
socket-path = "good.sock"
create = "8M"
num-queues = 1

[[disk]]
image = "read-only.img"
socket-path = "read-only.sock"
read-only = true
num-queues = 2

[[disk]]
image = "zoned.img"
socket-path = "zoned.sock"
create = "8M"
zoned = "128K,capacity=96K,conventional=32,max-open=2,max-active=3"
num-queues = 2
features = {{ in-order = true, inband-notifications = true }}
"""

# An image on tmpfs is served by the engine `memory`.
FOLDERS = {"io_uring": "/var/tmp", "aio": "/var/tmp", "memory": "/dev/shm"}

DISK = random.Random(1).randbytes(SIZE)

# The range that a slow request writes.
SLOW_RANGE = (1 << 20, 5 << 20)


def worker_engine(engine: str) -> str:
    """The `engine` key of the I/O thread in a process for this engine."""
    return "auto" if engine == "memory" else engine


def sector(number: int, count: int = 1) -> bytes:
    return DISK[number * 512 : (number + count) * 512]


@dataclass
class Victim:
    """The process, and the honest neighbour's driver."""

    folder: Path
    process: subprocess.Popen[str]
    neighbour: Driver
    at_rest: tuple[int, int, int] = (0, 0, 0)

    @property
    def socket(self) -> Path:
        return self.folder / "bad.sock"

    @property
    def image(self) -> Path:
        return self.folder / "bad.img"

    def logged(self) -> str:
        return (self.folder / "log").read_text()

    def check(self) -> None:
        """Check that the process runs, the neighbour reads what it wrote, and the next front end can attach."""
        assert self.process.poll() is None, self.logged()
        data = os.urandom(65536)
        self.check_neighbour(data)
        self.neighbour.flush()
        with Driver(self.socket, queues=2, memory_size=16 << 20, timeout=PATIENCE) as driver:
            driver.write(0, data)
            assert driver.read(0, len(data)) == data

    def check_neighbour(self, data: bytes) -> None:
        """Check that the honest disk reads back what is written to it."""
        self.neighbour.write(SIZE // 2, data)
        assert self.neighbour.read(SIZE // 2, len(data)) == data

    def wait_for_resources(self, before: tuple[int, int, int]) -> None:
        """Wait until the process holds no more of each resource than before; releasing may take a moment."""

        def no_more() -> bool:
            return all(now <= then for now, then in zip(self.resources(), before, strict=True))

        assert eventually(no_more), f"{before} before, {self.resources()} after"

    def resources(self) -> tuple[int, int, int]:
        """The process's numbers of fds, threads and shared mappings.

        Not counted are the kernel's io_uring helpers and the threads that are started on demand, up to a limit.
        """
        proc = Path(f"/proc/{self.process.pid}")
        mappings = (proc / "maps").read_text().count("memfd:")
        names = [task.read_text().strip() for task in proc.glob("task/*/comm")]
        threads = [name for name in names if name != CALLS and not name.startswith("iou-")]
        return len(os.listdir(proc / "fd")), len(threads), mappings

    def is_idle(self) -> bool:
        return is_idle(self.process.pid)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that serves the disks of `folder`/disks.toml. It must exit with status 0 on SIGTERM, or be killed."""
    disks = (folder / "disks.toml").read_text().count("[[disk]]")
    with (folder / "log").open("a") as log:
        command = [sys.executable, "-c", LOGGING_AT_ONCE, "serve", "--config", str(folder / "disks.toml")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        for _ in range(2 * disks):
            assert process.stdout.readline(), (folder / "log").read_text()
        yield process
        process.terminate()
        assert process.wait(PATIENCE) in (0, -signal.SIGKILL), (folder / "log").read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def running(engine: str) -> Iterator[Victim]:
    """A separate process for one test."""
    need_engine(engine)
    with tempfile.TemporaryDirectory(dir=FOLDERS[engine]) as name:
        folder = Path(name)
        (folder / "disks.toml").write_text(CONFIG.format(engine=worker_engine(engine)))
        (folder / "read-only.img").write_bytes(DISK)
        with (
            serving(folder) as process,
            Driver(folder / "good.sock", memory_size=16 << 20, timeout=PATIENCE) as neighbour,
        ):
            yield Victim(folder, process, neighbour)


@pytest.fixture(params=["io_uring", "aio"])
def victim(request: pytest.FixtureRequest) -> Iterator[Victim]:
    with running(request.param) as victim:
        yield victim


# The tests of single classes share one process per engine.


@pytest.fixture(scope="session")
def victims() -> Iterator[Callable[[str], Victim]]:
    with contextlib.ExitStack() as stack:

        @functools.cache
        def get(engine: str) -> Victim:
            victim = stack.enter_context(running(engine))
            victim.check()
            assert eventually(lambda: victim.logged().count("detached") == 1)
            victim.at_rest = victim.resources()
            return victim

        yield get


@dataclass
class Target:
    """The process for one test; the disk that the test attacks contains DISK."""

    victim: Victim
    begins: int
    # The ranges of the disk that may change: (first byte, end).
    allowed: list[tuple[int, int]] = field(default_factory=list)
    attackers: list[Attacker] = field(default_factory=list)

    def attacker(self, disk: str = "bad", **options: Any) -> Attacker:
        self.attackers.append(Attacker(self.victim.folder / f"{disk}.sock", **options))
        return self.attackers[-1]

    def logged(self) -> str:
        """The log since the test began."""
        return self.victim.logged()[self.begins :]

    def put_slow(self, line: Line) -> Pending:
        """Submit a request of one descriptor that is in flight for at least some milliseconds."""
        start, end = SLOW_RANGE
        self.allowed.append(SLOW_RANGE)
        # A range that is already zero is completed at once; data that is not on the disk yet has to be written first.
        with self.victim.image.open("r+b") as file:
            file.seek(start)
            file.write(DISK[start:end])
        segment = struct.pack("<QII", start // 512, (end - start) // 512, 0)
        return line.put(WRITE_ZEROES, data=segment * MAX_RANGES, direct=0)

    def assert_breaks(self, line: RemoteLine, rule: int) -> None:
        """Kick: this rule breaks the ring and nothing else changes; after a reset the ring works again."""
        attacker, before = line.rig, len(self.victim.logged())
        memory = attacker.memory_beside_rings()
        line.kick()
        wait_for_event(line.err_fd, f"the error: {ring_rules.MESSAGES[rule]}")
        logged = self.victim.logged()[before:]
        assert f"bad queue {line.number}: ring broken by the driver: {ring_rules.MESSAGES[rule]}" in logged, logged
        assert logged.count("ring broken") == 1
        assert attacker.memory_beside_rings() == memory
        assert not list(line.ring.take_used())
        attacker.check_honest_ring(DISK)
        line.reset()
        assert line.do(IN, 5, room=512) == Answer(OK, 513, DISK[5 * 512 : 6 * 512])
        assert not take_events(line.err_fd)

    def check(self) -> None:
        """Check everything that is guaranteed after an attack."""
        for attacker in self.attackers:
            if attacker.guest.fd >= 0 and attacker.is_attached():
                attacker.check_honest_ring(DISK)
        assert eventually(self.victim.is_idle), "the process spins while the front end is attached"
        for attacker in self.attackers:
            attacker.close()
        assert self.victim.process.poll() is None, self.logged()
        for name in ("bad.img", "read-only.img"):
            content = bytearray((self.victim.folder / name).read_bytes())
            for start, end in self.allowed if name == "bad.img" else ():
                content[start:end] = DISK[start:end]
            # Not in the assertion: pytest would take very long to describe the differences of so many bytes.
            unchanged = content == DISK
            assert unchanged, f"bytes of {name} changed that nobody was allowed to write, in {_changed(content)}"
        self.victim.check()
        self.victim.wait_for_resources(self.victim.at_rest)
        assert eventually(self.victim.is_idle), "the process spins"
        assert "please report it" not in self.logged()
        assert "Traceback" not in self.logged()


def _changed(content: bytes) -> list[int]:
    """The first ten sectors that differ from DISK."""
    return [at // 512 for at in range(0, len(DISK), 512) if content[at : at + 512] != DISK[at : at + 512]][:10]


# The fixture `engine` leaves out `memory`, because engines do not handle rings and messages; tests of requests add it.
EVERY_ENGINE = pytest.mark.parametrize("engine", FOLDERS, indirect=True)


@pytest.fixture(params=["io_uring", "aio"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def ring_class(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def target(victims: Callable[[str], Victim], engine: str) -> Iterator[Target]:
    victim = victims(engine)
    assert victim.process.poll() is None, "it has ended in an earlier test"
    with victim.image.open("r+b") as file:
        file.write(DISK)
        os.fsync(file.fileno())
    target = Target(victim, len(victim.logged()))
    yield target
    target.check()
