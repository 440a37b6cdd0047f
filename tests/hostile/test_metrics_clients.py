"""Hostile clients of metrics over TCP, of a confined process: its disk and an honest client are served meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from unit.rig import PATIENCE, eventually

from .http_victim import IMPATIENT, HttpVictim, check_garbage, receive, running, unharmed

GET = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"


class Victim(HttpVictim):
    """A process with metrics over TCP."""

    OPTIONS = ("--metrics", "127.0.0.1:0")

    def __init__(self, folder: Path, code: str) -> None:
        super().__init__(folder, code)
        (line,) = [line for line in self.announced if line.startswith("metrics on ")]
        self.port = urlsplit(line.split()[2]).port

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def check_client(self) -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)) as honest:
            honest.request("GET", "/metrics")
            answer = honest.getresponse()
            assert (answer.status, b'ringplane_disk_attached{disk="disk"} 1\n' in answer.read()) == (200, True)


@pytest.fixture(scope="module")
def served() -> Iterator[Victim]:
    with running(Victim, IMPATIENT) as victim:
        yield victim


@pytest.fixture
def victim(served: Victim) -> Iterator[Victim]:
    yield from unharmed(served)


def test_garbage(victim: Victim) -> None:
    check_garbage(victim, seed=9, requests=100)


def test_a_request_that_does_not_end_is_dropped(victim: Victim) -> None:
    with victim.connect() as sock:
        sock.sendall(GET[:-2])
        victim.check()
        assert receive(sock) == b""


def test_many_connections(victim: Victim) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(1000):
            sock = victim.connect()
            if number % 5:
                sock.close()
            else:
                stack.callback(sock.close)
            if number % 250 == 0:
                victim.check()
        victim.check()


def test_answers_that_nobody_reads(victim: Victim) -> None:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(victim.connect()) for _ in range(32)]
        for sock in socks:
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                for _ in range(3):
                    sock.send(GET * 50)
        victim.check()
        assert eventually(lambda: all(map(_is_closed, socks)))


def _is_closed(sock: socket.socket) -> bool:
    """Whether the other end has closed the connection, although it was not read to its end."""
    try:
        sock.send(b"x")
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False


def test_connections_that_are_reset_while_they_are_answered(victim: Victim) -> None:
    for _ in range(200):
        with victim.connect() as sock:
            sock.sendall(GET * 3)
            # close(2) sends RST.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    victim.check()
