"""Signals that end a command, from its first moment to its last.

Nothing is raised in a signal handler, which runs between any two bytecodes, also inside callbacks of the compiler. The
interpreter writes the number of each signal to a pipe at once, on any thread. Work that takes long calls `check`
between its steps and `wait` instead of sleeping: only these raise Interrupted, and the work is then undone.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Collection, Iterator

# SIGHUP ends a command whose terminal has gone; `serve` uses it for something else.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# The result of `CaughtSignals.next` without a signal.
WOKEN = 0


class Interrupted(Exception):
    """A signal ended the work early."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {name(number)}")
        self.number = number

    @property
    def status(self) -> int:
        """The exit status of a command that did not finish its work, as a shell reports it."""
        return 128 + self.number


def name(number: int) -> str:
    """The name of a signal, for example `SIGTERM`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        # A real-time signal.
        return f"signal {number}"


class Signals:
    """Ignores signals: for work in a program that has its own signal handlers."""

    def check(self) -> None:
        """Raise Interrupted if a signal has come that ends the work."""

    def wait(self, fd: int, timeout: float | None = None) -> bool:
        """Wait until `fd` can be read; False after `timeout` seconds. Raises Interrupted."""
        return _poll([fd], timeout)

    def wake(self) -> None:
        """Make `CaughtSignals.next` return WOKEN; may be called from any thread."""


class CaughtSignals(Signals):
    """Catches the signals of this process from now on. Created once, by the main thread."""

    def __init__(self) -> None:
        self.ending = set(ENDING)
        self._came: list[int] = []
        self._woken = False
        self._fd, self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number in ENDING:
            # nohup(1) makes its command ignore SIGHUP.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _do_nothing)
        # The parent process may have blocked them until now: env --block-signal.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)

    def pass_on(self, numbers: Collection[int]) -> None:
        """Make `next` return these signals; they do not end the work any more."""
        self.ending.difference_update(numbers)
        for number in numbers:
            signal.signal(number, _do_nothing)

    def check(self) -> None:
        self._collect()
        for number in self._came:
            if number in self.ending:
                raise Interrupted(number)

    def wait(self, fd: int, timeout: float | None = None) -> bool:
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            self.check()
            left = None if end is None else end - time.monotonic()
            if _poll([fd], 0):
                return True
            if left is not None and left <= 0:
                return False
            _poll([fd, self._fd], left)

    def next(self, timeout: float | None = None) -> int | None:
        """Wait for a signal; returns its number, WOKEN after `wake`, or None after `timeout` seconds."""
        if not self._came and not self._woken:
            _poll([self._fd], timeout)
            self._collect()
        if self._came:
            return self._came.pop(0)
        return WOKEN if self._woken else None

    def wake(self) -> None:
        self._woken = True
        with contextlib.suppress(BlockingIOError):
            os.write(self._wakeup, bytes([WOKEN]))

    def _collect(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._came += filter(None, os.read(self._fd, 4096))

    def end_at_once(self) -> None:
        """Let signals end the process at any point, with one line, because it changes nothing; also earlier ones."""
        for number in ENDING:
            if signal.getsignal(number) == _do_nothing:
                signal.signal(number, _end)
        self._collect()
        for came in self._came:
            _end(came, None)

    def ignore(self) -> None:
        """Ignore signals while the process exits, to keep its exit status: Python would let them kill it."""
        for number in signal.valid_signals():
            if signal.getsignal(number) == _do_nothing:
                signal.signal(number, signal.SIG_IGN)


NONE = Signals()


def of(command: object) -> Signals:
    """The signals that the entry point has caught for a command (click's `Context.obj`)."""
    return command if isinstance(command, Signals) else NONE


@contextlib.contextmanager
def held_back(numbers: Collection[int] = ENDING) -> Iterator[None]:
    """Block these signals in child processes that are started meanwhile: this process ends them.

    A signal mask outlives execve(2). A handler would not, and a terminal signals children too.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_line(number: int) -> None:
    """Start a new line on a terminal, which shows a Ctrl-C as ^C at its cursor."""
    if sys.stderr is not None:
        sys.stderr.write(_start_of_line(number))
        sys.stderr.flush()


def _start_of_line(number: int) -> str:
    return "\n" if number == signal.SIGINT and os.isatty(2) else ""


def _end(number: int, frame: object) -> None:
    # A write to the buffer of `sys.stderr` may have been interrupted.
    line = f"{_start_of_line(number)}{Interrupted(number)}\n"
    with contextlib.suppress(OSError):
        os.write(2, line.encode())
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _do_nothing(number: int, frame: object) -> None:
    pass


def _poll(fds: list[int], timeout: float | None) -> bool:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))
