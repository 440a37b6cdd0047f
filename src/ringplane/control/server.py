"""All disks that one process serves, as one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from ringplane.control.export import Export
from ringplane.control.threads import Threads
from ringplane.dataplane.trace import TraceEvent


class Server:
    """Disks on one control thread and a shared set of I/O threads. It ends when its last disk has stopped."""

    def __init__(self, exports: Sequence[Export], threads: Threads) -> None:
        self.exports = exports
        self.threads = threads

    def trace(self, receive: Callable[[TraceEvent | str], None]) -> None:
        """Call `receive` with each trace event of any disk from now on, or a text about lost ones.

        It is called on the control thread.
        """
        self.threads.trace(receive)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all disks have stopped; whether they have."""
        return self.threads.wait(timeout)

    def refresh_size(self) -> None:
        """Have the sizes of all images looked at again; may be called from a signal handler."""
        for export in self.exports:
            export.refresh_size()

    def make_way(self) -> None:
        """Have front ends detached for which others wait; may be called from a signal handler."""
        for export in self.exports:
            export.make_way()

    def request_stop(self) -> None:
        """Begin to stop all disks and return at once; may be called from a signal handler."""
        for export in self.exports:
            export.request_stop()

    def stop(self) -> None:
        """Stop all disks, then the threads. May be called again."""
        self.request_stop()
        self.threads.wait()

    def abandon(self) -> None:
        """Remove what others can see, the sockets' files, and nothing else: the process ends at once."""
        for export in self.exports:
            export.listener.close()
        self.threads.at_end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
