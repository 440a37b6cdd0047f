"""Memory for machine code that comes after a process has given up the right to make any: it can run it, and only that.

It is a memfd with two mappings. One process maps it for writing. Then it seals the memfd: nobody can get another
mapping for writing, nor write through the fd, nor change the size. The other process, which runs the code, sees the
seals before it maps the memfd for reading and executing. So it cannot change its own code, and its filter of system
calls need not allow it to map anything executable.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

from ringplane.system import libc

# Addresses, and memory as far as it is written.
SIZE = 64 << 20

# include/uapi/linux/fcntl.h, since Linux 5.1.
F_SEAL_FUTURE_WRITE = 0x10
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE


def create() -> int:
    """An fd for both processes. Raises OSError."""
    fd = os.memfd_create("ringplane-code", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, SIZE)
    return fd


def map_for_writing(fd: int) -> mmap.mmap:
    """The memory for the process that writes, and for nobody else from now on. Raises OSError."""
    window = mmap.mmap(fd, SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return window


def map_for_running(fd: int) -> int:
    """The address of the memory in the process that runs the code. Raises OSError, also if it is not sealed."""
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
        raise OSError(errno.EPERM, "the memory for code is not sealed")
    return libc.mmap_code(fd, SIZE)
