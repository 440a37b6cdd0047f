"""Calls that may hang, with a time limit: what comes of them when nobody waits any more, and how many there can be."""

from __future__ import annotations

import os
import threading

import pytest

from ringplane.system.aside import NoThread
from ringplane.system.signals import Interrupted, Signals
from ringplane.system.time_limits import NotBegun, NotInTime, TimedCalls

from .waiting import PATIENCE, wait_until

AT_ONCE = 0.0


class Late(Signals):
    """The wait ends in another way than by the end of the call, but after it."""

    def __init__(self, interrupted: bool) -> None:
        self._interrupted = interrupted

    def wait(self, fd: int, timeout: float | None = None) -> bool:
        assert super().wait(fd, PATIENCE)
        if self._interrupted:
            raise Interrupted(15)
        return False


def test_what_it_returns_or_raises() -> None:
    assert TimedCalls().within(PATIENCE, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        TimedCalls().within(PATIENCE, lambda: 1 // 0)
    # An error of the call is not the end of its time.
    with pytest.raises(TimeoutError):
        TimedCalls().within(PATIENCE, _time_out)


def _time_out() -> None:
    raise TimeoutError


def test_a_result_at_the_last_moment() -> None:
    """It came after the wait and before the end of the call: it is not lost."""
    late: list[int] = []
    assert TimedCalls().within(AT_ONCE, lambda: 3, Late(interrupted=False), late.append) == 3
    with pytest.raises(Interrupted):
        TimedCalls().within(PATIENCE, lambda: 4, Late(interrupted=True), late.append)
    wait_until(lambda: late == [4])


def test_how_many_are_left() -> None:
    calls, goes_on, late = TimedCalls(2), threading.Event(), list[int]()

    def hang() -> int:
        goes_on.wait()
        return 5

    for _ in range(2):
        with pytest.raises(NotInTime):
            calls.within(AT_ONCE, hang, too_late=late.append)
    with pytest.raises(NotBegun):
        calls.within(AT_ONCE, hang)
    assert TimedCalls().within(PATIENCE, lambda: 3) == 3, "other calls are not held up"
    goes_on.set()
    wait_until(lambda: late == [5, 5])
    wait_until(lambda: _is_possible(calls))


def _is_possible(calls: TimedCalls) -> bool:
    try:
        return calls.within(PATIENCE, lambda: True)
    except NotBegun:
        return False


def test_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was not called, so nothing of it is left."""
    calls, before = TimedCalls(), os.listdir("/proc/self/fd")

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(3):
            with pytest.raises(NoThread):
                calls.within(PATIENCE, lambda: 3)
    assert calls.within(PATIENCE, lambda: 3) == 3
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == len(before))
