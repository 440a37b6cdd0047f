"""systemd's notifications of a service's state (sd_notify(3))."""

from __future__ import annotations

import contextlib
import os
import socket

# Seconds.
PATIENCE = 5.0


class ServiceManager:
    """The service manager that waits until we are ready; without NOTIFY_SOCKET there is none."""

    def __init__(self) -> None:
        """Connect now, because the sandbox forbids it later."""
        self._sock: socket.socket | None = None
        # Child processes must not use it.
        address = os.environ.pop("NOTIFY_SOCKET", "")
        if address:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            try:
                sock.connect("\0" + address[1:] if address[0] == "@" else address)
                self._sock = sock
            except OSError:
                sock.close()

    def notify_ready(self) -> None:
        """Report that front ends may connect from now on; services that start after us may depend on it."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                # A manager that does not read must not prevent us from stopping.
                self._sock.settimeout(PATIENCE)
                self._sock.send(b"READY=1")

    def notify_successor(self, pid: int) -> None:
        """Report that another process is the service from now on. Any thread may call; it does not block."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.setblocking(False)
                self._sock.send(b"MAINPID=%d" % pid)
