"""Another way to operate a running server beside signals. The HTTP API is one (api/http.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ringplane.control.listener import Listener
from ringplane.options.api_options import ApiOptions


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

    def close(self) -> None:
        """Undo `open`; it does not run."""

    def request_stop(self) -> None:
        """Begin to end; any thread may call."""

    @property
    def stopped(self) -> bool:
        """Whether `run` is about to return."""

    async def run(self) -> None: ...
