"""Hostile clients of the API of a confined process: its disks and other clients are served, and nothing grows."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringplane.driver.load import Load, run_load
from unit.api_client import Api
from unit.rig import PATIENCE, eventually

from .http_victim import IMPATIENT, MEMORY, PATIENT, HttpVictim, check_garbage, receive, running, unharmed

GET = b"GET /v1/disks HTTP/1.1\r\nhost: x\r\n\r\n"


class Victim(HttpVictim):
    """A process with an API."""

    OPTIONS = ("--api-socket", "api.sock")

    def __init__(self, folder: Path, code: str) -> None:
        super().__init__(folder, code)
        self.path = folder / "api.sock"
        self.api = Api(self.path)

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Blocking: with a timeout, a full queue of connections is an error (EAGAIN).
        sock.connect(str(self.path))
        sock.settimeout(PATIENCE)
        return sock

    def check_client(self) -> None:
        assert [disk["name"] for disk in self.api.get("/v1/disks")["disks"]] == ["disk"]
        for operation in ("pause", "resume", "flush"):
            self.api.post(f"/v1/disks/disk/{operation}")


@pytest.fixture(scope="module")
def served() -> Iterator[Victim]:
    with running(Victim, PATIENT) as victim:
        yield victim


@pytest.fixture
def victim(served: Victim) -> Iterator[Victim]:
    yield from unharmed(served)


@pytest.fixture(scope="module")
def impatient() -> Iterator[Victim]:
    with running(Victim, IMPATIENT) as victim:
        yield victim


def error_of(answer: bytes) -> dict[str, str]:
    error: dict[str, str] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    return error


# Time


@pytest.mark.parametrize(
    "begin",
    [
        b"",
        b"G",
        b"GET /v1/disks HTTP/1.1\r\nhost: x\r\n",
        b"POST /v1/disks HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{",
        b"POST /v1/disks HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab",
    ],
    ids=["nothing", "first byte", "headers", "body", "chunk"],
)
def test_a_request_that_does_not_end_is_dropped(impatient: Victim, begin: bytes) -> None:
    with impatient.connect() as sock:
        sock.sendall(begin)
        impatient.check()
        assert receive(sock) == b""
    impatient.check()


def test_a_request_that_arrives_byte_by_byte_is_dropped(impatient: Victim) -> None:
    with impatient.connect() as sock:
        for _ in range(10_000):
            try:
                sock.sendall(b"a")
            except OSError:
                return
            time.sleep(0.01)
    raise AssertionError("it is never dropped")


def test_an_answer_that_nobody_reads_ends_the_connection(impatient: Victim) -> None:
    fds, _ = impatient.resources()
    with impatient.connect() as sock:
        sock.setblocking(False)
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 64 << 20:
                sent += sock.send(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 100)
        impatient.check()
        assert eventually(lambda: impatient.resources()[0] <= fds)
    assert sent < 64 << 20


def test_a_stream_that_nobody_reads_loses_events_and_its_connection(impatient: Victim) -> None:
    fds, memory = impatient.resources()
    with impatient.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.sendall(b"GET /v1/events HTTP/1.1\r\nhost: x\r\n\r\n")

        def dropped() -> bool:
            for operation in ("pause", "resume"):
                impatient.api.post(f"/v1/disks/disk/{operation}")
            return impatient.resources()[0] <= fds

        deadline = time.monotonic() + 300
        while not dropped():
            assert time.monotonic() < deadline, "a stream that nobody reads is never dropped"
    impatient.check()
    assert impatient.resources()[1] <= memory + MEMORY


def test_a_trace_that_nobody_reads_loses_events_and_its_connection(impatient: Victim) -> None:
    """It ends with the connection: the next client can trace."""
    fds, memory = impatient.resources()
    with impatient.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.sendall(b"POST /v1/trace HTTP/1.1\r\nhost: x\r\n\r\n")
        # It has begun.
        assert sock.recv(12) == b"HTTP/1.1 200"
        deadline = time.monotonic() + 300
        while impatient.resources()[0] > fds:
            run_load(impatient.driver, Load(depth=8, requests=1000))
            assert time.monotonic() < deadline, "a trace that nobody reads is never dropped"
    impatient.check()
    with impatient.connect() as sock:
        sock.sendall(b"POST /v1/trace?seconds=0.01 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert receive(sock).startswith(b"HTTP/1.1 200 ")
    assert impatient.resources()[1] <= memory + MEMORY


# Size


def test_huge_bodies(victim: Victim) -> None:
    for head, body in (
        (b"content-length: 1000000000000\r\n", b"x" * 100_000),
        (b"content-length: 9999999999999999999999\r\n", b"x" * 100),
        (b"content-length: 200000\r\n", b"x" * 200_000),
        (
            b"transfer-encoding: chunked\r\n",
            b"10000\r\n" + b"x" * 65536 + b"\r\n" + b"10000\r\n" + b"x" * 65536 + b"\r\n",
        ),
    ):
        with victim.connect() as sock:
            with contextlib.suppress(OSError):
                sock.sendall(b"POST /v1/disks HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + head + b"\r\n" + body)
            sock.settimeout(PATIENCE)
            status = sock.recv(65536).split(b" ")[1]
            assert status in (b"413", b"400"), (head, status)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 10_000,
        b"GET / HTTP/1.1\r\na: " + b"b" * 100_000,
    ],
    ids=["path", "headers", "value"],
)
def test_huge_heads(victim: Victim, head: bytes) -> None:
    with victim.connect() as sock:
        with contextlib.suppress(OSError):
            sock.sendall(head)
        answer = receive(sock)
        assert answer == b"" or error_of(answer)["what"] == "this is not an HTTP request"


# Number


def test_thousands_of_connections(victim: Victim) -> None:
    fds, _ = victim.resources()
    with contextlib.ExitStack() as stack:
        for number in range(3000):
            with contextlib.suppress(OSError):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                # Those of this test itself are limited too.
                if number % 10 == 0:
                    stack.callback(sock.close)
                sock.connect(str(victim.path))
                if number % 10:
                    sock.close()
            if number % 500 == 0:
                victim.check()
        victim.check()
        # The connections, and those that are being accepted.
        assert victim.resources()[0] <= fds + 64 + 2 * 32


def test_connections_that_are_all_busy(victim: Victim) -> None:
    """Streams, and requests whose answers are not read, cannot keep an honest client away for long."""
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            sock = stack.enter_context(victim.connect())
            with contextlib.suppress(OSError):
                sock.sendall(b"GET /v1/events HTTP/1.1\r\nhost: x\r\n\r\n")
        victim.check()


# Form


def test_garbage(victim: Victim) -> None:
    check_garbage(victim, seed=7, requests=300)


def test_mutated_requests(victim: Victim) -> None:
    draw = random.Random(8)
    whole = [
        GET,
        b"POST /v1/disks HTTP/1.1\r\nhost: x\r\ncontent-length: 30\r\n\r\n" + b'{"image":"/a","num-queues":9}' + b" ",
        b"POST /v1/disks/disk/resize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"GET /v1/disks/disk HTTP/1.0\r\nconnection: keep-alive, upgrade\r\nupgrade: websocket\r\n\r\n",
        b"POST /v1/disks/disk/flush HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 0\r\n\r\n",
    ]
    for _ in range(500):
        data = bytearray(draw.choice(whole) * draw.randrange(1, 4))
        for _ in range(draw.randrange(4)):
            at = draw.randrange(len(data))
            data[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
        with victim.connect() as sock:
            with contextlib.suppress(OSError):
                sock.sendall(bytes(data))
                sock.shutdown(socket.SHUT_WR)
            receive(sock)


def test_pipelined_requests_are_answered_in_order(victim: Victim) -> None:
    paths = [b"/v1/disks", b"/none", b"/v1/io-threads"] * 20
    with victim.connect() as sock:
        requests = [b"GET " + path + b" HTTP/1.1\r\nhost: x\r\n\r\n" for path in paths[:-1]]
        sock.sendall(b"".join(requests) + b"GET /none HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = receive(sock)
    statuses = [part.split(b" ")[0] for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"404", b"200"] * 19 + [b"200", b"404", b"404"]


@pytest.mark.parametrize("how", [socket.SHUT_WR, socket.SHUT_RD])
def test_half_closed_connections(victim: Victim, how: int) -> None:
    for request in (GET, b"GET /v1/ev", b"GET /v1/events HTTP/1.1\r\nhost: x\r\n\r\n"):
        with victim.connect() as sock:
            sock.sendall(request)
            sock.shutdown(how)
            victim.check()


def test_clients_that_go_while_they_are_answered(victim: Victim) -> None:
    for path in (b"/openapi.json", b"/v1/events", b"/v1/disks/disk/pause", b"/v1/disks/disk/resume"):
        for _ in range(50):
            with victim.connect() as sock:
                sock.sendall((b"POST " if b"disk/" in path else b"GET ") + path + b" HTTP/1.1\r\nhost: x\r\n\r\n")


def test_a_confined_process_adds_no_disk_and_says_why(victim: Victim) -> None:
    body = {"image": str(victim.folder / "b.img"), "socket-path": str(victim.folder / "b.sock"), "create": "4M"}
    answer = victim.api.request("POST", "/v1/disks", body)
    assert (answer.status, answer.error) == (
        409,
        {
            "what": "this process may not open files any more, so no disk can be added",
            "where": "image",
            "right": "start ringplane with --allow-folder FOLDER, which allows disks whose images and sockets are "
            "below it, or with this disk",
        },
    )
