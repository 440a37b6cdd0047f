"""Calls that may hang, for threads: each runs on a thread of its own, which is left alone when its time is over.

Nobody can end such a thread. So whoever makes these calls says how many may be left (`TimedCalls`), and no further one
begins while there are so many. Coroutines use `aside` (aside.py), which has no time limit of its own.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from ringplane.system.aside import start_thread
from ringplane.system.signals import NONE, Signals

Result = TypeVar("Result")

# The name of these threads, in ps(1) too.
NAME = "ringplane-timed"


class NotInTime(Exception):
    """The call has not ended. It still runs."""


class NotBegun(NotInTime):
    """The call was not made, because earlier ones have not ended."""


class TimedCalls:
    """Calls of one kind, of which `most` may run without anybody waiting for them any more."""

    def __init__(self, most: int = 1) -> None:
        self._most = most
        self._left = 0
        self._lock = threading.Lock()

    def within(
        self,
        seconds: float,
        function: Callable[[], Result],
        signals: Signals = NONE,
        too_late: Callable[[Result], object] | None = None,
    ) -> Result:
        """The result of `function`, or what it raises. Raises NotInTime after so many seconds, and Interrupted.

        Then the function still runs, and `too_late` gets its result on that thread. Raises NotBegun and NoThread
        if it was not called.
        """
        if self._left >= self._most:
            raise NotBegun
        call = _Call(function, too_late, self._count)
        with contextlib.closing(call):
            call.start()
            signals.wait(call.ended, seconds)
            return call.take()

    def _count(self, change: int) -> None:
        with self._lock:
            self._left += change


class _Call(Generic[Result]):
    def __init__(
        self,
        function: Callable[[], Result],
        too_late: Callable[[Result], object] | None,
        count: Callable[[int], None],
    ) -> None:
        """`count` is called with 1 when the call is left alone, and with -1 when it has ended then."""
        self._function, self._too_late, self._count = function, too_late, count
        self._lock = threading.Lock()
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._has_ended = self._is_taken = self._is_left = False
        # An eventfd, until nobody waits any more.
        self.ended = os.eventfd(0, os.EFD_CLOEXEC)
        # When it is set, it is known whether somebody has taken the result.
        self._decided = threading.Event()

    def start(self) -> None:
        """Raises NoThread."""
        try:
            start_thread(NAME, self._run)
        except BaseException:
            self._has_ended = True
            raise

    def take(self) -> Result:
        """The result. Raises NotInTime."""
        with self._lock:
            if not self._has_ended:
                raise NotInTime
            self._is_taken = True
        if self._error is not None:
            raise self._error
        return cast(Result, self._result)

    def close(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            os.close(self.ended)
            self.ended = -1
            self._is_left = not self._has_ended
            if self._is_left:
                self._count(1)
        self._decided.set()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error
        with self._lock:
            self._has_ended = True
            if self.ended >= 0:
                os.eventfd_write(self.ended, 1)
        self._decided.wait()
        try:
            if not self._is_taken and self._error is None and self._too_late is not None:
                self._too_late(cast(Result, self._result))
        finally:
            if self._is_left:
                self._count(-1)
