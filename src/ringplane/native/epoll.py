"""epoll_ctl(2): the kernel's include/uapi/linux/eventpoll.h."""

from __future__ import annotations

import select

import numpy as np

from ringplane.system import libc
from ringplane.system.syscall_numbers import MACHINE, NUMBERS

EPOLL_CTL_ADD = 1

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
