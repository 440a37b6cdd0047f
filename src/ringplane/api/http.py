"""The API of a process on its UNIX socket, on a thread of its own: no client holds up the control thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

from uvicorn.server import ServerState

from ringplane.api import connections
from ringplane.api.application import make_application
from ringplane.control.listener import Listener
from ringplane.control.server import Server
from ringplane.options.api_options import ApiOptions

# Connections that are accepted at a time, before they are counted, and that can wait to be accepted: connect(2)
# of a client that does not block fails if no more can.
ACCEPTED_AT_A_TIME, WAITING = 16, 1024

# Seconds for the requests that are being answered when the process stops.
STOP_PATIENCE = 0.5


class HttpApi:
    """An interface (control/interface.py) that serves the API."""

    def __init__(self, options: ApiOptions) -> None:
        self.options, self.path = options, options.socket
        self._inherited: Listener | None = None
        self._stopping = threading.Event()
        self._stop = asyncio.Event()

    def prepare(self, inherited: Listener | None) -> None:
        """See Interface."""
        self._inherited = inherited
        if inherited is None:
            Listener.rehearse(self.path, self.options.mode, self.options.socket_group)

    def open(self, server: Server) -> None:
        """See Interface."""
        self.listener = self._inherited or Listener.at(self.path, self.options.mode, self.options.socket_group)
        self._state = ServerState()
        # Here, because the sandbox forbids to listen, to make a loop, and to load modules on first use.
        self._loop = asyncio.new_event_loop()
        self._config = connections.config(make_application(server))
        self._config.load()
        self._loop.run_until_complete(self._open())

    async def _open(self) -> None:
        await _rehearse(self._config.loaded_app)
        sock = self.listener.sock
        self._accepting = await self._loop.create_server(self._connection, sock=sock, backlog=ACCEPTED_AT_A_TIME)
        sock.listen(WAITING)

    def _connection(self) -> connections.Connection:
        return connections.Connection(self._config, self._state, {})

    def close(self) -> None:
        """See Interface."""
        self._accepting.close()
        self._loop.close()
        self.listener.close()

    def request_stop(self) -> None:
        """See Interface."""
        self._stopping.set()
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)

    @property
    def stopped(self) -> bool:
        """See Interface."""
        return self._stopping.is_set()

    async def run(self) -> None:
        """Serve on the API's thread until it is stopped."""
        control, ended = asyncio.get_running_loop(), asyncio.Event()
        thread = threading.Thread(target=self._main, args=[control, ended], name="ringplane-api", daemon=True)
        thread.start()
        await ended.wait()
        thread.join()
        self.listener.close()

    # On the API's thread.

    def _main(self, control: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
            # What was accepted, and has no connection yet.
            self._loop.run_until_complete(asyncio.sleep(0))
        finally:
            self._loop.close()
            control.call_soon_threadsafe(ended.set)

    async def _serve(self) -> None:
        if not self.stopped:
            await self._stop.wait()
        self._accepting.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            await asyncio.wait(set(self._state.tasks), timeout=STOP_PATIENCE)
        for connection in list(self._state.connections):
            connection.transport.abort()
        for task in list(self._state.tasks):
            task.cancel()
        await asyncio.gather(*self._state.tasks, return_exceptions=True)


async def _rehearse(application: Any) -> None:
    """Ask once for what loads modules on first use: a confined process cannot read their files."""
    for method, path in (
        ("GET", "/openapi.json"),
        ("GET", "/v1/config"),
        ("GET", "/v1/disks"),
        ("GET", "/metrics"),
        ("PUT", "/none"),
    ):
        scope: dict[str, Any] = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
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
