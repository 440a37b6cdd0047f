"""Writes lines to standard output or standard error without ever blocking the caller.

If nobody reads the output, a pipe fills up and write(2) blocks; it also blocks if storage hangs. This module has a
bounded queue of lines and a thread that writes them. Lines that find the queue full are dropped and counted, and the
count is written when there is room again.

logging.handlers.QueueListener is not used because its end waits for its thread without a limit, and because its thread
holds the lock of a handler in write(2), which logging.shutdown waits for.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

# Lines that may wait. A queued line takes some 200 bytes.
LIMIT = 10_000

# Lines that one write(2) is for, at most.
BATCH = 100


class Outlet:
    """A file descriptor to write lines to; any thread may call.

    Until `start`, `put` itself writes as much as there is room for, so that no thread is needed before a process is
    confined. `describe_lost` returns a line with the number of lost lines. The thread calls `tick` when it wakes up;
    `tick` returns the seconds until its next call.
    """

    def __init__(
        self, fd: int, describe_lost: Callable[[int], str], tick: Callable[[], float | None] = lambda: None
    ) -> None:
        self._fd, self._describe_lost, self._tick = fd, describe_lost, tick
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        # The rest of the line that is being written; it belongs to the holder of the lock.
        self._rest = b""
        self._writing = threading.Lock()
        # Reentrant: a finalizer may log at any time.
        self._counting = threading.RLock()
        self._lost, self._writable = 0, True
        self._thread: threading.Thread | None = None

    def put(self, line: str, limit: int = LIMIT) -> None:
        """Queue a line to be written, unless `limit` lines are waiting already."""
        self._write_what_fits()
        if self._lines.qsize() >= limit:
            self._lose()
            return
        self._report_lost()
        self._lines.put(_encode(line))
        self._write_what_fits()

    def wake(self) -> None:
        """Make the thread call `tick` soon."""
        self._lines.put(b"")

    def start(self) -> None:
        """Start the thread, which writes from now on."""
        self._thread = threading.Thread(target=self._main, name="ringplane-log", daemon=True)
        self._thread.start()

    def stop(self, deadline: float) -> None:
        """Return when all lines have been written, or when time.monotonic() reaches the deadline."""
        if self._thread is None:
            self._write_what_fits(max(0.0, deadline - time.monotonic()))
            return
        self._lines.put(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _main(self) -> None:
        while True:
            try:
                line = self._lines.get(timeout=self._tick())
            except Empty:
                continue
            if line is None:
                return
            with self._writing:
                self._rest += line + self._take_waiting()
                self._write_rest(None)
            if self._lines.empty():
                self._report_lost()

    def _take_waiting(self) -> bytes:
        """Lines that wait behind the one that was taken, up to a batch of them."""
        lines: list[bytes] = []
        with contextlib.suppress(Empty):
            while len(lines) < BATCH:
                line = self._lines.get_nowait()
                if line is None:
                    # The end, which comes after them.
                    self._lines.put(None)
                    break
                lines.append(line)
        return b"".join(lines)

    def _write_what_fits(self, patience: float = 0.0) -> None:
        """Write queued lines if there is no thread; `patience` is the time for each piece, in seconds."""
        if self._thread is None and self._writing.acquire(blocking=False):
            try:
                while self._write_rest(patience) and not self._lines.empty():
                    self._rest = self._lines.get() or b""
            finally:
                self._writing.release()

    def _write_rest(self, patience: float | None) -> bool:
        """Write or lose the rest; False if some must wait. A writable pipe accepts PIPE_BUF bytes at once."""
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        while self._rest:
            if not poll.poll(None if patience is None else patience * 1000):
                return False
            try:
                self._rest = self._rest[os.write(self._fd, self._rest[: select.PIPE_BUF]) :]
                self._writable = True
            except BlockingIOError:
                # Another process has written to it in between.
                continue
            except OSError:
                # The reader has gone, or the disk is full.
                self._lose(self._rest.count(b"\n"))
                self._rest, self._writable = b"", False
        return True

    def _lose(self, lines: int = 1) -> None:
        with self._counting:
            self._lost += lines

    def _report_lost(self) -> None:
        """Queue a line about lost lines, unless it would be lost too."""
        if not self._writable:
            return
        with self._counting:
            lost, self._lost = self._lost, 0
        if lost:
            self._lines.put(_encode(self._describe_lost(lost)))


def _encode(line: str) -> bytes:
    return f"{line}\n".encode(errors="backslashreplace")
