"""Requests to the process that opens files, one at a time, and its answers, each within a time limit.

What a request has made whose answer came too late is removed before the next request is sent.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Callable

from ringplane.opener.open_requests import ANSWER, CREATE, LISTEN, READY, UNLINK, Request

# Most fds that are received at a time. More than one is wrong.
SOME_FDS = 8
FDS_SIZE = SOME_FDS * struct.calcsize("i")

HIGHEST_NUMBER = (1 << 32) - 1

# Instead of 0, for an answer whose fd did not fit into this process. No answer has it.
NO_ROOM = -1

KILLED = "it was killed, or has failed"

# Raises WrongAnswer for an fd that is not what was asked for.
Check = Callable[[int], None]


class WrongAnswer(Exception):
    """What a process that is as it was started never sends; the text says what it is."""


class Exchange:
    """Our end of the socket. Its methods are called by one thread at a time, except `postpone`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        # That of the last request, and this one if it has no answer yet.
        self._number = READY
        self.unanswered: Request | None = None
        # What has to be removed before anything else is asked for.
        self._removals: list[Request] = []

    def ask(self, request: Request, check: Check | None, deadline: float) -> tuple[int, int]:
        """The errno and the fd of the answer, of which one is there. Raises TimeoutError, OSError, WrongAnswer."""
        try:
            self._settle(deadline)
            return self._exchange(request, check, deadline)
        except TimeoutError:
            if self.unanswered is not request:
                self.postpone(request)
            raise

    def postpone(self, request: Request) -> None:
        """It was not sent. Only a removal is sent later, because nobody asks for it again."""
        if request.kind == UNLINK:
            self._removals.append(request)

    def _settle(self, deadline: float) -> None:
        """Finish what was left: the answer that came too late, and removals. Raises as `ask`."""
        if (late := self.unanswered) is not None:
            code, fds = self._answer(deadline)
            for fd in fds:
                os.close(fd)
            if code in (0, NO_ROOM):
                self._undo(late)
        while self._removals:
            self._exchange(self._removals.pop(0), None, deadline)

    def _undo(self, done: Request) -> None:
        """Have `_settle` remove what this request has made."""
        if done.kind in (CREATE, LISTEN):
            self._removals.append(Request(UNLINK, done.folder, done.path))

    def _exchange(self, request: Request, check: Check | None, deadline: float) -> tuple[int, int]:
        """As `ask`, at once."""
        self._number = self._number % HIGHEST_NUMBER + 1
        self._sock.settimeout(_left(deadline))
        self._sock.send(request.packed(self._number))
        self.unanswered = request
        code, fds = self._answer(deadline)
        if code == NO_ROOM:
            self._undo(request)
            self._settle(deadline)
        with contextlib.ExitStack() as undo:
            for fd in fds:
                undo.callback(os.close, fd)
            if len(fds) != (check is not None and code == 0):
                raise WrongAnswer(f"it sent {len(fds)} file descriptors")
            if not fds or check is None:
                return code, -1
            check(fds[0])
            undo.pop_all()
            return 0, fds[0]

    def _answer(self, deadline: float) -> tuple[int, list[int]]:
        """The errno and the fds, which are ours, of the answer to the last request. Raises as `ask`.

        NO_ROOM: it was done, but this process may not open one more file.
        """
        self._sock.settimeout(_left(deadline))
        message, fds, lost = _receive(self._sock)
        try:
            number, code, _ = unpacked(message)
            if number != self._number:
                raise WrongAnswer("it answered what it was not asked")
            if lost and (fds or code):
                raise WrongAnswer("it sent more file descriptors than it was asked for")
        except WrongAnswer:
            for fd in fds:
                os.close(fd)
            raise
        self.unanswered = None
        return NO_ROOM if lost else code, fds


def _left(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())


def _receive(sock: socket.socket) -> tuple[bytes, list[int], bool]:
    """A message, its fds, which are ours, and whether there was no room for others. Raises OSError."""
    message, ancillary, flags, _ = sock.recvmsg(ANSWER.size + 1, socket.CMSG_SPACE(FDS_SIZE), socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds += (fd for (fd,) in struct.iter_unpack("i", data[: len(data) // 4 * 4]))
    return message, fds, bool(flags & socket.MSG_CTRUNC)


def unpacked(message: bytes) -> tuple[int, int, int]:
    """Number, errno and folder of an answer; raises WrongAnswer."""
    if not message:
        raise WrongAnswer(KILLED)
    if len(message) != ANSWER.size:
        raise WrongAnswer("it sent a message that is not an answer")
    number, code, folder = ANSWER.unpack(message)
    if code and code not in errno.errorcode:
        raise WrongAnswer("it sent an unknown error")
    return number, code, folder
