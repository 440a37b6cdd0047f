"""`ringplane serve` in the foreground: what it logs while it waits for its end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from ringplane.cli.foreground import warn_of_waiting
from ringplane.control.server import Server


@pytest.mark.parametrize(
    ("requests", "awaited"), [((1, 2), "3 requests in flight"), ((0,), "storage to close an image")]
)
def test_what_is_waited_for(caplog: pytest.LogCaptureFixture, requests: tuple[int, ...], awaited: str) -> None:
    """Without requests in flight it is not these."""
    exports = [SimpleNamespace(in_flight=each) for each in requests]
    warn_of_waiting(cast(Server, SimpleNamespace(exports=exports)), "SIGTERM")
    assert f"waiting for {awaited}" in caplog.text
    assert "SIGTERM again ends the process" in caplog.text
