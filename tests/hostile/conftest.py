"""A ringplane process with two disks on one I/O thread: one front end misbehaves, the other must not notice."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ringplane.driver import Driver

SIZE = 8 << 20
PATIENCE = 20.0

CONFIG = """\
[[io-thread]]
name = "io0"
engine = "{engine}"

[[disk]]
image = "bad.img"
socket-path = "bad.sock"
create = "8M"
num-queues = 2

[[disk]]
image = "good.img"
socket-path = "good.sock"
create = "8M"
num-queues = 1
"""


@dataclass
class Victim:
    """The process, and the honest neighbour's driver."""

    folder: Path
    process: subprocess.Popen[str]
    neighbour: Driver

    @property
    def socket(self) -> Path:
        return self.folder / "bad.sock"

    def told(self) -> str:
        return (self.folder / "log").read_text()

    def check(self) -> None:
        """The process is there, its neighbour is served and has the data that it wrote, and the next one may attach."""
        assert self.process.poll() is None, self.told()
        data = os.urandom(65536)
        self.neighbour.write(SIZE // 2, data)
        self.neighbour.flush()
        assert self.neighbour.read(SIZE // 2, len(data)) == data
        with Driver(self.socket, queues=2, memory_size=16 << 20, timeout=PATIENCE) as driver:
            driver.write(0, data)
            assert driver.read(0, len(data)) == data

    def wait_for_resources(self, before: tuple[int, int, int]) -> None:
        """There is no more of anything than before; what is being given back may take a moment."""

        def no_more() -> bool:
            return all(now <= then for now, then in zip(self.resources(), before, strict=True))

        end = time.monotonic() + PATIENCE
        while not no_more():
            assert time.monotonic() < end, f"{before} before, {self.resources()} after"
            time.sleep(0.01)

    def resources(self) -> tuple[int, int, int]:
        """How many fds, threads (but for the kernel's own helpers of io_uring) and shared mappings the process has."""
        proc = Path(f"/proc/{self.process.pid}")
        mappings = (proc / "maps").read_text().count("memfd:")
        threads = [task for task in proc.glob("task/*/comm") if not task.read_text().startswith("iou-")]
        return len(os.listdir(proc / "fd")), len(threads), mappings


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@contextlib.contextmanager
def running(engine: str) -> Iterator[Victim]:
    """The process, which must end well when it is asked to."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        (folder / "disks.toml").write_text(CONFIG.format(engine=engine))
        with (folder / "log").open("w") as log:
            command = [sys.executable, "-m", "ringplane", "serve", "--config", str(folder / "disks.toml")]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            for _ in range(4):
                assert process.stdout.readline(), (folder / "log").read_text()
            with Driver(folder / "good.sock", memory_size=16 << 20, timeout=PATIENCE) as neighbour:
                yield Victim(folder, process, neighbour)
            process.terminate()
            assert process.wait(PATIENCE) == 0, (folder / "log").read_text()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.fixture(params=["io_uring", "aio"])
def victim(request: pytest.FixtureRequest) -> Iterator[Victim]:
    with running(request.param) as victim:
        yield victim
