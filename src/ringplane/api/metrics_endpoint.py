"""Metrics over TCP, for a Prometheus that cannot reach the API's socket. Nothing else is served there."""

from __future__ import annotations

import socket

from ringplane.api.application import make_application
from ringplane.api.http_thread import HttpThread
from ringplane.api.routes import METRICS
from ringplane.control.server import Server
from ringplane.control.tcp_listener import bound, cannot_listen
from ringplane.options.addresses import Address
from ringplane.options.metrics_options import MetricsOptions


class MetricsEndpoint:
    """An endpoint (control/interface.py) that serves `/metrics`."""

    def __init__(self, options: MetricsOptions) -> None:
        self.options = options
        self._http = HttpThread("ringplane-metrics")
        self._opened = False

    def prepare(self, inherited: socket.socket | None) -> None:
        """See Endpoint."""
        self.sock = inherited or bound(self.options.listen)
        self.url = f"http://{Address(*self.sock.getsockname()[:2])}{METRICS.path}"

    def open(self, server: Server) -> None:
        """See Endpoint."""
        application = make_application(server, [METRICS])
        try:
            self._http.open(application, self.sock, [METRICS.path, "/none"])
        except OSError as error:
            # Another process has begun to listen there since `prepare`.
            raise cannot_listen(self.options.listen, error) from None
        self._opened = True

    def start(self) -> None:
        """See Endpoint."""
        self._http.start()

    def close(self) -> None:
        """See Endpoint."""
        if self._opened:
            self._http.close()
        self.sock.close()

    async def release(self) -> None:
        """See Endpoint."""
        await self._http.release()

    async def run(self) -> None:
        """See Endpoint."""
        await self._http.run()
