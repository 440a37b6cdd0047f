"""The stream of a trace: lines of JSON, some of them followed by the events that they announce.

The first line describes the stream: version, the fields of an event and the names of its numbers. Each further line is
about one I/O thread: queues that were not mentioned before, how many events follow, and how many were lost before them.
Events are sent from the memory that the I/O thread writes to, without a copy; if it overwrites some before they are
sent, the next line says how many. The last one is `{"end": TIME}`: without it the process has ended, or the client did
not read fast enough.
"""

from __future__ import annotations

import asyncio
import time

import msgspec
import numpy as np
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ringplane.api.connections import Connection
from ringplane.api.streams import send_part, until_gone
from ringplane.control.recording import Portion, Recording
from ringplane.dataplane.trace_events import EVENT_NAMES, STATUS_NAMES, TYPE_NAMES
from ringplane.dataplane.tracer import CAPACITY, EVENT, WAIT_UNIT

# Seconds.
SHORTEST = 0.01

VERSION = 2

# Seconds between looks at the events of the I/O threads, at least and at most. To look costs CPU time, however few
# there are. Each thread keeps CAPACITY events (dataplane/tracer.py): at a million requests per second those of 65 ms.
SHORTEST_WAIT, LONGEST_WAIT = 0.02, 0.1


class TraceStream(Response):
    """What is recorded, for so many seconds, until it is ended, or until the client has gone."""

    media_type = "application/octet-stream"

    def __init__(self, recording: Recording, seconds: float | None) -> None:
        super().__init__(headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._recording, self._seconds = recording, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(until_gone(receive))
        connection = scope["state"]["connection"]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send_part(send, _line(_description()))
            await self._record(connection, gone)
            await self._recording.stop()
            await self._send_new(connection, gone)
            await send_part(send, _line({"end": time.monotonic_ns()}))
            await send({"type": "http.response.body"})
        finally:
            gone.cancel()
            await self._recording.stop()

    async def _record(self, connection: Connection, gone: asyncio.Task[None]) -> None:
        ended = asyncio.create_task(self._recording.ending.wait())
        end = None if self._seconds is None else time.monotonic() + self._seconds
        wait = SHORTEST_WAIT
        while not gone.done() and not ended.done() and (left := wait if end is None else end - time.monotonic()) > 0:
            await asyncio.wait([gone, ended], timeout=min(wait, left), return_when=asyncio.FIRST_COMPLETED)
            # At the present rate, until an I/O thread has an eighth of what it keeps.
            wait = min(max(wait * CAPACITY / 8 / max(self._recording.unread, 1), SHORTEST_WAIT), LONGEST_WAIT)
            await self._send_new(connection, gone)
        ended.cancel()

    async def _send_new(self, connection: Connection, gone: asyncio.Task[None]) -> None:
        for portion in self._recording.read():
            await connection.send_from_memory([_line(_announcement(portion)), portion.events.view(np.uint8).data])
            # Other clients get their turn, and it is noticed when this one has gone.
            await asyncio.sleep(0)
            if gone.done():
                return


def _description() -> dict[str, object]:
    return {
        "ringplane-trace": VERSION,
        "fields": [(name, EVENT[name].str) for name in EVENT.names or ()],
        "clock": "CLOCK_MONOTONIC",
        "began": time.monotonic_ns(),
        "events": EVENT_NAMES,
        "types": TYPE_NAMES,
        "statuses": STATUS_NAMES,
        "wait-unit": WAIT_UNIT,
    }


def _announcement(portion: Portion) -> dict[str, object]:
    queues = [
        {"number": number, "disk": queue.disk, "queue": queue.number, "layers": queue.layered}
        for number, queue in portion.queues.items()
    ]
    return {
        "io-thread": portion.thread,
        "queues": queues,
        "lost": portion.lost,
        "overwritten": portion.overwritten,
        "events": len(portion.events),
    }


def _line(message: dict[str, object]) -> bytes:
    return msgspec.json.encode(message) + b"\n"
