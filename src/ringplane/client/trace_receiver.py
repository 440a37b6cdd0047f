"""The stream of a trace as the API sends it (api/trace_stream.py), and its end at any moment."""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import msgspec
import numpy as np

from ringplane.client.api_errors import ApiError, NoConnection
from ringplane.client.client import Client, Request
from ringplane.dataplane.trace_layout import COMPLETE, EVENT, EVENT_SIZE, Events, kinds

VERSION = 3

# Seconds in which the process has to end a recording that is stopped.
PATIENCE = 5.0


class Description(msgspec.Struct):
    """What the first line says. The layout of events is that of the version."""

    version: int = msgspec.field(name="ringplane-trace")
    began: int
    events: dict[int, str]
    types: dict[int, str]
    statuses: dict[int, str]


class NewQueue(msgspec.Struct):
    """A queue that has events from here on. `layers`: whether its disk has any."""

    number: int
    disk: str
    queue: int
    layers: bool


class Announcement(msgspec.Struct, rename="kebab"):
    """What each further line says: which events follow it. The last one has `end`, the time, and `process-ends`."""

    io_thread: str = ""
    queues: list[NewQueue] = []
    lost: int = 0
    overwritten: int = 0
    events: int = 0
    end: int = 0
    process_ends: bool = False


@dataclass(slots=True)
class Block:
    """Events of an I/O thread, in their order; `lost` ones came before them. Both can still change.

    The process may have overwritten the first ones while it sent them.
    """

    thread: str
    queues: list[NewQueue]
    lost: int
    events: Events


class Recorded:
    """What was recorded, complete or not."""

    def __init__(self, description: Description) -> None:
        self.description = description
        self.blocks: list[Block] = []
        self.requests = self.lost = 0
        # Nanoseconds, CLOCK_MONOTONIC; 0: the stream has no end.
        self.ended = 0
        # Whether it has none because the process has died or hangs, or because its events were not read fast enough.
        self.cut_off = False
        self.process_ended = False


class Receiver:
    """Receives a trace on a thread of its own, until its end or until it is stopped."""

    def __init__(self, client: Client, request: Request, most_requests: int) -> None:
        """It wants to be stopped after so many requests. Raises ApiError."""
        self._client = client
        self._response = request.response()
        self._request, self._most = request, most_requests
        # While nothing happens there are no events.
        request.set_patience(None)
        self.recorded = Recorded(self._describe())
        # The last block of each I/O thread.
        self._last: dict[str, Block] = {}
        # Can be read when it has ended or wants to be stopped.
        self.ended_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def stop(self) -> Recorded:
        """End it, if it has not ended, and return what was received."""
        if self._thread.is_alive():
            # If it has ended meanwhile, or its process has, the thread notices it too.
            with contextlib.suppress(ApiError):
                self._client.ask("DELETE", f"/v1/trace?began={self.recorded.description.began}")
            self._thread.join(PATIENCE)
        self._request.abort()
        self._thread.join()
        self._request.close()
        os.close(self.ended_fd)
        return self.recorded

    def keep(self, block: Block) -> None:
        """Called on the thread."""
        self.recorded.blocks.append(block)

    def _describe(self) -> Description:
        try:
            description = msgspec.json.decode(self._response.readline(), type=Description)
        except (msgspec.MsgspecError, OSError, http.client.HTTPException) as error:
            raise NoConnection(f"the answer is not a trace ({error}); use the ringplane that serves it") from None
        if description.version != VERSION:
            raise NoConnection(f"the trace has version {description.version}; use the ringplane that serves it")
        return description

    def _receive(self) -> None:
        try:
            for block in self._blocks(self._response):
                self.keep(block)
                self.recorded.requests += _completed(block.events)
                if self.recorded.requests >= self._most:
                    os.eventfd_write(self.ended_fd, 1)
        except (msgspec.MsgspecError, OSError, ValueError, http.client.HTTPException):
            # What was received until then is kept.
            pass
        finally:
            self.recorded.cut_off = not self.recorded.ended
            os.eventfd_write(self.ended_fd, 1)

    def _blocks(self, source: BinaryIO | http.client.HTTPResponse) -> Iterator[Block]:
        while line := source.readline():
            announced = msgspec.json.decode(line, type=Announcement)
            if announced.end:
                self.recorded.ended, self.recorded.process_ended = announced.end, announced.process_ends
                return
            self.recorded.lost += announced.lost
            if announced.overwritten:
                self._drop(self._last[announced.io_thread], announced.overwritten)
            data = source.read(announced.events * EVENT_SIZE)
            lost = announced.lost - announced.overwritten
            block = Block(announced.io_thread, announced.queues, lost, np.frombuffer(data, EVENT))
            self._last[announced.io_thread] = block
            yield block

    def _drop(self, block: Block, count: int) -> None:
        """Drop the first events of a block, which were lost."""
        self.recorded.requests -= _completed(block.events[:count])
        block.events = block.events[count:]
        block.lost += count


def _completed(events: Events) -> int:
    return int(np.count_nonzero(kinds(events) == COMPLETE))
