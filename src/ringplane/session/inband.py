"""The channel to the front end, and notifications sent on it as messages instead of through eventfds.

Source: QEMU's docs/interop/vhost-user.rst, sections "Back-end communication" and "In-band notifications".
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable

from ringplane.log.logs import DiskLog
from ringplane.vhost_user.connection import Connection, Role
from ringplane.vhost_user.messages import BackendRequest, ProtocolError
from ringplane.vhost_user.payloads import Empty, Payload, VringState
from ringplane.vhost_user.transport import AsyncTransport

# Seconds that a front end may take to read a message whose answer nobody waits for.
PATIENCE = 2.0


# Sends a request to the front end and waits until it has acted on it.
Ask = Callable[[BackendRequest, Payload], Awaitable[None]]


class BackendChannel:
    """Our requests to the front end, on the socket that SET_BACKEND_REQ_FD has brought."""

    def __init__(self, fd: int) -> None:
        """Take over the fd; raises OSError, with the fd closed, where it is not a socket."""
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            raise
        self._transport = AsyncTransport(sock, Connection(Role.BACK_END, backend_channel=True))
        # While it is held, no request is sent and no answer is awaited.
        self.quiet = asyncio.Lock()

    async def notify(self, request: BackendRequest, payload: Payload | None = None) -> None:
        """Send a message that needs no answer; raises OSError (TimeoutError if the front end does not read it)."""
        async with self.quiet, asyncio.timeout(PATIENCE):
            await self._transport.send(self._transport.connection.send(request, payload or Empty()))

    async def ask(self, request: BackendRequest, payload: Payload) -> None:
        """Send it and wait until the front end acknowledges it; raises OSError and ProtocolError."""
        async with self.quiet:
            await self._transport.send(self._transport.connection.send(request, payload, need_reply=True))
            answer = await self._transport.receive()
            if answer is None:
                raise ConnectionResetError("the front end closed its end of the channel")
            answer.close()

    def fileno(self) -> int:
        """The file descriptor of its socket."""
        return self._transport.fileno()

    def close(self) -> None:
        """May be called again."""
        self._transport.close()


class InbandSignal:
    """An eventfd whose signals become messages about a ring; the data plane knows only the eventfd."""

    def __init__(self, ask: Ask, request: BackendRequest, ring: int, logger: DiskLog) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._signalled, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()
        asyncio.get_running_loop().add_reader(self.fd, self._note)
        self._task = asyncio.create_task(self._forward(ask, request, ring, logger))

    def _note(self) -> None:
        os.eventfd_read(self.fd)
        self._idle.clear()
        self._signalled.set()

    async def forwarded(self) -> None:
        """Return when a message has been acknowledged for all that was signalled."""
        with contextlib.suppress(BlockingIOError):
            self._note()
        await self._idle.wait()

    async def _forward(self, ask: Ask, request: BackendRequest, ring: int, logger: DiskLog) -> None:
        """Signals that arrive while a message is under way share the next one."""
        try:
            while True:
                await self._signalled.wait()
                self._signalled.clear()
                await ask(request, VringState(ring, 0))
                if not self._signalled.is_set():
                    self._idle.set()
        except (OSError, ProtocolError) as error:
            logger.warning("%s of ring %d can no longer be sent: %s", request.name, ring, error)
            self._idle.set()

    def close(self) -> None:
        """Nobody may use the fd any more. May be called again."""
        self._task.cancel()
        if self.fd >= 0:
            asyncio.get_running_loop().remove_reader(self.fd)
            os.close(self.fd)
            self.fd = -1
