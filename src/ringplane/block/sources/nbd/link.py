"""A link: the part of an NBD disk for one I/O thread, with its present connection."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time

import numpy as np

from ringplane.block.events import Event
from ringplane.block.sources.nbd.layout import (
    BAD_COOKIE,
    BAD_LENGTH,
    BAD_MAGIC,
    BROKEN,
    CLOSED,
    ENDLESS,
    FREE,
    LINK,
    OUT_OF_PLACE,
    REQUEST,
    SHUT_DOWN,
    TOO_SHORT,
    UNEXPECTED_TYPE,
)
from ringplane.block.sources.nbd.nbd_units import obey, ready, submit
from ringplane.block.sources.nbd.protocol import CMD_DISC, REQUEST_MAGIC
from ringplane.block.sources.nbd.receiving import AHEAD_SIZE, EAGER
from ringplane.block.sources.nbd.sending import READABLE
from ringplane.block.sources.nbd.silence import is_silent
from ringplane.block.sources.service import ServiceTimes
from ringplane.block.stack import SourcePart
from ringplane.engines.choose_engine import Engine
from ringplane.native.epoll import EPOLL_EVENT
from ringplane.native.sockets import MESSAGE
from ringplane.native.structs import new
from ringplane.native.uio import IOV_MAX, IOVEC

GOODBYE = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0)

# Seconds after which `sync` looks whether an I/O thread uses the link.
SLICE = 0.1

REASONS = {
    CLOSED: "the server closed the connection",
    BROKEN: "the connection broke",
    BAD_MAGIC: "the server sent garbage",
    BAD_COOKIE: "the server replied to a request that it was not sent",
    UNEXPECTED_TYPE: "the server sent a reply of a type that the request cannot have",
    BAD_LENGTH: "the server sent a reply of a wrong length",
    OUT_OF_PLACE: "the server sent data that was not asked for, or twice",
    TOO_SHORT: "the server ended the reply to a read before all data had come",
    SHUT_DOWN: "the server shuts down",
    ENDLESS: "the server does not end its reply to a request",
}
SILENT = "the server's machine, or the network to it, does not answer"

# Sent with close(2): TCP discards what the server has not received, because it may be sent again on another connection.
DISCARDING = struct.pack("ii", 1, 0)


class Link(SourcePart):
    """Owns a LINK, its connection and its eventfds."""

    ranges = backing = 0

    def __init__(self, export: int, slots: int, lost_fd: int, *, patient: bool, merges: bool) -> None:
        """`export`: the address of the EXPORT. `lost_fd` is written to when a connection is lost."""
        self.merges = merges
        with contextlib.ExitStack() as undo:
            self._epoll = undo.enter_context(select.epoll())
            self._wake_fd, self._sync_fd = (_eventfd(undo) for _ in range(2))
            self._fds = undo.pop_all()
        # The connection, and since when there is this one, by time.monotonic_ns().
        self._sock: socket.socket | None = None
        self._since = 0
        self._closed = self._silent = False
        # Whether the I/O thread uses the link, whether another process has its connection, and the lock of who uses the
        # link in place of the I/O thread: never held for long.
        self._attached, self._left, self._lock = False, False, threading.Lock()
        # Held as long as a flush takes.
        self._one_sync = threading.Lock()
        self._requests = new(REQUEST, slots + 1)
        self._requests["slot"] = np.arange(slots + 1)
        self._iovecs, self._ahead = np.zeros(IOV_MAX, IOVEC), np.zeros(AHEAD_SIZE, np.uint8)
        self._message, self._event = np.zeros(1, MESSAGE), np.zeros(1, EPOLL_EVENT)
        self._message["iov"] = self._iovecs.ctypes.data
        self.times = ServiceTimes()
        self._array = new(LINK)
        self.record = self._array[0]
        for name, value in {
            "export": export,
            "requests": self._requests.ctypes.data,
            "slots": slots,
            "times": self.times.address,
            "patient": patient,
            "lost_fd": lost_fd,
            "wake_fd": self._wake_fd,
            "sync_fd": self._sync_fd,
            "epoll_fd": self._epoll.fileno(),
            "event": self._event.ctypes.data,
            "message": self._message.ctypes.data,
            "iovecs": self._iovecs.ctypes.data,
            "ahead": self._ahead.ctypes.data,
            "eager": EAGER,
        }.items():
            self.record[name] = value
        self.address, self.submit = int(self._array.ctypes.data), submit.address()
        self.events = (
            Event(self._epoll.fileno(), ready.address(), self.address),
            Event(self._wake_fd, obey.address(), self.address),
        )

    def begin_with(self, sock: socket.socket, *, structured: bool) -> None:
        """Use the first connection; no I/O thread uses the link yet. Raises OSError; the connection is closed then."""
        self._watch(sock)
        self.record["fd"], self.record["structured"] = sock.fileno(), structured

    def continue_with(self, sock: socket.socket, *, structured: bool) -> None:
        """Use another connection instead of the one that was lost. Raises OSError; it is closed then."""
        self._watch(sock)
        self.record["expired"] = 0
        self.record["new_structured"], self.record["new_fd"] = structured, sock.fileno()
        self._wake()
        with self._lock:
            if not self._attached:
                # The next front end's first request is not to fail.
                obey(self.address, 0)

    def _watch(self, sock: socket.socket) -> None:
        self.drop()
        try:
            sock.setblocking(False)
            self._epoll.register(sock.fileno(), READABLE)
        except OSError:
            sock.close()
            raise
        self._sock, self._silent = sock, False
        self._since = time.monotonic_ns()

    def stop_waiting(self) -> None:
        """Fail what waits for a connection."""
        self.record["expired"] = 1
        self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def take_loss(self) -> str:
        """Why the connection was lost, if it was since this was last asked; else an empty text."""
        if not self.record["lost"]:
            return ""
        self.record["lost"] = 0
        if self._silent:
            return SILENT
        reason = REASONS[int(self.record["reason"])]
        code = int(self.record["reason_errno"])
        return f"{reason}: {os.strerror(code)}" if code else reason

    @property
    def lost_again(self) -> bool:
        """Whether a request had waited for the connection that was lost because the one before was lost too."""
        return int(self.record["losses"]) > 1

    @property
    def connection(self) -> socket.socket | None:
        """The one in use, if there is one."""
        return self._sock if int(self.record["fd"]) >= 0 else None

    @property
    def structured(self) -> bool:
        return bool(self.record["structured"])

    def attach(self, engine: Engine) -> None:
        with self._lock:
            self._attached = True

    def detach(self, engine: Engine) -> None:
        with self._lock:
            self._attached = False
        os.eventfd_write(int(self.record["lost_fd"]), 1)

    @property
    def unattended(self) -> socket.socket | None:
        """The connection in use, if no I/O thread would notice its end."""
        return None if self._attached or self._left else self.connection

    def look_after(self) -> None:
        """Notice the end of a connection that no I/O thread uses."""
        with self._lock:
            if not self._attached and not self._left:
                ready(self.address, 0)

    def waited(self) -> float:
        """For how many seconds a request has been with the server, or waited to be sent; 0: there is none."""
        begun = self._requests["began"][self._requests["state"] != FREE]
        if self.connection is None or not begun.size:
            return 0.0
        return (time.monotonic_ns() - max(int(begun.min()), self._since)) / 1e9

    @property
    def over_tcp(self) -> bool:
        """Whether the connection in use is to another machine, or may be."""
        sock = self.connection
        return sock is not None and sock.family != socket.AF_UNIX

    def end_if_silent(self) -> None:
        """End a connection whose peer is gone; who uses it notices that."""
        sock = self.connection
        if sock is None or not self.over_tcp or self._left:
            return
        # The peer may end it at this moment.
        with contextlib.suppress(OSError):
            if is_silent(sock):
                self._silent = True
                sock.shutdown(socket.SHUT_RDWR)

    def let_go(self, offered: socket.socket | None) -> None:
        """Leave the connection alone until `take_back`, because another process uses it from now on.

        No I/O is in flight. Raises OSError, also if that process has another connection.
        """
        with self._lock:
            if self._one_sync.locked():
                raise OSError(errno.EBUSY, "a flush has not ended")
            if self.connection is not offered:
                raise OSError(errno.ENOTCONN, "its connection to the server was lost, or made again, meanwhile")
            self._left = True

    def take_back(self) -> None:
        """The other process does not use it any more, and has not."""
        with self._lock:
            self._left = False
            if not self._closed:
                # What has happened to the connection meanwhile is still to be noticed.
                os.eventfd_write(int(self.record["lost_fd"]), 1)

    def sync(self) -> None:
        """Have the server make stable what it has completed. Raises OSError."""
        with self._one_sync:
            self._begin_sync()
            while not _wait_for(self._sync_fd):
                _wait_for(self._sync_fd, *self._work_in_its_place(), seconds=SLICE)
            if self._closed:
                raise OSError(errno.EIO, "the disk was closed")
            if result := int(self.record["sync_result"]):
                raise OSError(-result, os.strerror(-result))

    def _begin_sync(self) -> None:
        with self._lock:
            if self._closed:
                raise OSError(errno.EIO, "the disk was closed")
            if self._left:
                raise OSError(errno.EBUSY, "another process takes over the disk")
            if _wait_for(self._sync_fd):
                os.eventfd_read(self._sync_fd)
            self.record["sync_wanted"] = 1
            self._wake()

    def _work_in_its_place(self) -> tuple[int, ...]:
        """If no I/O thread uses the link, do what it would do; returns the fds that say that there is more to do.

        No I/O is in flight then, so there is no channel. Raises OSError.
        """
        with self._lock:
            if self._attached or self._closed:
                return ()
            obey(self.address, 0)
            ready(self.address, 0)
            if int(self.record["fd"]) < 0:
                raise OSError(errno.EIO, "there is no connection to the server")
            return (self._epoll.fileno(),)

    def drop(self) -> None:
        """Close the connection; the I/O thread does not use it any more."""
        if self._sock is not None:
            if self._sock.family != socket.AF_UNIX:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, DISCARDING)
            self._sock.close()
            self._sock = None

    def close(self, *, shared: bool) -> None:
        """No queue uses it; a flush that waits fails. `shared`: another process uses the connection, or may."""
        with self._lock:
            self._closed = True
        os.eventfd_write(self._sync_fd, 1)
        # A flush that is under way ends now, and does not use fds that others may have next.
        with self._one_sync:
            if not shared:
                self._say_goodbye()
            if self._sock is not None:
                self._sock.close()
                self._sock = None
            self._fds.close()

    def _say_goodbye(self) -> None:
        if self.connection is not None:
            with contextlib.suppress(OSError):
                self.connection.send(GOODBYE, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


def _eventfd(undo: contextlib.ExitStack) -> int:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    undo.callback(os.close, fd)
    return fd


def _wait_for(*fds: int, seconds: float = 0) -> bool:
    """Whether one of the fds is readable within this time."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
