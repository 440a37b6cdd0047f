"""`ringplane serve` as a process in a folder of its own, for tests of its API and of its metrics."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from ringplane.cli.serve import serve as serve_command
from ringplane.control import sandbox
from ringplane.driver import Driver
from strict_sandbox import STRICT_SERVE
from unit.api_client import Api

SOON = 120.0
MEMORY_SIZE = 16 << 20
DISK = ("--blk-file", "a.img", "--create", "4M", "--socket-path", "a.sock")

needs_all = pytest.mark.skipif(bool(sandbox.missing()), reason=f"this kernel lacks {sandbox.missing()}")


class Served:
    """A process that has printed its first line, `announcement`."""

    def __init__(self, folder: Path, command: list[str], *arguments: str) -> None:
        self.folder, self.errors = folder, folder / "errors"
        with self.errors.open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *command, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.announcement = self.next_line()

    def next_line(self) -> str:
        """The next line of its output; empty at its end."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self) -> str:
        """End the process; returns what it has logged."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(SOON) == 0, f"{self.process.returncode}\n{self.errors.read_text()}"
        assert "Traceback" not in self.errors.read_text()
        return self.errors.read_text()


class ServedApi(Served):
    """A process, and a client of its API."""

    def __init__(self, folder: Path, command: list[str], *arguments: str) -> None:
        super().__init__(folder, command, *arguments)
        assert self.announcement.startswith("API on "), self.errors.read_text()
        self.api = Api(folder / "api.sock")

    @property
    def opener(self) -> int:
        """The ID of the process that opens files for it."""
        task = f"/proc/{self.process.pid}/task/{self.process.pid}"
        (child,) = map(int, Path(task, "children").read_text().split())
        return child

    def attach(self, socket: str = "a.sock") -> Driver:
        return Driver(self.folder / socket, memory_size=MEMORY_SIZE, timeout=SOON)


class ServedMetrics(Served):
    """A process that serves metrics."""

    def __init__(self, folder: Path, command: list[str], *arguments: str) -> None:
        super().__init__(folder, command, *arguments)
        lines = itertools.chain([self.announcement], iter(self.next_line, ""))
        self.url = next((line.split()[2] for line in lines if line.startswith("metrics on ")), "")
        assert self.url, self.errors.read_text()

    def request(self, method: str, path: str) -> tuple[int, str]:
        """The status and the body of the answer."""
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=SOON)
        with contextlib.closing(connection):
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def scrape(self) -> str:
        status, text = self.request("GET", "/metrics")
        assert status == 200
        return text

    @contextlib.contextmanager
    def scraping(self, pool: ThreadPoolExecutor) -> Iterator[Future[int]]:
        """Scrape all the time; the future is how often, or fails as soon as a scrape does."""
        ended = threading.Event()

        def repeat() -> int:
            number = 0
            while not (number and ended.is_set()):
                self.scrape()
                number += 1
            return number

        try:
            yield pool.submit(repeat)
        finally:
            ended.set()


Kind = TypeVar("Kind", bound=Served)


def starter(kind: type[Kind], folder: Path) -> Iterator[Callable[..., Kind]]:
    """For a fixture: a function that starts processes of this kind. All that are left are killed at the end."""
    started: list[Kind] = []

    def start(*arguments: str, strict: bool = False) -> Kind:
        """`strict`: a system call that the sandbox does not allow ends the process."""
        command = ["-c", STRICT_SERVE] if strict else ["-m", "ringplane", "serve"]
        started.append(kind(folder, command, *arguments))
        return started[-1]

    yield start
    for served in started:
        served.process.kill()
        served.process.wait()
        assert served.process.stdout is not None
        served.process.stdout.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., ServedApi]]:
    """Start processes with an API in the folder of the test."""
    yield from starter(ServedApi, tmp_path)


def disk_table(name: str) -> str:
    """A disk in a configuration file, in the folder of the process."""
    return f'[[disk]]\nimage = "{name}.img"\ncreate = "4M"\nsocket-path = "{name}.sock"\n'


def body(folder: Path, file: str, **keys: object) -> dict[str, object]:
    """A disk in this folder, for the API."""
    return {"image": str(folder / f"{file}.img"), "socket-path": str(folder / f"{file}.sock"), "create": "4M", **keys}


def refused(*arguments: object) -> str:
    """The last line of what `serve` prints for these arguments, with which it does not start."""
    done = CliRunner().invoke(serve_command, [str(each) for each in arguments])
    assert done.exit_code in (1, 2)
    return done.output.splitlines()[-1]
