"""A disk of a process that starts: what has been opened and made for it so far."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from ringplane.control.adding import Adding
from ringplane.control.export import Export
from ringplane.control.opening import Parts, listen
from ringplane.control.planned import Planned
from ringplane.device.disk import Disk

if TYPE_CHECKING:
    from ringplane.control.origin import Origin
    from ringplane.opener.remote_opener import RemoteOpener


class StartingDisk:
    """Each step leaves to `undo` what has to be undone if this disk is not served after all."""

    parts: Parts
    export: Export
    _disk: Disk

    def __init__(
        self, number: int, planned: Planned, undo: contextlib.ExitStack, opener: RemoteOpener | None = None
    ) -> None:
        """`number`: of all that are planned. Without an `opener` this process opens its files itself."""
        self.planned, self.undo = planned, undo
        self._number, self._opener = number, opener

    def open(self, origin: Origin) -> None:
        """Open its parts. Raises what `Origin.open` does."""
        self.parts = origin.open(self._number, self.planned, self.undo, self._opener)

    def make(self, adding: Adding) -> None:
        """Make the device. Raises ImageError."""
        self._disk = adding.make_disk(self.planned.config, self.parts, self.undo)

    def listen(self, adding: Adding) -> None:
        """From here on front ends can connect, and get an answer when the threads run. Raises ListenError."""
        listener = listen(self.planned.config, self.parts, self.undo, self._opener)
        self.export = adding.export(self.planned, self._disk, listener)
