"""Other ways to operate and watch a running server beside signals. The HTTP API (api/http.py) is an interface."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, Protocol

from ringplane.control.listener import Listener
from ringplane.options.api_options import ApiOptions
from ringplane.options.metrics_options import MetricsOptions


class Interface(Protocol):
    """A service of the control thread (threads.py) with a socket. It ends when it is asked to stop."""

    options: ApiOptions
    path: Path
    # Once it is open.
    listener: Listener

    def prepare(self, inherited: Listener | None) -> None:
        """Check whether it will be able to listen, or use the socket of the previous process. Raises ListenError."""

    def open(self, server: Any) -> None:
        """Listen for whoever operates this Server, and load all that it will ever need. Raises ListenError."""

    def start(self) -> None:
        """Start the threads that it needs, which wait for `run`. Raises OSError."""

    def close(self) -> None:
        """Undo `open` and `start`; it does not run."""

    def request_stop(self) -> None:
        """Begin to end; any thread may call."""

    async def release(self) -> None:
        """Begin to end; returns when no client is accepted any more, because another process accepts them."""

    @property
    def stopped(self) -> bool:
        """Whether `run` is about to return."""

    async def run(self) -> None: ...


class Endpoint(Protocol):
    """A task of the control thread with a TCP socket, for whoever watches. It ends when no disk is left."""

    options: MetricsOptions
    # Once it is prepared.
    sock: socket.socket
    url: str

    def prepare(self, inherited: socket.socket | None) -> None:
        """Bind its socket, or use that of the previous process. Raises ListenError."""

    def open(self, server: Any) -> None:
        """Listen for whoever watches this Server, and load all that it will ever need. Raises ListenError."""

    def start(self) -> None:
        """Start the threads that it needs, which wait for `run`. Raises OSError."""

    def close(self) -> None:
        """Undo what was done; it does not run. May be called again."""

    async def release(self) -> None:
        """Begin to end; returns when no client is accepted any more, because another process accepts them."""

    async def run(self) -> None:
        """Serve until this is cancelled, or `release` is called."""
