"""The stream of events of one client (server-sent events, https://html.spec.whatwg.org/#server-sent-events).

Nothing is queued for a client: it reads from the events that the process keeps (log/event_bus.py), at its own pace. One
that does not read loses events, and after a time its connection (connections.py).
"""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ringplane.api.schemas import EventData, Lost
from ringplane.api.streams import send_part, until_gone
from ringplane.log.event_bus import Event, Events


class EventStream(Response):
    """Events from now on; with `last`, the id of an event that the client has, all those after it."""

    media_type = "text/event-stream"

    def __init__(self, events: Events, last: str) -> None:
        super().__init__(headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._events = events
        self._number = self._start(last)
        self._wake = asyncio.Event()
        self._woken = False

    def _start(self, last: str) -> int:
        """The number after which the stream begins. An id of another process: all that this one has."""
        process, _, number = last.rpartition("-")
        if not last:
            return self._events.last
        return int(number[:20]) if process == self._events.process and number.isdigit() else 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()

        def wake() -> None:
            if not self._woken:
                self._woken = True
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._wake.set)

        gone = asyncio.create_task(until_gone(receive))
        self._events.subscribe(wake)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            # At once, so that the client knows that nothing is missed from now on. It has an id for its next stream.
            await send_part(send, f": ringplane\nid: {self._events.process}-{self._number}\n\n".encode())
            while not gone.done():
                await self._send_new(send)
                await self._wait(gone)
            await send({"type": "http.response.body"})
        finally:
            self._events.unsubscribe(wake)
            gone.cancel()

    async def _send_new(self, send: Send) -> None:
        self._wake.clear()
        self._woken = False
        found, lost = self._events.after(self._number)
        text = b"event: lost\ndata: " + msgspec.json.encode(Lost(lost)) + b"\n\n" if lost else b""
        text += b"".join(map(self._text, found))
        if found:
            self._number = found[-1].number
            # All at once: what a client that has gone does not get is noticed only afterwards.
            await send_part(send, text)

    def _text(self, event: Event) -> bytes:
        data = msgspec.json.encode(EventData(event.time, event.kind, event.disk, event.fields))
        return f"id: {self._events.process}-{event.number}\nevent: {event.kind}\ndata: ".encode() + data + b"\n\n"

    async def _wait(self, gone: asyncio.Task[None]) -> None:
        waiting = asyncio.create_task(_until(self._wake))
        try:
            await asyncio.wait([waiting, gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()


async def _until(wake: asyncio.Event) -> None:
    await wake.wait()
