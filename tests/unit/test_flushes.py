"""Flushes of the control plane beside others that fail."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from ringplane.block.flushes import Flushes
from ringplane.native.structs import new, struct

RECORD = struct("something", "flush_failed")


@pytest.fixture
def flushes() -> Flushes:
    return Flushes(new(RECORD))


def test_one_that_succeeds(flushes: Flushes) -> None:
    made: list[int] = []
    flushes.make(lambda: made.append(1))
    assert made == [1]
    assert not flushes.failed


def test_one_that_fails(flushes: Flushes) -> None:
    with pytest.raises(OSError, match="No space left"):
        flushes.make(_raising(errno.ENOSPC))
    assert flushes.failed
    made: list[int] = []
    with pytest.raises(OSError, match="a flush failed before"):
        flushes.make(lambda: made.append(1))
    assert not made


def test_one_beside_another_that_fails(flushes: Flushes) -> None:
    """What both were for may be lost."""
    with pytest.raises(OSError, match="a flush failed meanwhile"):
        flushes.make(flushes.set_failed)


def test_an_error_that_loses_nothing(flushes: Flushes) -> None:
    with pytest.raises(OSError, match="not connected"), flushes.checked():
        _raising(errno.ENOTCONN)()
    assert not flushes.failed


def _raising(code: int) -> Callable[[], None]:
    def flush() -> None:
        raise OSError(code, {errno.ENOSPC: "No space left", errno.ENOTCONN: "not connected"}[code])

    return flush
