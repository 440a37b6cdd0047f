"""A thread that is started while that may fail, and gets its work when nothing may fail any more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future

from ringplane.system.aside import NoThread


class ReadyThread:
    """It is started, and then it either begins its work or is dismissed."""

    def __init__(self, name: str) -> None:
        self._work: Future[Callable[[], object]] = Future()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread, which waits. Raises NoThread."""
        try:
            self._thread.start()
        except RuntimeError:
            raise NoThread from None

    def begin(self, work: Callable[[], object]) -> None:
        """Have it do this, and then end."""
        self._work.set_result(work)

    def dismiss(self) -> None:
        """End it, unless it has begun. It may not have been started; a second call does nothing."""
        if self._work.cancel():
            self.join()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until it has ended; whether it has, or was never started."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self.is_alive

    @property
    def is_alive(self) -> bool:
        """Whether it waits or works."""
        return self._thread.is_alive()

    def _main(self) -> None:
        try:
            work = self._work.result()
        except CancelledError:
            return
        work()
