"""epoll_ctl(2): the kernel's include/uapi/linux/eventpoll.h."""

from __future__ import annotations

import errno
import select

import numpy as np

from ringplane.system import libc
from ringplane.system.syscall_numbers import MACHINE, NUMBERS

EPOLL_CTL_ADD, EPOLL_CTL_MOD = 1, 3

# struct epoll_event; packed only on x86-64
EPOLL_EVENT = np.dtype([("events", "<u4"), ("data", "<i8")], align=MACHINE != "x86_64")
EPOLL_EVENT_SIZE = EPOLL_EVENT.itemsize


def add_edge_triggered(epoll_fd: int, fd: int, data: int) -> None:
    """Watch `fd`, edge-triggered; each event returns the 64 bits of `data`, for which select.epoll has no parameter.

    Raises OSError.
    """
    event = np.zeros(1, EPOLL_EVENT)
    event["events"], event["data"] = select.EPOLLIN | select.EPOLLET, data
    libc.system_call(NUMBERS["epoll_ctl"], epoll_fd, EPOLL_CTL_ADD, fd, int(event.ctypes.data))


def has_pwait2() -> bool:
    """Whether there is epoll_pwait2(2): since Linux 5.11, and sandboxes may forbid it."""
    try:
        libc.system_call(NUMBERS["epoll_pwait2"], -1, 0, 1, 0, 0, 0)
    except OSError as error:
        return error.errno != errno.ENOSYS
    return True
