"""HTTP over a UNIX socket."""

from __future__ import annotations

import http.client
import os
import socket

# Seconds: the API answers within 30, if need be with 503.
PATIENCE = 40.0


class UnixConnection(http.client.HTTPConnection):
    """To the socket at a path."""

    def __init__(self, path: str | os.PathLike[str], patience: float = PATIENCE) -> None:
        """`patience`: how many seconds to wait for the other end, each time."""
        super().__init__("localhost", timeout=patience)
        self._path = os.fspath(path)

    def connect(self) -> None:
        """Connect. Raises OSError."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
