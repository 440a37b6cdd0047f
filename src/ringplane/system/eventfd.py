"""eventfd(2): whether a file descriptor is one, and how to empty one without blocking."""

from __future__ import annotations

import contextlib
import errno
import os

from ringplane.system import procfs

# What /proc/PID/fd shows for an eventfd (proc(5)).
EVENTFD = "anon_inode:[eventfd]"


def check_eventfd(fd: int, name: str) -> None:
    """Raise OSError if the fd is not an eventfd: others can fill up or block."""
    kind = procfs.kind_of(fd)
    if kind != EVENTFD if kind else not _looks_like_eventfd(fd):
        raise OSError(errno.EINVAL, f"the {name} is not an eventfd")


def _looks_like_eventfd(fd: int) -> bool:
    """Without /proc: whether the fd has the inode that all eventfds share, and that no file, pipe or socket has."""
    eventfd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        return os.path.sameopenfile(fd, eventfd)
    finally:
        os.close(eventfd)


def empty(fd: int) -> None:
    """Read the counter, so that the next poller of this eventfd does not find old events in it; never blocks."""
    with contextlib.suppress(OSError):
        # Others may have cleared O_NONBLOCK, which belongs to the shared file; RWF_NOWAIT does not.
        os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT)
