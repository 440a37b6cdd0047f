"""A UNIX stream socket around a `Connection`: one transport for asyncio, one that blocks.

Source: QEMU's docs/interop/vhost-user.rst, section "Communication"; unix(7) and cmsg(3) for the fds.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from ringplane.vhost_user.connection import AnyRequest, Connection, Message, Role
from ringplane.vhost_user.messages import MAX_FDS, ProtocolError, UsageError
from ringplane.vhost_user.payloads import Empty, Payload

_INT_SIZE = array("i").itemsize
# Room for one fd more than a message may have, to detect too many.
_ANCILLARY_SPACE = socket.CMSG_SPACE((MAX_FDS + 1) * _INT_SIZE)
_NO_PAYLOAD = Empty()


def receive_part(sock: socket.socket, size: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """Read at most `size` bytes and the fds that came with them, close-on-exec; no bytes at the end of the stream.

    Raises ProtocolError, with nothing left open, if the kernel had to drop fds (the peer sent more than there is room
    for, or this process may not open more), or if one of them is an end of a connection like this one. Raises
    what recvmsg raises, except that a reset connection is an end.
    """
    try:
        data, ancillary, flags, _ = sock.recvmsg(size, _ANCILLARY_SPACE, socket.MSG_CMSG_CLOEXEC | flags)
    except ConnectionResetError:
        return b"", []
    fds = _fds_in(ancillary)
    if flags & socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        raise ProtocolError(
            "fds were lost: a message came with too many of them, or this process has too many open files"
        )
    try:
        for fd in fds:
            _refuse_connection(fd)
    except ProtocolError:
        for fd in fds:
            os.close(fd)
        raise
    return data, fds


def _refuse_connection(fd: int) -> None:
    """Raise ProtocolError if the fd may be an end of the connection that it came by, or of another one to this process.

    A process that keeps the other end of its own connection open, even with half a message, never sees it close. Such
    an end is connected to a socket with a name, or not connected yet. The sockets of socketpair(2) have no names.
    """
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return
    with socket.socket(fileno=os.dup(fd)) as sock:
        try:
            peer = sock.getpeername()
        except OSError:
            raise ProtocolError("an fd is a socket that is not connected; use one of socketpair(2)") from None
        if sock.family != socket.AF_UNIX or peer:
            raise ProtocolError(f"an fd is a socket connected to {peer!r}; use one of socketpair(2)")


def send_part(sock: socket.socket, data: memoryview, fds: Sequence[int], flags: int = 0) -> int:
    """Send some of `data`, all of `fds` attached to its first byte; how many bytes went. Raises what sendmsg does."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
    return sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL | flags)


def _fds_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            # A truncated item may end within an int.
            fds.frombytes(data[: len(data) - len(data) % _INT_SIZE])
    return list(fds)


def _receive_some(sock: socket.socket, connection: Connection, flags: int = 0) -> tuple[Message | None, bool]:
    """Read once; a message if that completed one, and whether the stream has ended."""
    try:
        data, fds = receive_part(sock, connection.wanted, flags)
    except ProtocolError:
        connection.close()
        raise
    if not data:
        connection.receive_eof()
        return None, True
    return connection.receive(data, fds), False


class Interrupted(Exception):
    """`AsyncTransport.interrupt` was called. Nothing is lost: the next call resumes where this one left off."""


class AsyncTransport:
    """A connected socket and its `Connection` (a back end's, unless given) in an asyncio loop.

    The transport owns the socket. One task may receive at a time; any number may send, and their messages go out whole,
    one after the other. A wait can be cancelled or have a time limit (`asyncio.timeout`). Nothing relies on O_NONBLOCK:
    a front end could clear it on a socket that it has sent (SET_BACKEND_REQ_FD).
    """

    def __init__(self, sock: socket.socket, connection: Connection | None = None) -> None:
        sock.setblocking(False)
        self.connection = connection or Connection(Role.BACK_END)
        self._sock = sock
        self._receiving = self._interrupted = False
        self._sending = asyncio.Lock()
        # For each waiting future, the call that removes its registration from the loop.
        self._waits: dict[asyncio.Future[None], Callable[[], object]] = {}

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.fileno() == -1

    async def receive(self) -> Message | None:
        """The next message, or None after the peer closed its end or `close` was called.

        Raises what `Connection.receive` raises; ProtocolError if the stream ends inside a message or fds were lost;
        UsageError if another task is receiving; Interrupted. A cancelled call loses nothing: the next one continues.
        """
        if self._receiving:
            raise UsageError("another task is receiving on this transport")
        self._receiving = True
        try:
            # A peer that always has another message ready must not block the loop.
            await asyncio.sleep(0)
            return await self._receive()
        finally:
            self._receiving = False

    async def _receive(self) -> Message | None:
        message, ended = None, False
        while message is None and not ended and not self.closed:
            if self._interrupted:
                self._interrupted = False
                raise Interrupted
            try:
                message, ended = _receive_some(self._sock, self.connection, socket.MSG_DONTWAIT)
            except BlockingIOError:
                loop = asyncio.get_running_loop()
                await self._wait(loop.add_reader, loop.remove_reader)
        return message

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message whole, waiting for a slow reader; the fds stay the caller's and must stay open meanwhile.

        Raises OSError if the peer or we closed the connection. If it is cancelled or fails after a part was sent, the
        transport is closed, because the peer could not understand what follows.
        """
        async with self._sending:
            rest = memoryview(data)
            try:
                while rest:
                    rest = await self._send_some(rest, fds if len(rest) == len(data) else ())
            finally:
                if 0 < len(rest) < len(data):
                    self.close()

    async def _send_some(self, rest: memoryview, fds: Sequence[int]) -> memoryview:
        if self.closed:
            raise ConnectionAbortedError("the transport was closed")
        try:
            return rest[send_part(self._sock, rest, fds, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            loop = asyncio.get_running_loop()
            await self._wait(loop.add_writer, loop.remove_writer)
            return rest

    def interrupt(self) -> None:
        """Make the waiting call of `receive`, or the next one, raise Interrupted."""
        self._interrupted = True
        for future in self._waits:
            # A sender checks and waits again.
            wake(future)

    def fileno(self) -> int:
        """The socket's file descriptor, -1 once it is closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket and the fds of a half-received message; wakes all waiters. May be called again."""
        waits, self._waits = self._waits, {}
        # Before the fd number becomes free: the loop must not watch the file that gets it next.
        for future, unregister in waits.items():
            unregister()
            wake(future)
        self._sock.close()
        self.connection.close()

    async def _wait(self, add: Callable[..., Any], remove: Callable[[int], object]) -> None:
        fd = self._sock.fileno()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        add(fd, wake, future)
        self._waits[future] = lambda: remove(fd)
        try:
            await future
        finally:
            # If it is not there, `close` has undone it already.
            self._waits.pop(future, _nothing)()


def _nothing() -> None:
    pass


def wake(future: asyncio.Future[None]) -> None:
    """Wake the waiter; a second call does nothing."""
    if not future.done():
        future.set_result(None)


class BlockingTransport:
    """A connected socket and its `Connection` (a front end's, unless given) for code without a loop.

    The transport owns the socket. `timeout` is in seconds, for each system call; None waits without limit.
    """

    def __init__(self, sock: socket.socket, timeout: float | None = None, connection: Connection | None = None) -> None:
        sock.settimeout(timeout)
        self.connection = connection or Connection(Role.FRONT_END)
        self._sock = sock

    def receive(self) -> Message | None:
        """The next message, or None after the peer closed its end.

        Raises what `Connection.receive` raises; ProtocolError if the stream ends inside a message or fds were lost;
        TimeoutError, after which another call continues.
        """
        message, ended = None, False
        while message is None and not ended:
            message, ended = _receive_some(self._sock, self.connection)
        return message

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message whole; the fds stay the caller's. Raises OSError (TimeoutError, BrokenPipeError, ...).

        If it fails after a part was sent, the transport is closed, because the peer could not understand what follows.
        """
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[send_part(self._sock, rest, fds if len(rest) == len(data) else ()) :]
        finally:
            if 0 < len(rest) < len(data):
                self.close()

    def call(
        self,
        request: AnyRequest,
        payload: Payload = _NO_PAYLOAD,
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
    ) -> Message | None:
        """Send a request and wait for its reply; None at once if it gets none.

        Raises what `Connection.send`, `send` and `receive` raise; UsageError if an earlier reply is still awaited;
        ProtocolError if the peer closes the connection instead.
        """
        if self.connection.awaiting:
            raise UsageError(f"{request.name}: an earlier request's reply is still awaited")
        self.send(self.connection.send(request, payload, fds, need_reply=need_reply), fds)
        if not self.connection.awaiting:
            return None
        reply = self.receive()
        if reply is None:
            raise ProtocolError(f"the peer closed the connection instead of replying to {request.name}")
        return reply

    def close(self) -> None:
        """Close the socket and the fds of a half-received message. May be called again."""
        self._sock.close()
        self.connection.close()
