"""The file of a view in a file system in user space (FUSE), which has no other file.

One state after the other is seen in it. The kernel keeps what it has read of it, and is notified of what has changed.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

import mfusepy

from ringplane.crash.crash_states import State
from ringplane.crash.image_view import Range, View
from ringplane.crash.timeline import SECTOR
from ringplane.system.aside import start_thread
from ringplane.system.loop_devices import detach_all
from ringplane.system.signals import ENDING

NAME = "disk.img"

# Seconds until a file system is mounted, on a machine that is busy.
PATIENCE = 60.0
# For how many seconds the kernel may remember names and attributes, which never change.
REMEMBER = 86_400.0
# In seconds: the kernel reports a moment later that a process has closed the file.
CLOSING = 0.05

# <linux/falloc.h>
PUNCH_HOLE, ZERO_RANGE = 0x02, 0x10

# <linux/fuse.h>: struct fuse_out_header of a notification, and struct fuse_notify_inval_inode_out.
FORGET_RANGE = struct.Struct("<IiQQqq")
FUSE_NOTIFY_INVAL_INODE = 2
# More ranges are forgotten as one.
MOST_RANGES = 128


class ViewFiles(mfusepy.Operations):  # type: ignore[misc]
    """The file system with the file."""

    use_ns = True

    def __init__(self, view: View) -> None:
        self._view = view
        self.mounted = threading.Event()
        # How often the file is open, and whether it is not.
        self._opened = 0
        self.closed = threading.Event()
        self.closed.set()

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
        self._opened += 1
        self.closed.clear()
        return 0

    def release(self, path: str, fh: int) -> int:
        self._opened -= 1
        if not self._opened:
            self.closed.set()
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


class MountedView:
    """A view that is mounted as long as this process lives, and then not any more, however it ends.

    `path` is its file. Methods raise OSError, and are called by the main thread.
    """

    def __init__(self, view: View, folder: Path) -> None:
        self._view, self._folder = view, folder
        self._files = ViewFiles(view)
        self._ended = threading.Event()
        start_thread("ringplane-view", self._serve)
        self._files.mounted.wait(PATIENCE)
        if not self._files.mounted.is_set() or self._ended.is_set():
            raise OSError(errno.EIO, "a file system in user space cannot be mounted", str(folder))
        _undo_libfuse()
        self.path = folder / NAME
        # The inode has the same number as long as this is open.
        file = os.open(self.path, os.O_PATH | os.O_CLOEXEC)
        self._stat = os.fstat(file)
        self._fuse = _fuse_fd()

    def _serve(self) -> None:
        try:
            mfusepy.FUSE(
                *(self._files, str(self._folder)),
                foreground=True,
                nothreads=True,
                kernel_cache=True,
                fsname="ringplane",
                entry_timeout=REMEMBER,
                attr_timeout=REMEMBER,
            )
        except RuntimeError:
            # libfuse has said why, on its standard error.
            pass
        finally:
            self._ended.set()
            self._files.mounted.set()

    def show(self, state: State) -> None:
        """From now on the file has this content. Nobody has it open."""
        changed: Sequence[Range] = self._view.show(state)
        if len(changed) > MOST_RANGES:
            changed = [(changed[0][0], changed[-1][1])]
        for start, end in changed:
            # It waits until what is being read there has been read.
            size = FORGET_RANGE.size
            place = self._stat.st_ino, start, end - start
            os.write(self._fuse, FORGET_RANGE.pack(size, FUSE_NOTIFY_INVAL_INODE, 0, *place))

    def close(self) -> list[str]:
        """Nobody has the file open when this returns; all processes that had have ended.

        Loop devices are detached: returns their names.
        """
        detached = [] if self._files.closed.wait(CLOSING) else detach_all(self._stat)
        if not self._files.closed.wait(PATIENCE):
            raise OSError(errno.EBUSY, "the kernel still uses the image after the check has ended: let it release it")
        if self._ended.is_set():
            raise OSError(errno.EIO, "it is not mounted any more", str(self.path))
        return detached


def _undo_libfuse() -> None:
    """Signals end the process, and not only the file system: libfuse has installed handlers of its own."""
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)


def _fuse_fd() -> int:
    """The connection to the kernel, which libfuse has opened; commands do not inherit it."""
    for each in map(int, os.listdir("/proc/self/fd")):
        try:
            found = os.readlink(f"/proc/self/fd/{each}") == "/dev/fuse"
        except FileNotFoundError:
            continue
        if found:
            os.set_inheritable(each, False)
            return each
    raise OSError(errno.EIO, "/dev/fuse is not open")
