"""The stream of a trace: lines of JSON, some of them followed by the events that they announce.

The first line describes the stream: version, the fields of an event and the names of its numbers. Each further line is
about one I/O thread: queues that were not mentioned before, how many events follow, and how many were lost before them.
Events are sent from the memory that the I/O thread writes to, without a copy; if it overwrites some before they are
sent, the next line says how many. A thread does it, because the event loop would need more CPU time than the rest. The
last one is `{"end": TIME, "process-ends": false}`: without it the process has died, or the client did not read fast
enough.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import msgspec
import numpy as np
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ringplane.api.streams import send_part, until_gone
from ringplane.control.trace_recording import Portion, TraceRecording
from ringplane.dataplane.trace_events import EVENT_NAMES, STATUS_NAMES, TYPE_NAMES
from ringplane.dataplane.trace_layout import EVENT, EVENT_BITS, LENGTH_SHIFT, ROUNDED, TIME_SHIFT, WAIT_SHIFT
from ringplane.dataplane.tracer import CAPACITY
from ringplane.system import libc

# Of the thread, as it appears in ps(1).
NAME = "ringplane-trace"

# Seconds.
SHORTEST = 0.01

VERSION = 3

# Seconds between looks at the events of the I/O threads, at least and at most. To look costs some 0.25 ms of CPU time
# on a busy machine, by estimate, however few there are. Each I/O thread keeps CAPACITY events
# (dataplane/tracer.py): at a million requests per second those of 262 ms.
SHORTEST_WAIT, LONGEST_WAIT = 0.02, 0.1


class TraceStream(Response):
    """What is recorded, for so many seconds, until it is ended, or until the client has gone."""

    media_type = "application/octet-stream"

    def __init__(self, recording: TraceRecording, seconds: float | None) -> None:
        super().__init__(headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._recording, self._seconds = recording, seconds
        self._process_ends = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = scope["state"]["connection"]
        connection.at_shutdown = self._end_with_process
        if connection.stopping:
            self._end_with_process()
        gone = asyncio.create_task(until_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send_part(send, _line(_description(self._recording.began)))
            with Sender(self._recording, await connection.share(), scope["http_version"] != "1.0") as sender:
                gone.add_done_callback(lambda _: sender.give_up())
                await sender.on_thread(lambda: sender.run(self._seconds))
                await self._recording.stop()
                await sender.on_thread(sender.send_rest)
            await send_part(send, _line({"end": time.monotonic_ns(), "process-ends": self._process_ends}))
            await send({"type": "http.response.body"})
        except OSError:
            # The client has gone, or does not read.
            connection.drop()
        finally:
            gone.cancel()
            connection.at_shutdown = None
            await self._recording.stop()

    def _end_with_process(self) -> None:
        """Send what was recorded until now, before the process stops or another one takes over."""
        self._process_ends = True
        self._recording.ending.set()


class Sender:
    """Sends what is recorded, on a thread that may wait for the client."""

    def __init__(self, recording: TraceRecording, sock: socket.socket, chunked: bool) -> None:
        """It owns the socket. `chunked`: as HTTP has it since version 1.1."""
        self._recording, self._sock, self._chunked = recording, sock, chunked
        self._thread = ThreadPoolExecutor(1, NAME, libc.name_thread, (NAME,))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.give_up()
        self._thread.shutdown()
        self._sock.close()

    def give_up(self) -> None:
        """End the connection, and the thread if it waits; any thread may call."""
        self._recording.ending.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    async def on_thread(self, function: Callable[[], None]) -> None:
        """Call it on the thread."""
        await asyncio.get_running_loop().run_in_executor(self._thread, function)

    # On the thread. They raise OSError when the client has gone or does not read.

    def run(self, seconds: float | None) -> None:
        """Send, for so many seconds or until the recording ends, what it has until then."""
        deadline = math.inf if seconds is None else time.monotonic() + seconds

        def over(wait: float = 0) -> bool:
            left = deadline - time.monotonic()
            return left <= 0 or self._recording.ending.wait(min(wait, left))

        wait = SHORTEST_WAIT
        while not over(wait):
            unread = self._recording.look()
            # At the present rate, until an I/O thread has a third of what it keeps.
            wait = min(max(wait * CAPACITY / 3 / max(unread, 1), SHORTEST_WAIT), LONGEST_WAIT)
            for portion in self._recording.read():
                self._send_portion(portion)
                if over():
                    # The rest is sent after the end.
                    return

    def send_rest(self) -> None:
        """Send what has not been sent; the recording has been stopped."""
        self._recording.look()
        for portion in self._recording.read():
            self._send_portion(portion)

    def _send_portion(self, portion: Portion) -> None:
        self._send(_line(_announcement(portion)), portion.events.view(np.uint8).data)

    def _send(self, line: bytes, events: memoryview) -> None:
        before, after = (b"%x\r\n" % (len(line) + len(events)), b"\r\n") if self._chunked else (b"", b"")
        parts = [memoryview(before + line), events, memoryview(after)]
        sent = self._sock.sendmsg(parts)
        for part in parts:
            if sent < len(part):
                self._sock.sendall(part[sent:])
            sent = max(sent - len(part), 0)


def _description(began: int) -> dict[str, object]:
    return {
        "ringplane-trace": VERSION,
        "fields": [(name, EVENT[name].str) for name in EVENT.names or ()],
        "clock": "CLOCK_MONOTONIC",
        "began": began,
        "events": EVENT_NAMES,
        "types": TYPE_NAMES,
        "statuses": STATUS_NAMES,
        "event-bits": EVENT_BITS,
        "rounded": ROUNDED,
        "length-shift": LENGTH_SHIFT,
        "time-shift": TIME_SHIFT,
        "wait-shift": WAIT_SHIFT,
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
