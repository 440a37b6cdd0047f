"""The thread that sends a trace: it ends when it has to, however much there is to send."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest

from ringplane.api.trace_stream import SHORTEST, Sender
from ringplane.control.recording import Portion, Recording
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
        with Sender(cast(Recording, Endless(ended_after)), ours, chunked=False) as sender:
            sender.run(seconds)
            ours.shutdown(socket.SHUT_WR)
            reading.join(PATIENCE)
    assert not reading.is_alive()


def _drop(sock: socket.socket) -> None:
    while sock.recv(1 << 16):
        pass
