"""Calls of functions that may hang: each runs on a thread of its own, which is left alone when its time is over."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from ringplane.system.signals import NONE, Signals

Result = TypeVar("Result")


def within(
    seconds: float,
    function: Callable[[], Result],
    signals: Signals = NONE,
    too_late: Callable[[Result], object] | None = None,
) -> Result:
    """The result of `function`, or what it raises; raises TimeoutError after so many seconds, and Interrupted.

    Then the function still runs, and `too_late` gets its result on that thread.
    """
    call = _Call(function, too_late)
    with contextlib.closing(call):
        call.start()
        if not signals.wait(call.ended, seconds):
            raise TimeoutError
        return call.result()


class _Call(Generic[Result]):
    def __init__(self, function: Callable[[], Result], too_late: Callable[[Result], object] | None) -> None:
        self._function, self._too_late = function, too_late
        self._lock = threading.Lock()
        self._result: Result | None = None
        self._error: BaseException | None = None
        # An eventfd, until nobody waits any more.
        self.ended = os.eventfd(0, os.EFD_CLOEXEC)

    def start(self) -> None:
        threading.Thread(target=self._run, name="ringplane-waits", daemon=True).start()

    def result(self) -> Result:
        if self._error is not None:
            raise self._error
        return cast(Result, self._result)

    def close(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            os.close(self.ended)
            self.ended = -1

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error
        with self._lock:
            if self.ended >= 0:
                os.eventfd_write(self.ended, 1)
                return
        if self._error is None and self._too_late is not None:
            self._too_late(cast(Result, self._result))
