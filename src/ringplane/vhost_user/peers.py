"""The peer of a UNIX socket: its process, and whether it is still connected."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct

from ringplane.vhost_user.transport import AsyncTransport, wake

UCRED = struct.Struct("=iII")


def credentials(sock: socket.socket) -> tuple[int, int]:
    """The peer's process and user (unix(7), SO_PEERCRED); process 0 if it is not in our PID namespace."""
    pid, uid, _ = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return pid, uid


def describe(sock: socket.socket) -> str:
    """The peer's process for log lines, with the name of its program if /proc may be read."""
    pid, _ = credentials(sock)
    if pid == 0:
        return "a process of another PID namespace"
    with contextlib.suppress(OSError):
        # A link, not `comm`: the sandbox kills a process that opens a file, but only rejects reading a link.
        return f"process {pid}, {os.path.basename(os.readlink(f'/proc/{pid}/exe'))}"
    return f"process {pid}"


async def gone(sock: socket.socket | AsyncTransport) -> None:
    """Return when the other end has been closed, even if there is still data to read."""
    loop = asyncio.get_running_loop()
    closed: asyncio.Future[None] = loop.create_future()
    with select.epoll() as epoll:
        # No events are requested: EPOLLHUP and EPOLLERR are always reported. The loop would watch for data as well.
        epoll.register(sock, 0)
        loop.add_reader(epoll, wake, closed)
        try:
            await closed
        finally:
            loop.remove_reader(epoll)
