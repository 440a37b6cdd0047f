"""The allowed kinds of a front end's file descriptors, for each message (sockets: transport.py)."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping

from ringplane.system.eventfd import check_eventfd
from ringplane.vhost_user.connection import Message
from ringplane.vhost_user.messages import Request


class BadFd(ValueError):
    """The front end handed over a file descriptor that cannot be used; the text says why."""


def check_fds(message: Message) -> None:
    """Check all fds of a message that are used; raises BadFd, and OSError for one that must be an eventfd."""
    check = CHECKS.get(message.request)
    if check is not None:
        for fd in message.fds:
            check(fd)


def take_notifier(message: Message) -> int:
    """The fd that came with the message, non-blocking, or -1; the caller closes it.

    A front end must not be able to block our thread with a full eventfd, pipe or socket (user-mode Linux's).
    O_NONBLOCK belongs to the file, so the front end could clear it again: signaller.py handles that.
    """
    for fd in message.fds:
        os.set_blocking(fd, False)
    return next(iter(message.take_fds()), -1)


def _check_kick(fd: int) -> None:
    check_eventfd(fd, "kick fd")


def _check_notifier(fd: int) -> None:
    """Check an fd for notifications; user-mode Linux uses pipes and sockets instead of eventfds."""
    mode = os.fstat(fd).st_mode
    if not stat.S_ISSOCK(mode) and not stat.S_ISFIFO(mode):
        check_eventfd(fd, "fd")


def _check_channel(fd: int) -> None:
    _refuse_unless(stat.S_ISSOCK(os.fstat(fd).st_mode), "the fd is not a socket")


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
    Request.SET_BACKEND_REQ_FD: _check_channel,
}
