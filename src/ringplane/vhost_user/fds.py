"""What the file descriptors of a front end may be, checked when they arrive.

A front end could hand over its own end of the connection, as a call fd say: this process would keep it open, never see
the connection end, and the disk would be lost to all others. Such an end is connected to a socket that has a name, or
to none yet. Notifiers and the back-end channel are made by eventfd(2), pipe(2) and socketpair(2), which give no names.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Mapping

from ringplane.dataplane.worker import check_eventfd
from ringplane.vhost_user.connection import Message
from ringplane.vhost_user.messages import Request


class BadFd(ValueError):
    """The front end handed over a file descriptor that cannot be used; the text says why."""


def check_fds(message: Message) -> None:
    """Check all fds of a message that are used for something; raises BadFd, and OSError for what is not an eventfd."""
    check = CHECKS.get(message.request)
    if check is not None:
        for fd in message.fds:
            check(fd)


def _check_kick(fd: int) -> None:
    _refuse_unless(not stat.S_ISSOCK(os.fstat(fd).st_mode), "a kick fd is not an eventfd but a socket")
    check_eventfd(fd, "kick fd")


def _check_notifier(fd: int) -> None:
    """User-mode Linux has pipes and sockets for eventfds."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        _check_socket(fd)
    elif not stat.S_ISFIFO(mode):
        check_eventfd(fd, "fd")


def _check_socket(fd: int) -> None:
    _refuse_unless(stat.S_ISSOCK(os.fstat(fd).st_mode), "the fd is not a socket")
    with socket.socket(fileno=os.dup(fd)) as sock:
        _refuse_unless(sock.family == socket.AF_UNIX, "the fd is not a UNIX socket")
        try:
            peer = sock.getpeername()
        except OSError:
            # A listening one too. It could still be connected to us.
            raise BadFd("the fd is a socket that is not connected; one of socketpair(2) is needed") from None
        _refuse_unless(not peer, f"the fd is a socket connected to {peer!r}; one of socketpair(2) is needed")


def _check_memory(fd: int) -> None:
    mode = os.fstat(fd).st_mode
    usable = stat.S_ISREG(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
    _refuse_unless(usable, "the fd is not memory: a memfd, another file or a device is needed")


def _refuse_unless(good: bool, why: str) -> None:
    if not good:
        raise BadFd(why)


CHECKS: Mapping[object, Callable[[int], None]] = {
    Request.SET_MEM_TABLE: _check_memory,
    Request.ADD_MEM_REG: _check_memory,
    Request.SET_LOG_BASE: _check_memory,
    Request.SET_INFLIGHT_FD: _check_memory,
    Request.SET_VRING_KICK: _check_kick,
    Request.SET_VRING_CALL: _check_notifier,
    Request.SET_VRING_ERR: _check_notifier,
    Request.SET_BACKEND_REQ_FD: _check_socket,
}
