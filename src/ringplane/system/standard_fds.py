"""The standard file descriptors, 0 to 2: closed ones are occupied, and printed text reaches no front end.

A process may be started with some of them closed. The first files that it opens then get their numbers: a guest's disk
could be file descriptor 2, and printing an error would write into it.
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
    """A stream that discards its text."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


def occupy() -> None:
    """Open /dev/null as every closed standard fd, so that no later file is one. Child processes inherit it."""
    while (fd := _open_null()) in STANDARD:
        os.set_inheritable(fd, True)
    os.close(fd)


def occupy_streams() -> None:
    """As `occupy`, in a process of our own; also replaces `sys.stdout` and `sys.stderr`, which are None if closed."""
    occupy()
    sys.stdout = sys.stdout or Nowhere()
    sys.stderr = sys.stderr or Nowhere()


def move_socket(fd: int) -> int:
    """The new number of an inherited socket; no standard descriptor refers to that socket afterwards.

    Under inetd(8) and systemd, standard input, output and error may all be the connection.
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
    # In a jail without /dev: a file that stays empty. Writing fails, as it does with a closed descriptor.
    fd = os.memfd_create("null", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW)
    return fd


def _is_socket(fd: int) -> bool:
    with contextlib.suppress(OSError, OverflowError):
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    return False
