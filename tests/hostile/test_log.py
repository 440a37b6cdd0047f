"""A log that nobody reads blocks nobody, and a front end cannot fill the disk with log lines."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringplane.driver import Driver
from ringplane.driver.frontend import FrontEnd, Refused
from ringplane.log.repeats import BURST
from unit.rig import PATIENCE, eventually

CONFIG = """\
[[disk]]
image = "a.img"
socket-path = "a.sock"
create = "8M"
num-queues = 1

[[disk]]
image = "b.img"
socket-path = "b.sock"
create = "8M"
num-queues = 1
"""

PIPE_SIZE = 4096

SERVE = "from ringplane.cli.serve import serve; serve()"
# With a short period.
SOON = f"from ringplane.log import repeats; repeats.PERIOD = 0.2; {SERVE}"
# All lines are logged, so that they fill a pipe.
WITHOUT_LIMIT = f"from ringplane.log import repeats; repeats.BURST = 1 << 40; {SERVE}"

# In addition, only 20 lines may be queued.
SHORT_QUEUE = f"from ringplane.log import logs; logs.LIMIT = 20; {WITHOUT_LIMIT}"


class Running:
    """A process with two disks whose standard output and standard error are `output` and `errors`."""

    def __init__(self, folder: Path, command: str, output: int, errors: int, *options: str) -> None:
        self.folder = folder
        config = folder / "disks.toml"
        config.write_text(CONFIG)
        words = [sys.executable, "-c", command, "--config", str(config), *options]
        self.process = subprocess.Popen(words, stdout=output, stderr=errors)

    def is_ready(self) -> bool:
        """Whether it replies, even if it cannot print that it listens."""
        assert self.process.poll() is None
        with contextlib.suppress(OSError), contextlib.closing(FrontEnd(self.folder / "b.sock", 60)) as front_end:
            return front_end.get_features() != 0
        return False

    def front_end(self) -> FrontEnd:
        front_end = FrontEnd(self.folder / "a.sock", PATIENCE)
        front_end.negotiate(0)
        return front_end

    def check_neighbour(self) -> None:
        data = os.urandom(4096)
        with Driver(self.folder / "b.sock", memory_size=16 << 20, timeout=PATIENCE) as driver:
            driver.write(0, data)
            assert driver.read(0, 4096) == data

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0
        assert not list(self.folder.glob("*.sock"))


@contextlib.contextmanager
def running(command: str, output: int, errors: int, *options: str) -> Iterator[Running]:
    with tempfile.TemporaryDirectory() as name:
        started = Running(Path(name), command, output, errors, *options)
        try:
            # A cold start compiles.
            assert eventually(started.is_ready, 120), "it does not start"
            yield started
        finally:
            started.process.kill()
            started.process.wait()


@contextlib.contextmanager
def small_pipe() -> Iterator[tuple[int, int]]:
    """A pipe of one page."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


def be_refused(front_end: FrontEnd, count: int) -> None:
    for _ in range(count):
        with pytest.raises(Refused):
            front_end.set_vring_num(99, 16)


@pytest.mark.parametrize("options", [(), ("--trace",), ("--log-level", "debug"), ("--log-format", "json")], ids=str)
def test_serving_does_not_depend_on_a_reader_of_the_log(options: tuple[str, ...]) -> None:
    """The pipes are full from the start, yet front ends are served, and SIGTERM ends the process."""
    with small_pipe() as (_, output), small_pipe() as (_, errors):
        for pipe in (output, errors):
            os.write(pipe, bytes(PIPE_SIZE))
        with running(WITHOUT_LIMIT, output, errors, *options) as served:
            with contextlib.closing(served.front_end()) as front_end:
                be_refused(front_end, 500)
                served.check_neighbour()
            served.stop()


def test_the_reader_of_the_log_resumes() -> None:
    """It gets the lines that had room, the number of lost ones, and all later ones."""
    with small_pipe() as (reading, errors):
        with running(SHORT_QUEUE, subprocess.DEVNULL, errors) as served:
            with contextlib.closing(served.front_end()) as front_end:
                be_refused(front_end, 300)
                text = bytearray()
                os.set_blocking(reading, False)

                def reported() -> bool:
                    with contextlib.suppress(BlockingIOError):
                        text.extend(os.read(reading, 1 << 16))
                    return b"lines were lost because nobody read the log in time" in text

                assert eventually(reported)
            served.stop()
        text.extend(os.read(reading, 1 << 16))
        (lost,) = [line for line in text.decode().splitlines() if "were lost" in line]
        said = text.decode().count("queue 99 does not exist")
        assert said + int(lost.split("WARNING: ")[1].split()[0]) >= 300
        assert said < 300
        assert "a: front end detached" in text.decode().split("were lost")[1]


def test_a_flood_of_lines_is_summed_up() -> None:
    """By disk and kind of line, even if front ends reconnect; at the latest when the process ends."""
    with tempfile.TemporaryFile("w+") as log:
        with running(SERVE, subprocess.DEVNULL, log.fileno()) as served:
            for _ in range(20):
                with contextlib.closing(served.front_end()) as front_end:
                    be_refused(front_end, 50)
            with contextlib.closing(FrontEnd(served.folder / "b.sock", PATIENCE)) as other:
                other.negotiate(0)
                be_refused(other, 1)
            served.stop()
        log.seek(0)
        lines = log.read().splitlines()
    refused = [line for line in lines if "a: SET_VRING_NUM: queue 99 does not exist" in line]
    assert BURST < len(refused) < 50
    assert (
        sum(int(line.split("the last of ")[1].split()[0]) if "the last of" in line else 1 for line in refused) == 1000
    )
    assert sum("a: front end attached" in line for line in lines) < 20
    assert sum("b: SET_VRING_NUM: queue 99" in line for line in lines) == 1


def test_the_sum_is_logged_after_the_flood() -> None:
    with tempfile.NamedTemporaryFile("w+") as log, running(SOON, subprocess.DEVNULL, log.fileno()) as served:
        with contextlib.closing(served.front_end()) as front_end:
            be_refused(front_end, 100)
            assert eventually(lambda: "more like this)" in Path(log.name).read_text())
        served.stop()
