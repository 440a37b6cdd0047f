"""The front ends of a disk, one after the other: which one is served next, and what the log says of one that waits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator

from ringplane.log.logs import DiskLog
from ringplane.vhost_user import peers
from ringplane.vhost_user.transport import wake

ACCEPT_AGAIN = 0.1

# Seconds after which a front end that waits for another one is logged.
WAITING_PATIENCE = 1.0
WAITS = "a second front end (%s) waits until the first one (%s) detaches; SIGUSR1 detaches the first one"


class FrontEnds:
    """Those that connect to a listening socket. All others than the next one wait in the socket's queue.

    Used on the control thread.
    """

    def __init__(self, sock: socket.socket, logger: DiskLog) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._logger = logger
        self._accepting: asyncio.Future[None] | None = None
        # Cleared while no front end may be accepted, because another process may take over.
        self._go = asyncio.Event()
        self._go.set()
        self._stopping = False
        # Accepted while another one is attached.
        self.waiting: socket.socket | None = None

    async def next(self) -> socket.socket | None:
        """Accept the front end to be served next; None if it has disconnected, or after `stop`."""
        if self.waiting is None:
            return await self._accept()
        await self._wait_while_frozen()
        sock, self.waiting = self.waiting, None
        return sock

    async def watch(self, attached: str) -> None:
        """While the front end `attached` is served, accept the next one, so that the log can name both."""
        while not self._stopping:
            self.waiting = self.waiting or await self._accept()
            if self.waiting is not None:
                await self._report(self.waiting, attached)
                self.drop_waiting()

    async def _report(self, sock: socket.socket, attached: str) -> None:
        """Return when it no longer waits. A front end that reconnects waits only briefly for its old connection."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WAITING_PATIENCE):
                await peers.gone(sock)
                return
        waiting = peers.describe(sock)
        self._logger.warning(WAITS, waiting, attached)
        await peers.gone(sock)
        self._logger.info("the second front end (%s) has gone; it was not served", waiting)

    def drop_waiting(self) -> None:
        """Disconnect the one that waits, if there is one."""
        if self.waiting is not None:
            self.waiting.close()
            self.waiting = None

    def resume_waiting(self, fd: int) -> None:
        """Serve later a front end that waits in the previous process; the fd stays the caller's. Raises OSError."""
        self.waiting = socket.socket(fileno=os.dup(fd))

    def stop(self) -> None:
        """Accept nobody any more; `next` returns."""
        self._stopping = True
        if self._accepting:
            wake(self._accepting)

    def freeze(self) -> None:
        """Accept nobody until `thaw`."""
        self._go.clear()

    def thaw(self) -> None:
        """Continue after `freeze`."""
        self._go.set()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody is accepted in this `with`."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    async def _accept(self) -> socket.socket | None:
        try:
            await self._wait_for_one()
            # Nothing else runs between this and the session, so no front end is accepted after `freeze`.
            return None if self._stopping else self._sock.accept()[0]
        except BlockingIOError:
            # It has disconnected again.
            pass
        except OSError as error:
            # For example too many open files: the front end waits in the queue until that has passed.
            self._logger.warning("cannot accept a front end: %s", error)
            await asyncio.sleep(ACCEPT_AGAIN)
        return None

    async def _wait_for_one(self) -> None:
        loop = asyncio.get_running_loop()
        self._accepting = loop.create_future()
        loop.add_reader(self._sock, wake, self._accepting)
        try:
            await self._accepting
        finally:
            loop.remove_reader(self._sock)
        await self._wait_while_frozen()

    async def _wait_while_frozen(self) -> None:
        while not self._go.is_set():
            await self._go.wait()
