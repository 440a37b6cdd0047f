"""The lock of an image: the bytes that QEMU locks, so that QEMU and ringplane refuse each other's images."""

from __future__ import annotations

import fcntl
import os
import struct
import time

from ringplane.options.image_options import ImageOptions
from ringplane.system.signals import Signals

# In QEMU's block/file-posix.c: one range for an opener's own uses of the image, one for those that it denies to others.
LOCK_USES, LOCK_DENIES = 100, 200
PERMISSION_READ, PERMISSION_WRITE, PERMISSION_RESIZE = 0, 1, 3

# fcntl(2): struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid
FLOCK = struct.Struct("hhqqi4x")

# Seconds
LOCK_PATIENCE = 0.5


def lock(fd: int, options: ImageOptions, signals: Signals) -> bool:
    """Lock our uses of the image and those that we deny; False if somebody else has conflicting locks.

    Locks belong to open file descriptions (fcntl(2), F_OFD_SETLK): they end with the last copy of the fd, also when the
    process is killed, and two opens in one process exclude each other too. The kernel's work for a killed process may
    hold a copy for some milliseconds, so the lock is tried for a while. Raises OSError if there are no locks,
    Interrupted.
    """
    deadline = time.monotonic() + LOCK_PATIENCE
    while not (locked := _try_lock(fd, options)) and time.monotonic() <= deadline:
        signals.check()
        time.sleep(LOCK_PATIENCE / 50)
    return locked


def _try_lock(fd: int, options: ImageOptions) -> bool:
    uses = {PERMISSION_READ} if options.read_only else {PERMISSION_READ, PERMISSION_WRITE}
    denies = set() if options.share_rw else {PERMISSION_WRITE, PERMISSION_RESIZE}
    try:
        for byte in [LOCK_USES + permission for permission in uses] + [LOCK_DENIES + p for p in denies]:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except BlockingIOError:
        # Another program has a write lock.
        return False
    for byte in [LOCK_DENIES + permission for permission in uses] + [LOCK_USES + p for p in denies]:
        # A test for a write lock finds the read locks of all others.
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        if FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
            return False
    return True
