"""The standard file descriptors, 0 to 2: closed ones are occupied, and what is printed reaches no front end.

A process may be started with some of them closed. What it opens first gets their numbers then: a guest's disk would be
file descriptor 2, and anything that prints an error writes into it.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import stat
import sys

STANDARD = (0, 1, 2)


class Nowhere(io.TextIOBase):
    """What is printed here is dropped."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


def occupy() -> None:
    """Have no file that is opened from now on be a standard one. Child processes inherit what is there instead."""
    while (fd := _open_null()) in STANDARD:
        os.set_inheritable(fd, True)
    os.close(fd)


def occupy_streams() -> None:
    """The same in a process that is ours, where Python has no `sys.stdout` and `sys.stderr` for closed ones."""
    occupy()
    sys.stdout = sys.stdout or Nowhere()
    sys.stderr = sys.stderr or Nowhere()


def move_socket(fd: int) -> int:
    """The number of an inherited socket that may be a standard one: none is that socket any more afterwards.

    As inetd(8) and systemd have it, standard input, output and error may all be the connection.
    """
    if not _is_socket(fd):
        return fd
    moved = fd if fd not in STANDARD else fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, len(STANDARD))
    null = _open_null()
    for number in STANDARD:
        if _is_socket(number) and os.path.samestat(os.fstat(number), os.fstat(moved)):
            os.dup2(null, number)
    os.close(null)
    return moved


def _open_null() -> int:
    with contextlib.suppress(OSError):
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    # In a jail without /dev: an empty file that stays so. Writing fails, as it does where nothing is open.
    fd = os.memfd_create("null", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW)
    return fd


def _is_socket(fd: int) -> bool:
    with contextlib.suppress(OSError, OverflowError):
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    return False
