"""How a worker sleeps until a time: with a timeout the first time, and with a timer that stays set after that."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator

import pytest

from ringplane.dataplane.alarm import Alarm, find_timeout_until
from ringplane.native import timerfd

from .on_structs import on_structs

HOUR = 3600 * 10**9

timeout_until = on_structs(find_timeout_until)


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    made = Alarm()
    yield made
    made.close()


def is_set_to(alarm: Alarm) -> int:
    return int(alarm._record["set_to"][0])


def test_only_the_first_sleep_until_a_time_has_a_timeout(alarm: Alarm) -> None:
    now = time.monotonic_ns()
    assert timeout_until(alarm.address, now + HOUR, now) == HOUR
    assert is_set_to(alarm) == 0
    for _ in range(3):
        assert timeout_until(alarm.address, now + HOUR, now) == -1
        assert is_set_to(alarm) == now + HOUR


def test_another_time_is_another_timeout(alarm: Alarm) -> None:
    """The timer stays set to the first one, which may come again."""
    now = time.monotonic_ns()
    for _ in range(2):
        timeout_until(alarm.address, now + HOUR, now)
    assert timeout_until(alarm.address, now + HOUR - 5, now) == HOUR - 5
    assert timeout_until(alarm.address, now + HOUR, now) == -1
    assert timeout_until(alarm.address, now + HOUR - 5, now) == -1
    assert is_set_to(alarm) == now + HOUR - 5


def test_a_time_that_has_come(alarm: Alarm) -> None:
    assert timeout_until(alarm.address, 5, 5) == timeout_until(alarm.address, 5, 6) == 0


def test_the_timer_wakes_each_time_it_is_set(alarm: Alarm) -> None:
    """Also edge-triggered, because nobody reads it."""
    with select.epoll() as epoll:
        epoll.register(alarm.fd, select.EPOLLIN | select.EPOLLET)
        for _ in range(3):
            now = time.monotonic_ns()
            until = now + 1_000_000
            timeout_until(alarm.address, until, now)
            assert timeout_until(alarm.address, until, now) == -1
            assert epoll.poll(20)
            assert time.monotonic_ns() >= until


def test_without_timers_each_sleep_has_a_timeout(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> int:
        raise PermissionError(1, os.strerror(1))

    monkeypatch.setattr(timerfd, "create", fail)
    alarm = Alarm()
    assert "timerfd_create(2) is unavailable (Operation not permitted)" in caplog.text
    assert [timeout_until(alarm.address, 9, 5) for _ in range(3)] == [4, 4, 4]
    alarm.close()
