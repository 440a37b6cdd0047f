"""A real ringplane process that serves the images of a test; at the end it must stop with status 0."""

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
from typing import Any

from ringplane.client.client import Client
from ringplane.driver import Driver
from unit.rig import LOGGING_AT_ONCE

# Longer than any intended wait in these tests.
PATIENCE = 30.0

# For `serving`: an API.
API = '[api]\nsocket = "api.sock"\n'


@dataclass(frozen=True)
class Disk:
    """An image and the options of its disk."""

    image: Path | str  # a path, or an address
    queues: int = 1
    direct: bool = True
    engine: str = "auto"
    block_size: int = 512
    more: str = ""  # more lines of its table


@dataclass
class Served:
    """The process; `disks` are the images in the given order."""

    process: subprocess.Popen[str]
    folder: Path
    announced: str

    def driver(self, disk: int = 0, **options: Any) -> Driver:
        return Driver(self.folder / f"{disk}.sock", timeout=PATIENCE, memory_size=64 << 20, **options)

    def client(self) -> Client:
        """For its API (`process=API`)."""
        return Client(self.folder / "api.sock")

    def logged(self) -> str:
        return (self.folder / "log").read_text()


def wait_until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@contextlib.contextmanager
def serving(
    *disks: Disk,
    engine: str = "io_uring",
    program: str = LOGGING_AT_ONCE,
    status: int = 0,
    threads: int = 1,
    process: str = "",
) -> Iterator[Served]:
    """Serve all disks on the I/O threads; `program` is what Python runs as `ringplane`, `status` what it ends with.

    `process`: keys and tables of the process, for its file of options.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tables = [process, *(f'[[io-thread]]\nname = "io{number}"\nengine = "{engine}"\n' for number in range(threads))]
        for number, disk in enumerate(disks):
            tables.append(
                f'[[disk]]\nimage = "{disk.image}"\nsocket-path = "{number}.sock"\nnum-queues = {disk.queues}\n'
                f'direct = {str(disk.direct).lower()}\nengine = "{disk.engine}"\n'
                f"block-size = {disk.block_size}\n{disk.more}\n"
            )
        (folder / "disks.toml").write_text("\n".join(tables))
        with (folder / "log").open("w") as log:
            command = [sys.executable, "-c", program, "serve", "--config", str(folder / "disks.toml")]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        served = None
        try:
            assert process.stdout is not None
            announced = ""
            while f"{len(disks) - 1}.sock" not in announced:
                line = process.stdout.readline()
                assert line, (folder / "log").read_text()
                announced += line
            for disk in disks:
                # ringplane looks at the start of an image. The kernel forgets what it has cached of a file on FUSE when
                # the file is opened, so that the next read asks the file system.
                if isinstance(disk.image, Path):
                    os.close(os.open(disk.image, os.O_RDONLY))
            served = Served(process, folder, announced)
            yield served
            process = served.process
            process.terminate()
            assert process.wait(PATIENCE) == status, (folder / "log").read_text()
        finally:
            if served is not None:
                # An upgrade has replaced it.
                process = served.process
            process.kill()
            # Storage that hangs blocks even this, until it is unmounted afterwards.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE / 10)
            assert process.stdout is not None
            process.stdout.close()


def upgrade(served: Served) -> None:
    """Start a process that takes over; it is the process of `served` from then on."""
    following = _start_again(served, "--upgrade")
    assert served.process.wait(PATIENCE) == 0, served.logged()
    _replace(served, following)


def restart(served: Served) -> None:
    """Stop the process, and start another one with the same options, which serves when this returns."""
    served.process.terminate()
    assert served.process.wait(PATIENCE) == 0, served.logged()
    _replace(served, _start_again(served))
    assert served.process.stdout
    while ".sock" not in (line := served.process.stdout.readline()):
        assert line, served.logged()


def _start_again(served: Served, *more: str) -> subprocess.Popen[str]:
    command = [*served.process.args, *more]  # type: ignore[misc]
    with (served.folder / "log").open("a") as log:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)


def _replace(served: Served, following: subprocess.Popen[str]) -> None:
    assert served.process.stdout
    served.process.stdout.close()
    served.process = following
