"""The thread that sends a trace: it ends when it has to, however much there is to send."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator, MutableMapping
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ringplane.api.trace_stream import SHORTEST, Sender, TraceStream
from ringplane.control.trace_recording import Portion, TraceRecording
from ringplane.dataplane.trace_layout import EVENT

from .rig import PATIENCE


class Endless:
    """A recording of which there is always more to send. It has an end only for a sender that has stopped."""

    def __init__(self, ended_after: int) -> None:
        self.ending = threading.Event()
        self._left = ended_after

    def look(self) -> int:
        return 1

    def read(self) -> Iterator[Portion]:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            self._left -= 1
            if not self._left:
                self.ending.set()
            yield Portion("io0", {}, np.zeros(1, EVENT), 0, 0)
        raise AssertionError("the sender does not notice the end")


@pytest.mark.parametrize(("seconds", "ended_after"), [(None, 3), (SHORTEST, 0)])
def test_it_ends_while_there_is_more(seconds: float | None, ended_after: int) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        reading = threading.Thread(target=_drop, args=[theirs])
        reading.start()
        with Sender(cast(TraceRecording, Endless(ended_after)), ours, chunked=False) as sender:
            sender.run(seconds)
            ours.shutdown(socket.SHUT_WR)
            reading.join(PATIENCE)
    assert not reading.is_alive()


class Nothing:
    """A recording without events."""

    def __init__(self) -> None:
        self.began = 1
        self.ending = threading.Event()

    def look(self) -> int:
        return 0

    def read(self) -> Iterator[Portion]:
        return iter(())

    async def stop(self) -> None:
        pass


def _drop(sock: socket.socket) -> None:
    while sock.recv(1 << 16):
        pass


def test_a_stream_that_begins_when_the_process_stops_has_an_end() -> None:
    """Its connection was ended before the stream could ask to be notified of that."""
    ours, theirs = socket.socketpair()
    sent: list[bytes] = []

    async def share() -> socket.socket:
        return ours

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message.get("body", b""))

    async def check() -> None:
        connection = SimpleNamespace(stopping=True, at_shutdown=None, share=share)
        scope = {"state": {"connection": connection}, "http_version": "1.1"}
        async with asyncio.timeout(PATIENCE):
            await TraceStream(cast(TraceRecording, Nothing()), None)(scope, receive, send)
        assert connection.at_shutdown is None

    with theirs:
        asyncio.run(check())
    assert b'"process-ends":true' in b"".join(sent)
