"""The thread that serves HTTP: clients that connect when it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from ringplane.api import http_thread
from ringplane.api.http_thread import HttpThread

from .waiting import PATIENCE as SOON


async def application(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def thread() -> HttpThread:
    return stopped_soon(application)


def stopped_soon(application: Any) -> HttpThread:
    """It serves one turn of its loop, in which a client is accepted, and is stopped in the next one."""
    thread = HttpThread("test")
    thread.open(application, socket.create_server(("127.0.0.1", 0)), [])
    thread._loop.call_soon(lambda: thread._loop.call_soon(thread.request_stop))
    thread.start()
    return thread


@contextlib.contextmanager
def connected(thread: HttpThread) -> Iterator[socket.socket]:
    (sock,) = thread._accepting.sockets
    with socket.create_connection(sock.getsockname(), timeout=SOON) as client:
        yield client


def test_a_client_that_was_just_accepted_is_answered(thread: HttpThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_thread, "STOP_PATIENCE", SOON)
    with connected(thread) as client:
        client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        asyncio.run(thread.run())
        assert client.recv(1000).startswith(b"HTTP/1.1 204 ")


def test_a_client_that_asks_nothing_is_not_waited_for(thread: HttpThread) -> None:
    with connected(thread) as client:
        asyncio.run(thread.run())
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1000) == b""


def test_a_stream_that_ends_with_the_process_is_sent_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than other requests may."""

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        connection, stopping = scope["state"]["connection"], asyncio.Event()

        def stop() -> None:
            monkeypatch.setattr(http_thread, "STOP_PATIENCE", 0.0)
            stopping.set()

        connection.at_shutdown = stop
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await stopping.wait()
        await asyncio.sleep(0.05)
        await send({"type": "http.response.body", "body": b"rest"})
        connection.at_shutdown = None

    monkeypatch.setattr(http_thread, "STOP_PATIENCE", SOON)
    monkeypatch.setattr(http_thread, "REST_PATIENCE", SOON)
    thread = stopped_soon(stream)
    with connected(thread) as client:
        client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        asyncio.run(thread.run())
        assert b"".join(iter(lambda: client.recv(1000), b"")).endswith(b"\r\n\r\nrest")
