"""The client's end of a trace: where the events are missing that the process has overwritten while it sent them."""

from __future__ import annotations

import io
import json
import os
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import numpy as np

from ringplane.api.trace_stream import _description
from ringplane.client.client import Client, Request
from ringplane.client.trace_receiver import Receiver, Recorded
from ringplane.dataplane.trace_layout import COMPLETE, EVENT

from .waiting import wait_until


class Answered:
    """A request whose answer is this."""

    def __init__(self, body: BinaryIO) -> None:
        self._body = body

    def response(self) -> BinaryIO:
        return self._body

    def set_patience(self, patience: float | None) -> None:
        pass

    abort = close = lambda self: None


def line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def portion(*sectors: int, lost: int = 0, overwritten: int = 0, thread: str = "io0") -> bytes:
    events = np.zeros(len(sectors), EVENT)
    events["event"], events["sector"] = COMPLETE, sectors
    announced = {"io-thread": thread, "queues": [], "lost": lost, "overwritten": overwritten, "events": len(sectors)}
    return line(announced) + events.tobytes()


def received(*portions: bytes) -> Recorded:
    body = b"".join([line(_description(1)), *portions, line({"end": 1})])
    receiver = Receiver(cast(Client, None), cast(Request, Answered(io.BytesIO(body))), 1 << 62)
    wait_until(lambda: not receiver._thread.is_alive())
    return receiver.stop()


def test_events_are_missing_where_they_were_overwritten() -> None:
    """The first ones of a portion, which the next line of this I/O thread says; others were lost between them."""
    recorded = received(
        portion(1, 2, 3, 4, lost=7),
        portion(9, thread="io1"),
        portion(8, lost=5, overwritten=2),
        portion(lost=1, overwritten=1),
    )
    found = [(each.thread, each.lost, each.events["sector"].tolist()) for each in recorded.blocks]
    assert found == [("io0", 9, [3, 4]), ("io1", 0, [9]), ("io0", 4, []), ("io0", 0, [])]
    assert recorded.requests == 3
    assert not recorded.cut_off


def test_all_of_a_portion_was_overwritten() -> None:
    recorded = received(portion(1, 2), portion(lost=2, overwritten=2))
    assert [(each.lost, len(each.events)) for each in recorded.blocks] == [(2, 0), (0, 0)]
    assert recorded.requests == 0


def test_it_ends_only_its_own_recording() -> None:
    """Another client's may have begun when this one has just ended."""
    reading, writing = os.pipe()
    asked: list[tuple[str, str]] = []

    def ask(method: str, target: str) -> None:
        asked.append((method, target))
        os.write(writing, line({"end": 6}))

    with open(reading, "rb") as response, open(writing, "wb"):
        os.write(writing, line(_description(5)))
        client, request = SimpleNamespace(ask=ask), Answered(response)
        receiver = Receiver(cast(Client, client), cast(Request, request), 1 << 62)
        assert receiver.stop().ended == 6
    assert asked == [("DELETE", "/v1/trace?began=5")]
