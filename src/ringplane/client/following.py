"""The stream of events of a process, and of the processes that follow it."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from ringplane.api.schemas import EventData, Lost
from ringplane.client.api_errors import ApiError, NoConnection
from ringplane.client.client import Client, Request

# Seconds between attempts to connect again: at first, at most, and from which on it is worth a remark: an upgrade takes
# less.
SOONEST, LATEST, WORTH_A_REMARK = 0.05, 0.8, 0.4


def _nothing() -> None:
    """Nobody has to know."""


class Followed:
    """Events of what a client asks, from `connect` on."""

    def __init__(self, client: Client) -> None:
        self._client = client
        # The id of the newest event that was seen, or that came before the stream.
        self._last = ""
        self._request: Request | None = None

    def connect(self) -> None:
        """No event is missed from here on, or from the last one that was read. Raises ApiError."""
        headers = {"Last-Event-ID": self._last} if self._last else {}
        self._request = self._client.send("GET", "/v1/events", headers=headers)
        self._response = self._request.response()
        self._request.set_patience(None)

    def read(self) -> Iterator[EventData]:
        """Events until the stream ends, because the process has stopped or was replaced. Raises TimeoutError."""
        fields: dict[str, str] = {}
        while line := self._line():
            name, _, value = line.rstrip("\n").partition(":")
            if name:
                fields[name] = value.removeprefix(" ")
            elif line == "\n":
                self._last = fields.get("id", self._last)
                if "data" in fields:
                    yield self._event(fields["event"], fields["data"])
                fields = {}

    def read_on(self, lost: Callable[[], object], found: Callable[[], object] = _nothing) -> Iterator[EventData]:
        """Events without an end: it connects again as often as needed.

        If that takes long, `lost` is called, and `found` when it is connected again.
        """
        while True:
            yield from self.read()
            self._connect_again(lost, found)

    def wait(self, end: float | None) -> bool:
        """Wait for an event or for the next process, until `end` (CLOCK_MONOTONIC); whether there was one."""
        assert self._request is not None
        self._request.set_patience(None if end is None else max(end - time.monotonic(), SOONEST))
        try:
            return next(self.read(), None) is not None or self._connect_again(end=end)
        except TimeoutError:
            return False

    def close(self) -> None:
        """End the stream. May be called again."""
        if self._request is not None:
            self._request.close()

    def _connect_again(
        self, lost: Callable[[], object] = _nothing, found: Callable[[], object] = _nothing, end: float | None = None
    ) -> bool:
        """Whether that was possible before `end`."""
        self.close()
        pause, is_lost = SOONEST, False
        while end is None or time.monotonic() < end:
            try:
                self.connect()
                if is_lost:
                    found()
                return True
            except NoConnection:
                if pause == WORTH_A_REMARK:
                    is_lost = True
                    lost()
            except ApiError:
                # Too many streams, for now.
                pass
            time.sleep(pause)
            pause = min(2 * pause, LATEST)
        return False

    def _line(self) -> str:
        try:
            return self._response.readline().decode()
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException):
            return ""

    def _event(self, kind: str, data: str) -> EventData:
        if kind == "lost":
            lost: Any = self._client.decode(data.encode(), Lost)
            return EventData(time.time(), kind, "", msgspec.to_builtins(lost))
        return self._client.decode(data.encode(), EventData)
