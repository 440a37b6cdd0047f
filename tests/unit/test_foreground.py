"""`ringplane serve` in the foreground: what it logs while it waits for its end."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import cast

import pytest

from ringplane.cli.foreground import hangs, warn_of_waiting
from ringplane.control.server import Server
from ringplane.system.signals import ENDING, WOKEN, CaughtSignals


@pytest.mark.parametrize(
    ("requests", "awaited"), [((1, 2), "3 requests in flight"), ((0,), "storage to close an image")]
)
def test_what_is_waited_for(caplog: pytest.LogCaptureFixture, requests: tuple[int, ...], awaited: str) -> None:
    """Without requests in flight it is not these."""
    exports = [SimpleNamespace(in_flight=each) for each in requests]
    warn_of_waiting(cast(Server, SimpleNamespace(exports=exports)), "SIGTERM")
    assert f"waiting for {awaited}" in caplog.text
    assert "SIGTERM again, or 60 s, ends the process" in caplog.text


class Hanging(CaughtSignals):
    """Signals that come while nothing ends the server."""

    def __init__(self, *numbers: int | None) -> None:
        self.ending = set(ENDING)
        self._numbers = list(numbers)

    def next(self, timeout: float | None = None) -> int | None:
        return self._numbers.pop(0) if self._numbers else None


@pytest.mark.parametrize(
    ("numbers", "limit", "why"),
    [
        ((WOKEN,), 3600, ""),
        ((signal.SIGHUP + 100, None, signal.SIGTERM), 3600, "by a second signal"),
        ((), 0.01, "after 60 s"),
    ],
)
def test_a_stop_that_hangs_ends(numbers: tuple[int | None, ...], limit: float, why: str) -> None:
    """The end of the server, a second signal, or the time: whichever comes first."""
    assert hangs(Hanging(*numbers), limit) == why
