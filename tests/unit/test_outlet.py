"""Lines that are written without blocking: order, loss, and the end of the process."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ringplane.log.outlet import LIMIT, Outlet

from .rig import PATIENCE, eventually, fill


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The two ends of a pipe; the writing end blocks."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    yield reading, writing
    for fd in (reading, writing):
        with contextlib.suppress(OSError):
            os.close(fd)


def lost(count: int) -> str:
    return f"lost {count}"


def read_all(fd: int) -> bytes:
    data = bytearray()
    with contextlib.suppress(BlockingIOError):
        while part := os.read(fd, 1 << 20):
            data += part
    return bytes(data)


def in_time(work: Callable[[], None]) -> bool:
    """Whether the function ends in time; a thread that hangs is left behind."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return not thread.is_alive()


def soon() -> float:
    return time.monotonic() + PATIENCE


@pytest.mark.parametrize("started", [False, True])
def test_lines_are_written_in_order(pipe: tuple[int, int], started: bool) -> None:
    outlet = Outlet(pipe[1], lost)
    if started:
        outlet.start()
    for number in range(100):
        outlet.put(f"line {number}")
    outlet.stop(soon())
    assert read_all(pipe[0]).decode().splitlines() == [f"line {number}" for number in range(100)]


def test_lines_from_before_the_start_come_first(pipe: tuple[int, int]) -> None:
    fill(pipe[1])
    os.set_blocking(pipe[1], True)
    outlet = Outlet(pipe[1], lost)
    outlet.put("early")
    read_all(pipe[0])
    outlet.start()
    outlet.put("late")
    outlet.stop(soon())
    assert read_all(pipe[0]).endswith(b"early\nlate\n")


@pytest.mark.parametrize("started", [False, True])
def test_a_full_pipe_blocks_nobody(pipe: tuple[int, int], started: bool) -> None:
    """Lines without room are counted, and the count is written with the first line that has room."""
    fill(pipe[1])
    os.set_blocking(pipe[1], True)
    outlet = Outlet(pipe[1], lost)
    if started:
        outlet.start()

    def flood() -> None:
        for number in range(2 * LIMIT):
            outlet.put(f"line {number}")

    assert in_time(flood)
    text, more = bytearray(), itertools.count(1)

    def comes(end: bytes) -> bool:
        text.extend(read_all(pipe[0]))
        outlet.put("more")
        next(more)
        return end in text

    assert eventually(lambda: comes(b"\nmore\n"))
    outlet.stop(soon())
    text.extend(read_all(pipe[0]))
    lines = text[text.index(b"line 0\n") :].decode().splitlines()
    kept = [int(line.removeprefix("line ")) for line in lines if line.startswith("line ")]
    assert kept[:LIMIT] == list(range(LIMIT))
    assert kept == sorted(kept)
    counted = sum(int(line.split()[1]) for line in lines if line.startswith("lost "))
    assert len(kept) + counted + lines.count("more") == 2 * LIMIT + next(more) - 1


def test_the_count_is_written_without_another_line(pipe: tuple[int, int]) -> None:
    fill(pipe[1])
    os.set_blocking(pipe[1], True)
    outlet = Outlet(pipe[1], lost)
    outlet.start()
    for _ in range(5):
        outlet.put("line", limit=0)
    outlet.put("kept")
    text = bytearray()

    def has_come() -> bool:
        text.extend(read_all(pipe[0]))
        return b"lost 5\nkept\n" in text

    assert eventually(has_come)
    outlet.stop(soon())


@pytest.mark.parametrize("started", [False, True])
def test_stopping_does_not_wait_for_a_reader(pipe: tuple[int, int], started: bool) -> None:
    fill(pipe[1])
    os.set_blocking(pipe[1], True)
    outlet = Outlet(pipe[1], lost)
    if started:
        outlet.start()
    outlet.put("line")
    assert in_time(lambda: outlet.stop(time.monotonic() + 0.01))


@pytest.mark.parametrize("started", [False, True])
def test_a_closed_pipe(pipe: tuple[int, int], started: bool) -> None:
    """There is no error, and nothing spins."""
    outlet = Outlet(pipe[1], lost)
    if started:
        outlet.start()
    os.close(pipe[0])
    for _ in range(1000):
        outlet.put("line")
    outlet.stop(soon())
    before = time.thread_time()
    outlet.put("line")
    assert time.thread_time() - before < PATIENCE


def test_a_full_disk(pipe: tuple[int, int]) -> None:
    with open("/dev/full", "wb") as full:
        outlet = Outlet(full.fileno(), lost)
        for _ in range(3):
            outlet.put("line")
        os.dup2(pipe[1], full.fileno())
        outlet.put("first")
        outlet.put("second")
        assert read_all(pipe[0]) == b"first\nlost 3\nsecond\n"


def test_long_and_undecodable_lines(pipe: tuple[int, int]) -> None:
    outlet = Outlet(pipe[1], lost)
    outlet.start()
    outlet.put("x" * 50_000)
    outlet.put("\udcff")
    outlet.stop(soon())
    assert read_all(pipe[0]) == b"x" * 50_000 + b"\n\\udcff\n"


def test_ticks() -> None:
    """They run in the thread, when it is woken and as often as they request."""
    came = threading.Semaphore(0)

    def tick() -> float:
        came.release()
        return 0.001

    fd = os.open(os.devnull, os.O_WRONLY)
    outlet = Outlet(fd, lost, tick)
    outlet.start()
    for _ in range(5):
        assert came.acquire(timeout=PATIENCE)
    outlet.stop(soon())
    os.close(fd)
