"""Who is at the other end of a UNIX socket, and whether it is still there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct

from ringplane.vhost_user.transport import wake

UCRED = struct.Struct("=iII")


def credentials(sock: socket.socket) -> tuple[int, int]:
    """The process that connected, and its user (unix(7), SO_PEERCRED); process 0 where our PID namespace lacks it."""
    pid, uid, _ = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return pid, uid


def describe(sock: socket.socket) -> str:
    """The process that connected, for log lines: with the name of its program where /proc may be read."""
    pid, _ = credentials(sock)
    if pid == 0:
        return "a process of another PID namespace"
    with contextlib.suppress(OSError):
        # Not its `comm`: the sandbox ends a process that opens files, but lets it try to read links.
        return f"process {pid}, {os.path.basename(os.readlink(f'/proc/{pid}/exe'))}"
    return f"process {pid}"


async def gone(sock: socket.socket) -> None:
    """Return when the other end has been closed, whatever there is to be read before that."""
    loop = asyncio.get_running_loop()
    closed: asyncio.Future[None] = loop.create_future()
    with select.epoll() as epoll:
        # No event is asked for: EPOLLHUP and EPOLLERR are always reported. The loop would watch for data as well.
        epoll.register(sock, 0)
        loop.add_reader(epoll, wake, closed)
        try:
            await closed
        finally:
            loop.remove_reader(epoll)
