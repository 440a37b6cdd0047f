"""Changes of images by other clients: librbd calls a unit, which wakes up one thread for all images of the process.

The unit is needed because a confined process cannot run callbacks of ctypes, whose code is on writable pages.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable

from ringplane.compiler.interpreted import INTERPRETED
from ringplane.compiler.units import unit
from ringplane.native.access import address_of, atomic_add, view
from ringplane.native.structs import new, struct
from ringplane.native.syscalls import write
from ringplane.system.ready_thread import ReadyThread

# Of an image. `changes`: how often its header has changed; `one`: the number 1, for the eventfd.
WATCH = struct("changes", "event_fd", "one = 1")
CHANGES: int = WATCH.fields["changes"][1]  # type: ignore[index]
ONE: int = WATCH.fields["one"][1]  # type: ignore[index]


@unit
def header_changed(watch_address):
    """The callback, on a thread of librbd: the header of the image has changed."""
    watch = view(watch_address, WATCH)
    atomic_add(address_of(watch) + CHANGES, 1)
    write(watch.event_fd, address_of(watch) + ONE, 8)
    return 0


@functools.cache
def callback() -> int:
    """The address of `header_changed` for C."""
    if not INTERPRETED:
        return header_changed.address()
    _kept.append(ctypes.CFUNCTYPE(None, ctypes.c_int64)(header_changed))
    return ctypes.cast(_kept[-1], ctypes.c_void_p).value or 0  # type: ignore[arg-type]


_kept: list[object] = []


class Watch:
    """Owns a WATCH; `address` is the argument of the callback."""

    def __init__(self, event_fd: int, notice: Callable[[], None]) -> None:
        """`notice` is called on the thread of all watches."""
        self.notice = notice
        # The changes that were noticed. Only librbd's threads write the number of all changes, so none is lost.
        self._seen = 0
        self._record = new(WATCH)
        self.address = int(self._record.ctypes.data)
        self._record["event_fd"] = event_fd

    def forget(self) -> None:
        """Have `take` find a change."""
        self._seen = -1

    def take(self) -> bool:
        """Whether the header has changed since the last call."""
        before, self._seen = self._seen, int(self._record["changes"][0])
        return self._seen != before


class Watching:
    """The thread, which `start` starts, and what it looks after."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: list[Watch] = []
        self._event_fd = -1
        self._thread: ReadyThread | None = None

    def start(self) -> None:
        """Start the thread, if it does not run: when the process has given up its rights, so that it has none.

        Raises NoThread.
        """
        with self._lock:
            if self._thread is None and self._watches:
                thread = ReadyThread("ringplane-watch")
                thread.start()
                thread.begin(self._run)
                self._thread = thread

    def add(self, notice: Callable[[], None]) -> Watch:
        with self._lock:
            if self._event_fd < 0:
                self._event_fd = os.eventfd(0, os.EFD_CLOEXEC)
            self._watches.append(Watch(self._event_fd, notice))
            return self._watches[-1]

    def remove(self, watch: Watch) -> None:
        """librbd does not call for it any more."""
        with self._lock:
            self._watches.remove(watch)

    def look(self, watch: Watch) -> None:
        """Call for it as if its header had changed."""
        with self._lock:
            watch.forget()
        os.eventfd_write(self._event_fd, 1)

    def _run(self) -> None:
        while True:
            os.eventfd_read(self._event_fd)
            with self._lock:
                changed = [watch for watch in self._watches if watch.take()]
            for watch in changed:
                watch.notice()


WATCHING = Watching()
