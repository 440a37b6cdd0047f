"""What a process begins with: what is described, and what was changed in a process before it.

Without a previous process it is an `Origin`. The changes of one that has ended are restored (restoring.py), and a
running one is taken over from (taking_over.py).
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from ringplane.control.changes import Changes
from ringplane.control.listener import Listener
from ringplane.control.opening import Parts, listen_for_successors, open_parts
from ringplane.control.planned import Planned
from ringplane.options.addresses import Address
from ringplane.options.disk_config import DiskConfig, named
from ringplane.options.thread_options import IoThread
from ringplane.system.signals import NONE, Signals

if TYPE_CHECKING:
    from ringplane.control.server import Server
    from ringplane.opener.remote_opener import RemoteOpener


class Origin:
    """The methods are called in this order, in a `with`; leaving it before `take` changes nothing elsewhere."""

    # What a running process lends of its state (`StateFile.hand_over`).
    state: Mapping[str, Any] | None = None
    # See `Server`.
    unserved = Changes()
    unserved_because: Mapping[str, str] = MappingProxyType({})

    def __init__(self, signals: Signals = NONE) -> None:
        self._signals = signals
        # The servers of images that did not answer; those that are described are asked all the same.
        self.silent: set[Hashable] = set()

    def check_state(self, path: Path | None) -> None:
        """Raises HandoverError if a running process keeps its state in another file than at this path; None: in one."""

    def plan(self, disks: Sequence[DiskConfig], io_threads: Sequence[IoThread]) -> list[Planned]:
        """The disks that are to be served if these are described. Raises WrongOptions, HandoverError."""
        return [Planned(config) for config in named(disks)]

    def interface_listener(self, path: Path) -> Listener | None:
        """The socket of a running process' interface at this path, if there is one; its file is not ours yet."""
        return None

    def metrics_socket(self, address: Address) -> socket.socket | None:
        """The socket of a running process' metrics at this address, if there is one. Both use it until `take`."""
        return None

    def attempt(self, planned: Planned, step: Callable[[], object]) -> bool:
        """Do a step of the start of this disk; False if it fails and others are served without it.

        `report` logs that. Raises what the step does: usually all disks are served, or none is.
        """
        step()
        return True

    def open(self, number: int, planned: Planned, undo: contextlib.ExitStack, opener: RemoteOpener | None) -> Parts:
        """The parts of disk `number` of those that are planned.

        Raises ImageError, ListenError, OpenerEnded, HandoverError, Interrupted.
        """
        return open_parts(planned.config, undo, self._signals, opener)

    def report(self) -> None:
        """Log what is not served, when all steps have been attempted. Raises StateError."""

    def successors(self, path: Path, undo: contextlib.ExitStack) -> Listener | None:
        """Where the next process finds this one, if possible beside the socket at `path`."""
        return listen_for_successors(path, undo)

    def store(self, server: Server) -> None:
        """Store what was restored, as far as it is served. Raises StateError."""

    def take(self, server: Server) -> None:
        """Resume the front ends of a running process. Raises HandoverError, Interrupted."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing of another process is held."""
