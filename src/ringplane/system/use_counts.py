"""What several threads use, and one of them ends: it is not ended under a call that may hang."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator


class Users:
    """How many use it, until it ends."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self._ending = False

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """It is used in this `with`, and does not end meanwhile. Raises OSError if `end` was called."""
        with self._changed:
            if self._ending:
                raise OSError(errno.ECANCELED, "the disk is being closed, or is closed")
            self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """From now on nobody begins to use it. Returns when nobody does any more: that may take long."""
        with self._changed:
            self._ending = True
            self._changed.wait_for(lambda: not self._count)
