"""systemd's notifications of a service's state (sd_notify(3))."""

from __future__ import annotations

import contextlib
import os
import socket

# Seconds.
PATIENCE = 5.0


class ServiceManager:
    """Whoever started us and wants to know when we are ready; nobody, where NOTIFY_SOCKET is not set."""

    def __init__(self) -> None:
        """Connect now, as the sandbox does not let anybody do so later."""
        self._sock: socket.socket | None = None
        # Nobody else is to use it.
        address = os.environ.pop("NOTIFY_SOCKET", "")
        if address:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            try:
                sock.connect("\0" + address[1:] if address[0] == "@" else address)
                self._sock = sock
            except OSError:
                sock.close()

    def notify_ready(self) -> None:
        """Front ends may connect from now on. What is started after us may need to."""
        if self._sock is not None:
            with self._sock, contextlib.suppress(OSError):
                # A manager that does not read must not keep us from stopping.
                self._sock.settimeout(PATIENCE)
                self._sock.send(b"READY=1")
            self._sock = None
