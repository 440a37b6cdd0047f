"""A confined process that hostile HTTP clients attack, and what holds after each attack."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from ringplane.driver import Driver
from unit.rig import PATIENCE, eventually

# What a client may add to the memory of the process in a test, in bytes.
MEMORY = 24 << 20

PATIENT = "from ringplane.cli import main; main()"

# `ringplane`, but impatient: its clients have half a second for a request, and one to read its answer.
IMPATIENT = """
from ringplane.api import connections
from ringplane.cli import main
connections.REQUEST_PATIENCE, connections.WRITE_PATIENCE = 0.5, 1.0
main()
"""


class HttpVictim(ABC):
    """The process, which runs this `code`; a front end of its disk is attached."""

    # Options of `serve`, with which it serves HTTP.
    OPTIONS: tuple[str, ...]

    def __init__(self, folder: Path, code: str) -> None:
        self.folder = folder
        self.log = folder / "log"
        command = [sys.executable, "-c", code, "serve", "--blk-file", "disk.img", "--create", "8M"]
        command += ["--socket-path", "disk.sock", *self.OPTIONS]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        self.announced: list[str] = []
        while not (line := self.process.stdout.readline()).startswith("listening on "):
            assert line, self.log.read_text()
            self.announced.append(line)
        self.driver = Driver(folder / "disk.sock", memory_size=16 << 20, timeout=PATIENCE)

    @abstractmethod
    def connect(self) -> socket.socket:
        """A connection of a client."""

    @abstractmethod
    def check_client(self) -> None:
        """An honest client is served."""

    def check(self) -> None:
        """The disk and an honest client are served."""
        data = os.urandom(4096)
        self.driver.write(0, data)
        assert self.driver.read(0, 4096) == data
        self.check_client()

    def resources(self) -> tuple[int, int]:
        """Open files, and private memory in bytes."""
        proc = Path(f"/proc/{self.process.pid}")
        lines = (proc / "smaps_rollup").read_text().splitlines()
        private = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
        return len(os.listdir(proc / "fd")), private << 10

    def close(self) -> None:
        self.driver.close()
        self.process.terminate()
        try:
            assert self.process.wait(PATIENCE) == 0, self.log.read_text()
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()


Kind = TypeVar("Kind", bound=HttpVictim)


@contextlib.contextmanager
def running(kind: type[Kind], code: str) -> Iterator[Kind]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        victim = kind(Path(folder), code)
        try:
            victim.check()
            yield victim
        finally:
            victim.close()


def unharmed(victim: Kind) -> Iterator[Kind]:
    """For a fixture: after each test the process has what it had before, and has logged no fault."""
    fds, memory = victim.resources()
    begins = len(victim.log.read_text())
    yield victim
    victim.check()
    assert eventually(lambda: victim.resources()[0] <= fds), f"{fds} files before, {victim.resources()[0]} after"
    assert victim.resources()[1] <= memory + MEMORY
    logged = victim.log.read_text()[begins:]
    assert "Traceback" not in logged, logged
    assert "report it" not in logged, logged


def receive(sock: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(65536):
            data += part
    return bytes(data)


def check_garbage(victim: HttpVictim, seed: int, requests: int) -> None:
    """What is not HTTP has the status 400, or no answer."""
    draw = random.Random(seed)
    for _ in range(requests):
        with victim.connect() as sock:
            with contextlib.suppress(OSError):
                sock.sendall(draw.randbytes(draw.randrange(1, 3000)) + b"\r\n\r\n")
            answer = receive(sock)
            assert not answer or answer.startswith(b"HTTP/1.1 400 ")
    # Some of them are logged, in words of ours.
    words = ": a client was disconnected, because it sent what is not an HTTP request"
    assert eventually(lambda: words in victim.log.read_text())
    assert "Invalid HTTP request" not in victim.log.read_text()
