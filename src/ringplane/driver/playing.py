"""Plays a recording on a disk: on an image, or through the socket of any back end; and verifies what is there then.

Entries begin in the order in which they had begun, and none begins before everything has ended that had ended when it
began in the recording. Those that were in flight together are in flight together again, unless they overlap: then the
later one waits, so that what the disk contains in the end is known.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ringplane.block.image_lock import lock
from ringplane.driver.driver import PIECE, Begun, Driver, Unsupported
from ringplane.native.falloc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from ringplane.options.image_options import ImageOptions
from ringplane.recordings.entries import CHANGES, DISCARD, FLUSH, MARK, SECURE_ERASE, WRITE, ZERO, Entry
from ringplane.recordings.reader import Recording
from ringplane.system.libc import system_call
from ringplane.system.signals import NONE, Signals
from ringplane.system.syscall_numbers import NUMBERS
from ringplane.virtio.blk import SECTOR, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_OUT

# At a time.
MOST_IN_FLIGHT = 64

# Bytes that are written, or read for verification, at a time.
LARGEST = 1 << 20

IN_USE = "another program uses it; stop that program, or take a copy"


class Target(Protocol):
    """The disk. Its methods raise OSError and Unsupported."""

    size: int

    def begin(self, entry: Entry) -> Callable[[], None]:
        """Begin what the entry says; what is returned waits for its end."""

    def sync(self) -> None:
        """Make stable what has ended."""

    def read(self, offset: int, length: int) -> bytes:
        """What is there."""


class ImageTarget:
    """An image: a file or a block device, through the page cache. Each request has ended when `begin` returns."""

    def __init__(self, path: Path, signals: Signals = NONE) -> None:
        """Raises OSError, also if something else uses the image; Interrupted."""
        self._fd = _opened(path)
        try:
            if not _locked(self._fd, signals):
                raise OSError(errno.EBUSY, IN_USE)
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
        except BaseException:
            self.close()
            raise

    def begin(self, entry: Entry) -> Callable[[], None]:
        """See Target."""
        if entry.kind == WRITE:
            self._write(entry.offset, entry.data)
        elif entry.kind == FLUSH:
            os.fdatasync(self._fd)
        elif entry.kind == DISCARD:
            self._discard(entry)
        else:
            for start in range(0, entry.length, LARGEST):
                self._write(entry.offset + start, memoryview(bytes(min(LARGEST, entry.length - start))))
        if entry.fua:
            os.fdatasync(self._fd)
        return _nothing

    def _write(self, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written

    def _discard(self, entry: Entry) -> None:
        """If the file system cannot, nothing is discarded."""
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        with contextlib.suppress(OSError):
            system_call(NUMBERS["fallocate"], self._fd, mode, entry.offset, entry.length)

    def sync(self) -> None:
        """See Target."""
        os.fdatasync(self._fd)

    def read(self, offset: int, length: int) -> bytes:
        """See Target."""
        return os.pread(self._fd, length, offset)

    def close(self) -> None:
        os.close(self._fd)


def _opened(path: Path) -> int:
    """With O_EXCL the kernel refuses a block device that is mounted, or a part of another one (open(2))."""
    exclusive = os.O_EXCL if stat.S_ISBLK(path.stat().st_mode) else 0
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | exclusive)
    except OSError as error:
        raise OSError(error.errno, IN_USE) if error.errno == errno.EBUSY else error from None


def _locked(fd: int, signals: Signals) -> bool:
    try:
        return lock(fd, ImageOptions(), signals)
    except OSError as error:
        # Some network file systems have no locks.
        raise OSError(
            error.errno, f"it cannot be locked ({error.strerror}); take a copy on another file system"
        ) from None


class SocketTarget:
    """A disk behind a vhost-user socket."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.size = driver.capacity

    def begin(self, entry: Entry) -> Callable[[], None]:
        """See Target."""
        driver = self._driver
        if entry.kind == WRITE and entry.length <= PIECE and not entry.fua:
            return self._ending(driver.begin(VIRTIO_BLK_T_OUT, entry.offset // SECTOR, bytes(entry.data)))
        if entry.kind == FLUSH:
            return self._ending(driver.begin(VIRTIO_BLK_T_FLUSH, 0))
        if entry.kind == WRITE:
            driver.write(entry.offset, bytes(entry.data))
        elif entry.kind == DISCARD:
            driver.discard(entry.offset, entry.length)
        else:
            driver.write_zeroes(entry.offset, entry.length, unmap=entry.may_unmap)
        if entry.fua:
            driver.flush()
        return _nothing

    def _ending(self, begun: Begun) -> Callable[[], None]:
        def end() -> None:
            status = self._driver.end(begun).status
            if status != VIRTIO_BLK_S_OK:
                raise OSError(errno.EIO, f"the back end completed a request with status {status}")

        return end

    def sync(self) -> None:
        """See Target."""
        with contextlib.suppress(Unsupported):
            self._driver.flush()

    def read(self, offset: int, length: int) -> bytes:
        """See Target."""
        return self._driver.read(offset, length)


def _nothing() -> None:
    """What has ended already."""


@dataclass(slots=True)
class Played:
    """What was done: requests; those that the recording or the disk could not do; seconds as recorded and needed."""

    requests: int = 0
    # They had failed or not ended in the recording.
    left_out: int = 0
    unsupported: int = 0
    recorded_seconds: float = 0.0
    seconds: float = 0.0


class Player:
    """Plays one recording on one disk."""

    def __init__(self, recording: Recording, target: Target) -> None:
        self._target = target
        playable = [entry for entry in recording if entry.kind != MARK]
        # By `began` is in the order in which they had begun.
        self._entries = sorted(
            (each for each in playable if _is_playable(each)), key=lambda each: (each.began, each.index)
        )
        self.played = Played(left_out=len(playable) - len(self._entries))
        # Those in flight, by index.
        self._ends: dict[int, tuple[Entry, Callable[[], None]]] = {}

    def play(self, *, timed: bool, check: Callable[[], None] = _nothing) -> Played:
        """Play all of it, at the recorded times if `timed`. `check` is called now and then. Raises OSError."""
        start, first = time.monotonic_ns(), self._entries[0].begin_ns if self._entries else 0
        for entry in self._entries:
            check()
            if timed:
                self._wait_until(start + entry.begin_ns - first, check)
            self._make_way(entry)
            self._begin(entry)
        self._end_all()
        self._target.sync()
        if self._entries:
            self.played.recorded_seconds = (max(each.end_ns for each in self._entries) - first) / 1e9
        self.played.seconds = (time.monotonic_ns() - start) / 1e9
        return self.played

    def _wait_until(self, moment: int, check: Callable[[], None]) -> None:
        while (left := moment - time.monotonic_ns()) > 0:
            time.sleep(min(left / 1e9, 0.1))
            check()

    def _make_way(self, entry: Entry) -> None:
        """Wait for all that has to end before this begins."""
        for index, (other, _) in tuple(self._ends.items()):
            if index < entry.began or _overlap(entry, other) or len(self._ends) >= MOST_IN_FLIGHT:
                self._end(index)

    def _begin(self, entry: Entry) -> None:
        try:
            self._ends[entry.index] = entry, self._target.begin(entry)
            self.played.requests += 1
        except Unsupported:
            self.played.unsupported += 1

    def _end(self, index: int) -> None:
        _, end = self._ends.pop(index)
        end()

    def _end_all(self) -> None:
        for index in tuple(self._ends):
            self._end(index)

    def differences(self, check: Callable[[], None] = _nothing) -> Iterator[tuple[int, int]]:
        """The ranges (offset, length) that do not have what was written last. Raises OSError."""
        unit = _unit(self._entries)
        last = _last_changes(self._entries, unit)
        for block in sorted(last):
            check()
            entry = last[block]
            start = block * unit
            expected = _content(entry, start, unit)
            if expected is not None and self._target.read(start, unit) != expected:
                yield start, unit


def _is_playable(entry: Entry) -> bool:
    return entry.result == 0 and not entry.unfinished


def _overlap(one: Entry, other: Entry) -> bool:
    both = one.kind in CHANGES and other.kind in CHANGES
    return both and one.offset < other.offset + other.length and other.offset < one.offset + one.length


def _unit(entries: Sequence[Entry]) -> int:
    """The largest size of blocks of which all ranges are whole multiples."""
    numbers = (number for each in entries if each.kind in CHANGES for number in (each.offset, each.length))
    return math.gcd(LARGEST, *numbers)


def _last_changes(entries: Sequence[Entry], unit: int) -> dict[int, Entry]:
    """By the number of each block that was changed: what changed it last."""
    last: dict[int, Entry] = {}
    for entry in entries:
        if entry.kind in CHANGES:
            last.update(dict.fromkeys(range(entry.offset // unit, (entry.offset + entry.length) // unit), entry))
    return last


def _content(entry: Entry, start: int, size: int) -> bytes | None:
    """What has to be there; None: anything."""
    if entry.kind == WRITE:
        return bytes(entry.data[start - entry.offset : start - entry.offset + size])
    return bytes(size) if entry.kind in (ZERO, SECURE_ERASE) else None
