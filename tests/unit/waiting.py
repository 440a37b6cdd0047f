"""Waiting for what other threads and processes do: for a condition, never for a fixed time."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ringplane.driver.process import cpu_ns

# Seconds. A test that passes never waits so long; a busy machine may need many of them.
PATIENCE = 120.0


def eventually(condition: Callable[[], bool], seconds: float = PATIENCE, pause: float = 0.001) -> bool:
    """Whether the condition becomes true in time; it is asked for again after each `pause`, in seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True


def wait_until(condition: Callable[[], bool]) -> None:
    """Fail the test unless the condition becomes true."""
    assert eventually(condition), "what the test waits for did not happen"


def is_idle(pid: int) -> bool:
    """Whether the process uses no CPU for a moment, which a loop that spins never does."""
    before = cpu_ns(pid)
    time.sleep(0.03)
    return cpu_ns(pid) - before < 10_000_000


def stop_process(pid: int) -> None:
    """Stop it (SIGSTOP), and return when no thread of it runs: all may continue until one has seen the signal."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: states_of_threads(pid) == {"T"})


def states_of_threads(pid: int) -> set[str]:
    """As proc(5) has them."""
    stats = Path(f"/proc/{pid}/task").glob("*/stat")
    return {stat.read_text().rpartition(")")[2].split()[0] for stat in stats}


@contextlib.contextmanager
def repeating(step: Callable[[], object], pause: float = 0) -> Iterator[None]:
    """Meanwhile another thread does this again and again, with a `pause` in seconds before each."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(pause):
            step()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
