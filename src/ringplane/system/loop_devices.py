"""Loop devices (loop(4)) that a file is attached to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

DEVICES = Path("/sys/block")

# <linux/loop.h>; struct loop_info64 has 232 bytes, the first of which are the device and the inode of the file.
LOOP_CLR_FD, LOOP_GET_STATUS64 = 0x4C01, 0x4C05
STATUS_SIZE, FILE = 232, struct.Struct("QQ")

# In seconds. The kernel detaches one when its last user has closed it: udev may look at it.
PATIENCE, BETWEEN_TRIES = 5.0, 0.01


def detach_all(file: os.stat_result) -> list[str]:
    """Detach this file from its loop devices; returns their names. Raises OSError if one is still in use."""
    names = list(attached(file))
    end = time.monotonic() + PATIENCE
    while in_use := list(attached(file)):
        for name in in_use:
            with contextlib.suppress(FileNotFoundError), opened(name) as fd:
                fcntl.ioctl(fd, LOOP_CLR_FD, 0)
        if time.monotonic() > end:
            raise OSError(errno.EBUSY, f"/dev/{in_use[0]} is in use, and cannot be detached")
        time.sleep(BETWEEN_TRIES)
    return names


def attached(file: os.stat_result) -> Iterator[str]:
    """The names of the loop devices with this file."""
    for path in DEVICES.glob("loop*/loop"):
        # It may be detached, or removed, at any moment.
        with contextlib.suppress(OSError), opened(path.parent.name) as fd:
            status = fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(STATUS_SIZE))
            if FILE.unpack_from(status) == (file.st_dev, file.st_ino):
                yield path.parent.name


@contextlib.contextmanager
def opened(name: str) -> Iterator[int]:
    """The device."""
    fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
