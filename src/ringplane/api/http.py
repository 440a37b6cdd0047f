"""The API of a process on its UNIX socket."""

from __future__ import annotations

import contextlib

from ringplane.api.application import make_application
from ringplane.api.http_thread import HttpThread
from ringplane.api.routes import ROUTES
from ringplane.control.listener import Listener
from ringplane.control.server import Server
from ringplane.options.api_options import ApiOptions
from ringplane.options.kinds import suggestion

# These load modules on first use.
REHEARSED = ("/openapi.json", "/v1/config", "/v1/disks", "/v1/statistics", "/metrics", "/none")


class HttpApi:
    """An interface (control/interface.py) that serves the API."""

    def __init__(self, options: ApiOptions) -> None:
        self.options, self.path = options, options.socket
        self._inherited: Listener | None = None
        self._http = HttpThread("ringplane-api")

    def prepare(self, inherited: Listener | None) -> None:
        """See Interface."""
        self._inherited = inherited
        if inherited is None:
            Listener.rehearse(self.path, self.options.mode, self.options.socket_group)

    def open(self, server: Server) -> None:
        """See Interface."""
        with contextlib.ExitStack() as undo:
            self.listener = self._inherited or Listener.at(self.path, self.options.mode, self.options.socket_group)
            undo.callback(self.listener.close)
            # It loads a module on first use too.
            suggestion("", ())
            self._http.open(make_application(server, ROUTES), self.listener.sock, REHEARSED)
            undo.pop_all()

    def start(self) -> None:
        """See Interface."""
        self._http.start()

    def close(self) -> None:
        """See Interface."""
        self._http.close()
        self.listener.close()

    def request_stop(self) -> None:
        """See Interface."""
        self._http.request_stop()

    async def release(self) -> None:
        """See Interface."""
        await self._http.release()

    @property
    def stopped(self) -> bool:
        """See Interface."""
        return self._http.stopped

    async def run(self) -> None:
        """Serve until it is stopped."""
        await self._http.run()
        self.listener.close()
