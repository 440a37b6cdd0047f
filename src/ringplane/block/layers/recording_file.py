"""The file of a recording that is being made, and the thread that writes it (recording_buffer.py).

If the file cannot be written, the recording ends: its last entry says so, the log and an event report it, and the disk
is served as before.
"""

from __future__ import annotations

import atexit
import dataclasses
import errno
import logging
import os
import select
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ringplane.block.image import ImageError
from ringplane.block.layers.recording_buffer import AWAKE, RECORDING, append_mark, write_out
from ringplane.block.layers.recording_slowness import FileSlowness
from ringplane.log.event_bus import Emit, no_events
from ringplane.native.epoll import EPOLL_EVENT
from ringplane.opener.opener import Opener
from ringplane.recordings.entries import END, FAILED, Header
from ringplane.recordings.recording_format import EXISTS, HEAD, pack_header, sealed
from ringplane.system import libc
from ringplane.system.aside import NoThread, start_thread

log = logging.getLogger(__name__)

# Bytes of the ring buffer: a power of two, and more than two of the largest entries.
ROOM = 16 << 20

# The I/O threads that a disk can have.
MOST_PARTS = 64

THREAD = "ringplane-record"

# Seconds between two looks whether the file takes anything.
LOOK_INTERVAL = 1.0

# Seconds that a process waits at its exit for the end of a recording that it has left (`leave`).
LEAVE_PATIENCE = 10.0


class RecordingFile:
    """Owns a RECORDING; `address` is its address."""

    def __init__(self, path: Path, header: Header, opener: Opener, room: int = ROOM) -> None:
        """Create the file. Raises ImageError, OpenerEnded."""
        self.path, self._opener = path, opener
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.header = dataclasses.replace(header, started=date, started_ns=time.monotonic_ns())
        # Why nothing is recorded any more; empty: it is.
        self.failed = ""
        self._emit: Emit = no_events
        self._thread = threading.Thread(target=self._main, name=THREAD, daemon=True)
        # `_has_end`: the file has its last entry, because it could not be written. `_given_up`: -errno.
        self._closed = self._has_end = False
        self._given_up = -errno.EIO
        self._complete = threading.Event()
        self._fd = _create(path, opener)
        try:
            start = pack_header(self.header)
            _write(self._fd, start, 0)
            os.lseek(self._fd, len(start), os.SEEK_SET)
        except OSError as error:
            os.close(self._fd)
            opener.unlink(path)
            raise ImageError(f"{path}: {error.strerror}") from None
        self._make_structs(len(start), room)

    def _make_structs(self, written: int, room: int) -> None:
        self._ring, self._parts = np.zeros(room, np.uint8), np.zeros(MOST_PARTS, np.int64)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll(1)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._event = np.zeros(1, EPOLL_EVENT)
        self._array = np.zeros(1, RECORDING)
        self.address = int(self._array.ctypes.data)
        record = self._record = self._array[0]
        record["ring"], record["room"], record["wrap"] = self._ring.ctypes.data, room, -1
        record["parts"], record["wake_above"] = self._parts.ctypes.data, AWAKE
        record["wake_fd"], record["epoll_fd"], record["number"] = self._wake_fd, self._epoll.fileno(), 1
        record["epoll_event"], record["fd"] = self._event.ctypes.data, self._fd
        record["written"], record["last"] = written, -1

    @property
    def token(self) -> str:
        """What marks begin with."""
        return self.header.token

    @property
    def count(self) -> int:
        """Entries so far."""
        return int(self._record["count"])

    @property
    def disk(self) -> str:
        """The name of the disk."""
        return self.header.disk

    @property
    def taken(self) -> int:
        """Bytes that have been written, so that others can be."""
        return int(self._record["tail"])

    @property
    def room(self) -> int:
        """The most bytes that can wait."""
        return int(self._record["room"])

    @property
    def waiting(self) -> int:
        """Bytes that are not in the file yet."""
        return int(self._record["head"]) - int(self._record["tail"])

    def mark(self, text: bytes) -> bool:
        """Add a mark, from any thread; False: there is no room for it now."""
        room = np.frombuffer(text or b"\0", np.uint8)
        return append_mark(self.address, int(room.ctypes.data), len(text)) != 0

    def add_part(self, address: int) -> None:
        """There is one more PART, before any I/O."""
        self._parts[self._record["part_count"]] = address
        self._record["part_count"] += 1

    def start(self, emit: Emit) -> None:
        """Start the thread, and one that watches it; `emit` reports events. Raises NoThread."""
        self._emit = emit
        try:
            self._thread.start()
        except RuntimeError:
            raise NoThread from None
        start_thread(THREAD, self._watch)

    def announce(self) -> None:
        """Report that the recording has begun."""
        self._log(logging.INFO, "recording to %s; a block that begins with %s is a mark", self.path, self.token)
        self._emit("recording-started", file=str(self.path), token=self.token)

    def close(self) -> None:
        """End the recording when no I/O is in progress; may block. After `leave`, or a second time, it does nothing."""
        if not self._closed:
            self._closed = True
            self._finish()

    def leave(self, then: Callable[[], None]) -> None:
        """Like `close`, but it does not wait for the file; `then` is called at the end, on another thread."""
        self._closed = True
        atexit.register(self.wait, LEAVE_PATIENCE)
        try:
            start_thread(THREAD, partial(self._leave, then))
        except NoThread:
            self._leave(then)

    def _leave(self, then: Callable[[], None]) -> None:
        self._finish()
        then()
        atexit.unregister(self.wait)

    def wait(self, patience: float) -> bool:
        """Whether the file has all that it will ever have, within so many seconds after `leave`."""
        return self._complete.wait(patience)

    def give_up(self, error: int) -> None:
        """Record nothing more because of this errno: ETIMEDOUT if the file does not take what waits already."""
        self._record["closed"] = 1
        if not self.failed:
            self._given_up, self.failed = -error, os.strerror(error)
            self._report_failure()

    def _finish(self) -> None:
        self._record["stopping"] = 1
        os.eventfd_write(self._wake_fd, 1)
        if self._thread.ident is not None:
            self._thread.join()
        if not self.failed:
            try:
                self._end(END, 0)
            except OSError as error:
                self._fail(-(error.errno or errno.EIO))
        elif not self._has_end:
            self._end_failed(self._given_up)
        self._epoll.close()
        os.close(self._wake_fd)
        os.close(self._fd)
        self._complete.set()

    def unlink(self) -> None:
        """Remove the file, because the disk cannot be served."""
        try:
            self._opener.unlink(self.path)
        except OSError as error:
            # A confined process, for example.
            self._log(logging.WARNING, "%s: cannot be removed: %s; nothing was recorded", self.path, error.strerror)

    def _main(self) -> None:
        libc.name_thread(THREAD)
        if result := write_out(self.address):
            self._fail(result)

    def _watch(self) -> None:
        slowness = FileSlowness(self, self._emit)
        while not self._complete.wait(LOOK_INTERVAL):
            slowness.look()

    def _fail(self, result: int) -> None:
        given_up = bool(self.failed)
        self.failed = self.failed or os.strerror(-result)
        self._end_failed(result)
        if not given_up:
            self._report_failure()

    def _end_failed(self, result: int) -> None:
        """End the file after its last whole entry."""
        self._has_end = True
        try:
            self._end(FAILED, result)
        except OSError:
            self._replace_last(result)

    def _report_failure(self) -> None:
        self._log(
            logging.ERROR,
            "%s: the recording has ended, because it cannot be written: %s; the disk is served as before",
            *(self.path, self.failed),
        )
        self._emit("recording-failed", file=str(self.path), error=self.failed)

    def _end(self, kind: int, result: int) -> None:
        """Append the last entry. Raises OSError."""
        written = int(self._record["written"])
        os.ftruncate(self._fd, written)
        index = self._count_in_file()
        _write(self._fd, sealed(kind, index, index, 0, time.monotonic_ns(), 0, 0, 0, result, 0, 0), written)

    def _replace_last(self, result: int) -> None:
        """There is no room for another entry, so the last one makes way."""
        last = int(self._record["last"])
        if last < 0:
            return
        index = self._count_in_file() - 1
        try:
            _write(self._fd, sealed(FAILED, index, index, 0, time.monotonic_ns(), 0, 0, 0, result, 0, 0), last)
            os.ftruncate(self._fd, last + HEAD.size)
        except OSError as error:
            self._log(logging.ERROR, "%s: its end cannot be written either: %s", self.path, error.strerror)

    def _count_in_file(self) -> int:
        """The number of entries in the file."""
        return int(self._record["count_in_file"])

    def _log(self, level: int, message: str, *words: object) -> None:
        log.log(level, message, *words, extra={"disk": self.disk})


def _create(path: Path, opener: Opener) -> int:
    """The fd of a new, empty file. Raises ImageError, OpenerEnded."""
    try:
        opener.create(path, 1)
        try:
            fd = opener.open(path, read_only=False, direct=False)
            os.ftruncate(fd, 0)
        except BaseException:
            opener.unlink(path)
            raise
    except FileExistsError:
        raise ImageError(EXISTS.format(path)) from None
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from None
    return fd


def _write(fd: int, content: bytes, place: int) -> None:
    """Write all of it there. Raises OSError."""
    while content:
        written = os.pwrite(fd, content, place)
        content = content[written:]
        place += written
        if not written:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
