"""A file that has the content of a disk in some state, through FUSE. What is written to it is kept in memory.

The file system has one file, of which one state after the other is seen: the kernel forgets what it has read of it
whenever it is opened.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import mfusepy
import numpy as np

from ringplane.crash.crash_states import State
from ringplane.crash.disk_state import Change, DiskState
from ringplane.crash.sector_contents import BASE, CHECKED, IN_CHECK, NOWHERE, ZEROS, Numbers, Places, runs
from ringplane.crash.timeline import SECTOR
from ringplane.system.aside import start_thread

NAME = "disk.img"

# Seconds until a file system is mounted, on a machine that is busy.
PATIENCE = 60.0
# For how many seconds the kernel may remember names and attributes, which never change.
REMEMBER = 86_400.0

# <linux/falloc.h>
PUNCH_HOLE, ZERO_RANGE = 0x02, 0x10


class View:
    """The content of the file: a state, and what a check has written since then."""

    def __init__(self, disk: DiskState) -> None:
        self._disk = disk
        self.size = disk.contents.sectors * SECTOR
        self._checked: dict[int, bytes] = {}
        self._undo: list[Change] = []

    def show(self, state: State) -> None:
        """From now on the file has this content."""
        for first, before in reversed(self._undo):
            self._disk.change(first, before)
        self._undo.clear()
        self._checked.clear()
        self._disk.become(state)

    def read(self, offset: int, size: int) -> bytes:
        """Less is read at the end of the file."""
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        first = offset // SECTOR
        data = b"".join(self._parts(first, -(-end // SECTOR)))
        return data[offset - first * SECTOR : end - first * SECTOR]

    def _parts(self, first: int, end: int) -> Iterator[bytes | memoryview]:
        places = self._places(first, end)
        for start, stop in runs(places):
            place = int(places[start])
            if place == NOWHERE:
                yield bytes((stop - start) * SECTOR)
            elif place >= IN_CHECK:
                yield b"".join(self._checked[sector] for sector in range(first + start, first + stop))
            else:
                yield self._disk.contents.data_of(place, stop - start)

    def _places(self, first: int, end: int) -> Places:
        numbers = self._disk.numbers[first:end]
        places = self._disk.contents.places[numbers]
        here = np.arange(first, end)
        places = np.where(numbers == BASE, here, places)
        return np.where(numbers == CHECKED, here | IN_CHECK, places)

    def write(self, offset: int, data: bytes) -> None:
        """The range is within the file."""
        end = offset + len(data)
        first, behind = offset // SECTOR, -(-end // SECTOR)
        if offset % SECTOR or end % SECTOR:
            whole = self.read(first * SECTOR, (behind - first) * SECTOR)
            data = whole[: offset - first * SECTOR] + data + whole[end - first * SECTOR :]
        for sector in range(first, behind):
            start = (sector - first) * SECTOR
            self._checked[sector] = data[start : start + SECTOR]
        self._change(first, np.full(behind - first, CHECKED, np.uint32))

    def zero(self, offset: int, size: int) -> None:
        """The range is within the file."""
        first, behind = -(-offset // SECTOR), (offset + size) // SECTOR
        if first >= behind:
            self.write(offset, bytes(size))
            return
        self.write(offset, bytes(first * SECTOR - offset))
        self.write(behind * SECTOR, bytes(offset + size - behind * SECTOR))
        self._change(first, np.full(behind - first, ZEROS, np.uint32))

    def _change(self, first: int, numbers: Numbers) -> None:
        if len(numbers):
            self._undo.append(self._disk.change(first, numbers))


class ViewFiles(mfusepy.Operations):  # type: ignore[misc]
    """The file system with the file."""

    use_ns = True

    def __init__(self, view: View) -> None:
        self._view = view
        self.mounted = threading.Event()

    def init(self, path: str) -> None:
        self.mounted.set()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        known = {"/": (stat.S_IFDIR | 0o755, 0), f"/{NAME}": (stat.S_IFREG | 0o600, self._view.size)}
        if path not in known:
            raise OSError(errno.ENOENT, path)
        mode, size = known[path]
        return {
            "st_mode": mode,
            "st_size": size,
            "st_blocks": size // SECTOR,
            "st_nlink": 1,
            "st_uid": os.getuid(),
            "st_gid": os.getgid(),
        }

    def open(self, path: str, flags: int) -> int:
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return self._view.read(offset, size)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._check(offset, len(data))
        self._view.write(offset, data)
        return len(data)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        if length != self._view.size:
            raise OSError(errno.EPERM, "it is a disk")
        return 0

    def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> int:
        self._check(offset, size)
        if mode & (PUNCH_HOLE | ZERO_RANGE):
            self._view.zero(offset, size)
        return 0

    def _check(self, offset: int, size: int) -> None:
        if offset + size > self._view.size:
            raise OSError(errno.ENOSPC, "beyond the end of the disk")

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        return 0


def mount(view: View, folder: Path) -> Path:
    """Mount the file system of a view there as long as this process lives; returns the path of the file.

    Raises OSError.
    """
    files = ViewFiles(view)
    ended = threading.Event()

    def serve() -> None:
        try:
            mfusepy.FUSE(
                *(files, str(folder)),
                foreground=True,
                nothreads=True,
                fsname="ringplane",
                entry_timeout=REMEMBER,
                attr_timeout=REMEMBER,
            )
        except RuntimeError:
            # libfuse has said why, on its standard error.
            pass
        finally:
            ended.set()
            files.mounted.set()

    start_thread("ringplane-view", serve)
    if not files.mounted.wait(PATIENCE) or ended.is_set():
        raise OSError(errno.EIO, "a file system in user space cannot be mounted", str(folder))
    return folder / NAME
