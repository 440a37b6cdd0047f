"""The disks that recordings are played on: images, and disks behind the socket of any back end."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

from ringplane.block.image_lock import lock
from ringplane.driver.driver import PIECE, Begun, Driver, Unsupported, check_status
from ringplane.native.falloc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
from ringplane.options.image_options import ImageOptions
from ringplane.recordings.entries import DISCARD, FLUSH, WRITE, Entry
from ringplane.system import libc
from ringplane.system.signals import NONE, Signals
from ringplane.virtio.blk import (
    SECTOR,
    SEGMENT_F_UNMAP,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
)

# Entries at a time.
MOST_IN_FLIGHT = 64

# Zeros that are written at a time.
MOST_ZEROS = 1 << 20

IN_USE = "another program uses it; stop that program, or take a copy"


class Target(Protocol):
    """The disk. Its methods raise OSError and Unsupported."""

    size: int

    def begin(self, entry: Entry) -> Callable[[], None]:
        """Begin what the entry says; what is returned waits for its end. At most MOST_IN_FLIGHT are in flight."""

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
        elif entry.kind == DISCARD:
            if not self._allocate(FALLOC_FL_PUNCH_HOLE, entry):
                raise Unsupported("the file system cannot discard a range of a file")
        elif entry.kind != FLUSH:
            self._fill_with_zeros(entry)
        if entry.fua or entry.kind == FLUSH:
            os.fdatasync(self._fd)
        return _nothing

    def _write(self, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written

    def _fill_with_zeros(self, entry: Entry) -> None:
        if self._allocate(FALLOC_FL_PUNCH_HOLE if entry.may_unmap else FALLOC_FL_ZERO_RANGE, entry):
            return
        for offset, size in entry.pieces(MOST_ZEROS):
            self._write(offset, memoryview(bytes(size)))

    def _allocate(self, mode: int, entry: Entry) -> bool:
        """fallocate(2) with the range of the entry; whether the file system can do that."""
        try:
            libc.fallocate(self._fd, mode | FALLOC_FL_KEEP_SIZE, entry.offset, entry.length)
        except OSError:
            return False
        return True

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


def _nothing() -> None:
    """What has ended already."""


class SocketTarget:
    """A disk behind a vhost-user socket. An entry becomes as many requests as the back end needs for its size."""

    def __init__(self, driver: Driver) -> None:
        """Raises OSError if nothing can be written to it."""
        if driver.features & VIRTIO_BLK_F_RO:
            raise OSError(errno.EROFS, "the disk is read-only; serve it writable")
        self._driver = driver
        self.size = driver.capacity
        # All entries in flight have room in the ring, each for so many requests.
        self._most = max(1, driver.room // MOST_IN_FLIGHT)

    def begin(self, entry: Entry) -> Callable[[], None]:
        """See Target."""
        self._driver.check_range(entry.offset, entry.length)
        begun: deque[Begun] = deque()
        for kind, sector, data in self._requests(entry):
            if len(begun) == self._most:
                self._end(begun.popleft(), entry)
            begun.append(self._driver.begin(kind, sector, data))
        return partial(self._end_all, begun, entry)

    def _requests(self, entry: Entry) -> Iterator[tuple[int, int, bytes]]:
        """The kind of each, its sector, and its data."""
        driver = self._driver
        if entry.kind == FLUSH:
            yield VIRTIO_BLK_T_FLUSH, 0, b""
        elif entry.kind == WRITE:
            for offset, size in entry.pieces(PIECE):
                start = offset - entry.offset
                yield VIRTIO_BLK_T_OUT, offset // SECTOR, bytes(entry.data[start : start + size])
        elif entry.kind == DISCARD:
            for data in driver.range_requests("discard", entry.offset, entry.length):
                yield VIRTIO_BLK_T_DISCARD, 0, data
        elif driver.features & VIRTIO_BLK_F_WRITE_ZEROES:
            flags = SEGMENT_F_UNMAP if entry.may_unmap else 0
            for data in driver.range_requests("write_zeroes", entry.offset, entry.length, flags):
                yield VIRTIO_BLK_T_WRITE_ZEROES, 0, data
        else:
            for offset, size in entry.pieces(PIECE):
                yield VIRTIO_BLK_T_OUT, offset // SECTOR, bytes(size)

    def _end(self, begun: Begun, entry: Entry) -> None:
        check_status(self._driver.end(begun).status, f"entry {entry.index} of the recording")

    def _end_all(self, begun: deque[Begun], entry: Entry) -> None:
        while begun:
            self._end(begun.popleft(), entry)
        if entry.fua:
            self.sync()

    def sync(self) -> None:
        """See Target."""
        with contextlib.suppress(Unsupported):
            self._driver.flush()

    def read(self, offset: int, length: int) -> bytes:
        """See Target."""
        return self._driver.read(offset, length)
