"""A thread that serves HTTP with a loop of its own, on one socket: no client holds up the control thread."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from uvicorn.server import ServerState

from ringplane.api import connections
from ringplane.system.ready_thread import ReadyThread

# Connections that are accepted at a time, before they are counted, and that can wait to be accepted: connect(2)
# of a client that does not block fails if no more can.
ACCEPTED_AT_A_TIME, WAITING = 16, 1024

# Seconds for the requests that are being answered when the process stops, and before that for requests of clients
# that have connected and not asked yet, which are looked for so often.
STOP_PATIENCE, STOP_LOOK = 0.5, 0.005

# Seconds for clients to read the rest of a stream that ends when the process stops: a trace may have megabytes left.
REST_PATIENCE = 5.0

# Seconds until no client is accepted any more; guests wait meanwhile.
RELEASE_PATIENCE = 0.5


class HttpThread:
    """Opened before the process is confined, it serves when `run` is called. It owns the socket."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread = ReadyThread(name)
        self._stopping = threading.Event()
        self._stop = asyncio.Event()
        # Set on the control thread when no client is accepted any more.
        self._deaf = asyncio.Event()

    def open(self, application: Any, sock: socket.socket, paths: Iterable[str]) -> None:
        """Listen, and load all that the application will ever need: it is asked for these paths. Raises OSError."""
        self._state = ServerState()
        # Here, because the sandbox forbids to listen, to make a loop, and to load modules on first use.
        self._loop = asyncio.new_event_loop()
        try:
            self._config = connections.config(application)
            self._config.load()
            self._loop.run_until_complete(self._open(sock, paths))
        except BaseException:
            self._loop.close()
            raise

    async def _open(self, sock: socket.socket, paths: Iterable[str]) -> None:
        for path in paths:
            await _rehearse(self._config.loaded_app, path)
        self._accepting = await self._loop.create_server(self._connection, sock=sock, backlog=ACCEPTED_AT_A_TIME)
        sock.listen(WAITING)

    def _connection(self) -> connections.Connection:
        return connections.Connection(self._config, self._state, self._name)

    def start(self) -> None:
        """Start the thread, which waits for `run`. Raises NoThread."""
        self._thread.start()

    def close(self) -> None:
        """Undo `open` and `start`; it does not run. May be called again."""
        self._thread.dismiss()
        self._accepting.close()
        self._loop.close()

    def request_stop(self) -> None:
        """Begin to end; any thread may call."""
        self._stopping.set()
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)

    async def release(self) -> None:
        """Begin to end; returns when no client is accepted any more, or soon."""
        self.request_stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RELEASE_PATIENCE):
                await self._deaf.wait()

    @property
    def stopped(self) -> bool:
        """Whether `run` is about to return."""
        return self._stopping.is_set()

    async def run(self) -> None:
        """Serve until it is stopped, or until this is cancelled."""
        control, ended = asyncio.get_running_loop(), asyncio.Event()
        self._thread.begin(partial(self._main, control, ended))
        try:
            await ended.wait()
        finally:
            self.request_stop()
            await ended.wait()
            self._thread.join()

    # On the thread.

    def _main(self, control: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve(lambda: control.call_soon_threadsafe(self._deaf.set)))
            # Connections that were aborted are closed in the next turn of the loop.
            self._loop.run_until_complete(asyncio.sleep(0))
        finally:
            self._loop.close()
            control.call_soon_threadsafe(ended.set)

    async def _serve(self, deaf: Callable[[], object]) -> None:
        if not self.stopped:
            await self._stop.wait()
        await self._stop_accepting(deaf)
        for connection in list(self._state.connections):
            connection.shutdown()
        await self._answer_all()
        await self._send_rest()
        for connection in list(self._state.connections):
            connection.transport.abort()
        # Streams without an end notice that their client has gone. A task that is cancelled is logged as a fault.
        await self._answer_all()
        for task in list(self._state.tasks):
            task.cancel()
        await asyncio.gather(*self._state.tasks, return_exceptions=True)

    async def _stop_accepting(self, deaf: Callable[[], object]) -> None:
        """Accept no more clients; wait for the requests of those that have just connected.

        When another process takes over the socket, none of its clients may notice.
        """
        # A server that is closed drops what it has accepted and has no connection for yet: that comes later.
        for sock in self._accepting.sockets:
            self._loop.remove_reader(sock.fileno())
        deaf()
        end = self._loop.time() + STOP_PATIENCE
        while True:
            await asyncio.sleep(STOP_LOOK)
            asked = all(connection.cycle for connection in self._state.connections)  # type: ignore[union-attr]
            if asked or self._loop.time() >= end:
                break
        self._accepting.close()

    async def _answer_all(self) -> None:
        """Let the requests that are being answered end; not all may do so in time."""
        if self._state.tasks:
            await asyncio.wait(set(self._state.tasks), timeout=STOP_PATIENCE)

    async def _send_rest(self) -> None:
        """Let those streams end that do so when the process stops; a client may read slowly."""
        end = self._loop.time() + REST_PATIENCE
        while any(each.at_shutdown for each in self._state.connections):  # type: ignore[union-attr]
            if self._loop.time() >= end:
                break
            await asyncio.sleep(STOP_LOOK)


async def _rehearse(application: Any, path: str) -> None:
    """Ask once for what loads modules on first use: a confined process cannot read their files."""
    scope: dict[str, Any] = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "scheme": "http",
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": None,
        "server": None,
    }
    await application(scope, _nothing, _ignore)


async def _nothing() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _ignore(message: Any) -> None:
    """What it answers is not of interest."""
