"""HTTP connections that clients cannot misuse: uvicorn's protocol, with limits for time, size and number.

A client has REQUEST_PATIENCE seconds for a whole request, from the connection or its last answer on, and WRITE_PATIENCE
to read what was sent. There are at most MAX_CONNECTIONS: one more closes the one that has been idle for longest, or, if
none is idle, gets 503 itself.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

import h11
import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from ringplane.api.schemas import Error, Problem

log = logging.getLogger(__name__)
# Of uvicorn's own lines only errors: its warnings do not say what a client has done, or where.
ERRORS = logging.getLogger(f"{__name__}.uvicorn")
ERRORS.setLevel(logging.ERROR)

# Seconds.
REQUEST_PATIENCE, WRITE_PATIENCE = 10.0, 30.0

MAX_CONNECTIONS = 64

# Of the lines and headers of a request, in bytes.
MAX_HEADERS = 16 << 10

# An answer before a request: nothing of HTTP has been read yet.
BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n"
)


def config(application: Any) -> Config:
    """Uvicorn's settings."""
    return Config(
        application,
        loop="none",
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        h11_max_incomplete_event_size=MAX_HEADERS,
        timeout_keep_alive=int(REQUEST_PATIENCE),
    )


class Connection(H11Protocol):
    """One connection."""

    def __init__(self, config: Config, server_state: ServerState, name: str) -> None:
        """`name`: of what is served, in log lines."""
        super().__init__(config, server_state, {"connection": self})
        self.logger = ERRORS
        self._name = name
        self._request_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._idle_since = 0.0
        # Called when the process stops, for an answer that would not end. It is None again when that has ended.
        self.at_shutdown: Callable[[], object] | None = None
        # Whether the process stops: then nobody calls what is set later.
        self.stopping = False

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Whatever waits to be written is noticed.
        transport.set_write_buffer_limits(high=0)
        self._idle_since = self.loop.time()
        self._watch_request()
        self._make_room()

    def _make_room(self) -> None:
        others: list[Connection] = [each for each in self.connections if each is not self]  # type: ignore[misc]
        if len(others) < MAX_CONNECTIONS:
            return
        if idle := [each for each in others if each.idle]:
            min(idle, key=lambda each: each._idle_since).drop()
            return
        body = _error(f"{MAX_CONNECTIONS} connections are in use", "close one of them")
        self.transport.write(BUSY % len(body) + body)
        self.transport.close()

    def drop(self) -> None:
        """Close at once, whatever is under way."""
        self.transport.abort()

    def shutdown(self) -> None:
        """End when the present request has been answered."""
        super().shutdown()
        self.stopping = True
        if self.at_shutdown:
            self.at_shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self._request_timer = _cancel(self._request_timer)
        self._write_timer = _cancel(self._write_timer)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_request()

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()
        self._watch_request()

    def _watch_request(self) -> None:
        """Have a timer exactly while a request is incomplete."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._request_timer = _cancel(self._request_timer)
        elif self._request_timer is None:
            self._request_timer = self.loop.call_later(REQUEST_PATIENCE, self.drop)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_PATIENCE, self.drop)

    def resume_writing(self) -> None:
        self._write_timer = _cancel(self._write_timer)
        super().resume_writing()

    def _should_upgrade(self) -> bool:
        """Never: HTTP/1.1 continues, as RFC 9110 allows."""
        return False

    async def share(self) -> socket.socket:
        """A socket for a thread that sends parts of the body, past the event loop, while nothing else is sent.

        It waits WRITE_PATIENCE seconds for the client and then raises TimeoutError. The caller closes it.
        """
        await self.flow.drain()
        shared: socket.socket = self.transport.get_extra_info("socket").dup()
        shared.settimeout(WRITE_PATIENCE)
        return shared

    def send_400_response(self, msg: str) -> None:
        """What arrived is not HTTP; nothing after it can be understood."""
        log.warning("%s: a client was disconnected, because it sent what is not an HTTP request", self._name)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = _error("this is not an HTTP request", "send HTTP/1.1 with up to 16 KiB of headers")
            headers = {"content-type": "application/json", "connection": "close", "content-length": str(len(body))}
            response = h11.Response(status_code=400, headers=list(headers.items()), reason=b"Bad Request")
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _error(what: str, right: str) -> bytes:
    return msgspec.json.encode(Error(Problem(what, "", right)))


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Returns the timer that there is then: none."""
    if timer is not None:
        timer.cancel()
    return None
