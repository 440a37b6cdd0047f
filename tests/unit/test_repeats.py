"""Repeated log lines: the first ones are logged, the others are counted per disk and place in the code."""

from __future__ import annotations

import logging
import weakref

import pytest

from ringplane.log.logs import DiskLog
from ringplane.log.repeats import BURST, PERIOD, Repeats


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Log:
    """A logger whose records pass through Repeats; `texts` are the logged ones."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.woken = 0
        self.repeats = Repeats(self.wake, self.clock)
        self.texts: list[str] = []
        self.logger = logging.Logger("test")
        handler = logging.Handler()
        handler.emit = lambda record: self.texts.append(record.getMessage())  # type: ignore[method-assign]
        handler.addFilter(self.repeats)
        self.logger.addHandler(handler)
        self.disks = {name: DiskLog(self.logger, name) for name in ("a.img", "b.img")}

    def wake(self) -> None:
        self.woken += 1

    def refuse(self, disk: str, number: object) -> None:
        self.disks[disk].warning("refused %s", number)

    def attach(self, disk: str) -> None:
        self.disks[disk].info("attached")

    def sums(self) -> list[str]:
        return [record.getMessage() for record in self.repeats.sums()]


@pytest.fixture
def log() -> Log:
    return Log()


def test_the_first_lines_are_logged_at_once_then_a_sum(log: Log) -> None:
    for number in range(1000):
        log.refuse("a.img", number)
    assert log.texts == [f"a.img: refused {number}" for number in range(BURST)]
    assert log.woken == 1
    assert log.sums() == []
    assert log.repeats.next_due() == PERIOD
    log.clock.now += PERIOD
    assert log.sums() == [f"a.img: refused 999 (the last of {1000 - BURST} more like this)"]
    assert log.repeats.next_due() is None
    assert log.sums() == []


def test_an_endless_flood_is_two_lines_per_period(log: Log) -> None:
    total = 0
    for _ in range(100):
        for _ in range(50):
            log.refuse("a.img", 1)
            log.clock.now += PERIOD / 50
        total += len(log.sums())
    assert total + len(log.texts) <= 2 * 100 + BURST
    assert log.woken <= 100


def test_each_disk_and_each_kind_of_line_is_counted_separately(log: Log) -> None:
    for _ in range(BURST + 5):
        log.refuse("a.img", 1)
    log.refuse("b.img", 2)
    log.attach("a.img")
    assert log.texts[BURST:] == ["b.img: refused 2", "a.img: attached"]


def test_lines_are_logged_at_once_again_after_a_quiet_time(log: Log) -> None:
    """After a quiet time as many are logged at once as at first."""
    for _ in range(2):
        log.texts.clear()
        for _ in range(BURST + 1):
            log.attach("a.img")
        assert len(log.texts) == BURST
        log.clock.now += PERIOD * (BURST + 1)
        assert len(log.sums()) == 1


def test_the_sum_comes_before_the_next_line(log: Log) -> None:
    for _ in range(BURST + 1):
        log.attach("a.img")
    log.clock.now += 3 * PERIOD
    log.attach("a.img")
    assert len(log.texts) == BURST
    assert log.sums() == ["a.img: attached (the last of 2 more like this)"]
    log.attach("a.img")
    assert len(log.texts) == BURST + 1


def test_all_sums_are_logged_at_the_end(log: Log) -> None:
    for _ in range(BURST + 3):
        log.attach("a.img")
        log.refuse("b.img", 1)
    assert len(log.repeats.sums(all_of_them=True)) == 2
    assert log.repeats.sums(all_of_them=True) == []


def test_debug_lines_are_not_counted(log: Log) -> None:
    for _ in range(3 * BURST):
        log.disks["a.img"].debug("message")
    assert len(log.texts) == 3 * BURST


def test_a_sum_has_no_traceback(log: Log) -> None:
    for _ in range(BURST + 2):
        try:
            raise ValueError("100 %")
        except ValueError as error:
            log.disks["a.img"].exception("failed: %s", error)
    (record,) = log.repeats.sums(all_of_them=True)
    assert record.exc_info is None
    assert record.getMessage() == "a.img: failed: 100 % (the last of 2 more like this)"


class Error(ValueError):
    """An exception with a weak reference; in the log, each holds frames, and through them memory of a front end."""


def test_counted_lines_hold_no_objects(log: Log) -> None:
    held = []
    for _ in range(BURST + 1):
        try:
            raise Error("why")
        except Error as error:
            log.disks["a.img"].warning("failed: %s", error, exc_info=error)
            held.append(weakref.ref(error))
    assert held[-1]() is None
    (record,) = log.repeats.sums(all_of_them=True)
    assert record.getMessage() == "a.img: failed: why (the last of 1 more like this)"


def test_a_line_that_cannot_be_formatted_is_counted_too(log: Log) -> None:
    for _ in range(BURST + 1):
        log.repeats.filter(log.logger.makeRecord("test", logging.INFO, "test.py", 1, "%d", ("no number",), None))
    (record,) = log.repeats.sums(all_of_them=True)
    assert record.getMessage() == "%d (the last of 1 more like this)"
