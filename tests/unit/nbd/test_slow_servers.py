"""Servers that hang, and those whose machine is gone."""

from __future__ import annotations

import ctypes
import logging
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

import ringplane
from ringplane.block.sources.nbd import reconnecting, silence, slowness
from ringplane.control.handover import HandoverError
from ringplane.driver import Driver

from ..nbd_server import NbdServer, Request
from ..rig import IOERR, PATIENCE
from ..waiting import wait_until
from .names import READ, Served


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_disk_is_paused_while_its_server_hangs(server: NbdServer, hanging: threading.Event, tmp_path: Path) -> None:
    """What is in flight is waited for; nothing more is fetched until the disk is resumed."""
    with (
        ringplane.serve(server.uri, tmp_path / "socket", num_queues=1) as export,
        Driver(tmp_path / "socket", timeout=PATIENCE) as driver,
    ):
        first = driver._submit_request(READ, 0, b"", 4096, 0)
        wait_until(lambda: len(server.requests) == 1)
        pausing = threading.Thread(target=export.pause)
        pausing.start()
        wait_until(lambda: export.paused)
        second = driver._submit_request(READ, 8, b"", 4096, 0)
        assert export.in_flight == 1
        assert pausing.is_alive()
        hanging.set()
        pausing.join(PATIENCE)
        assert driver._answer(*first).data == server.content[:4096]
        assert len(server.requests) == 1
        export.resume()
        assert driver._answer(*second).data == server.content[4096:8192]


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_an_upgrade_while_the_server_hangs(server: NbdServer, hanging: threading.Event, tmp_path: Path) -> None:
    """It is refused in one line, and the request ends in the running process."""
    path = tmp_path / "socket"
    with (
        ringplane.serve(server.uri, path, num_queues=1, upgradable=True),
        Driver(path, timeout=PATIENCE) as driver,
    ):
        sent = driver._submit_request(READ, 0, b"", 4096, 0)
        wait_until(lambda: len(server.requests) == 1)
        with pytest.raises(HandoverError, match=r"continues to serve: .*requests in flight took longer than 2 seconds"):
            ringplane.serve(server.uri, path, num_queues=1, upgrade=True)
        hanging.set()
        assert driver._answer(*sent).data == server.content[:4096]


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_front_end_that_stops_its_rings_while_the_server_hangs(
    server: NbdServer, hanging: threading.Event, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It gets its answer when the request in flight has ended."""
    with (
        ringplane.serve(server.uri, tmp_path / "socket", num_queues=1),
        Driver(tmp_path / "socket", timeout=PATIENCE) as driver,
    ):
        sent = driver._submit_request(READ, 0, b"", 4096, 0)
        wait_until(lambda: len(server.requests) == 1)
        bases: list[list[int]] = []
        stopping = threading.Thread(target=lambda: bases.append(driver.stop()))
        stopping.start()
        wait_until(lambda: "waiting for 1 requests in flight" in caplog.text)
        assert not bases
        hanging.set()
        stopping.join(PATIENCE)
        assert bases == [[1]]
        assert driver._answer(*sent).data == server.content[:4096]


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_front_ends_that_come_and_go_while_the_server_hangs(
    server: NbdServer, hanging: threading.Event, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The memory of one that has gone stays mapped until its request has ended; the next one is served then."""
    with ringplane.serve(server.uri, tmp_path / "socket", num_queues=1):
        gone = Driver(tmp_path / "socket", timeout=PATIENCE)
        gone._submit_request(READ, 0, b"", 4096, 0)
        wait_until(lambda: len(server.requests) == 1)
        gone._close_connection()
        came: list[bytes] = []

        def come() -> None:
            with Driver(tmp_path / "socket", timeout=PATIENCE) as driver:
                came.append(driver.read(4096, 4096))

        coming = threading.Thread(target=come)
        coming.start()
        wait_until(lambda: "waiting for 1 requests in flight" in caplog.text)
        assert not came
        hanging.set()
        coming.join(PATIENCE)
        assert came == [server.content[4096:8192]]


BPF_RET, SO_ATTACH_FILTER = 0x06, 26


def drop_what_arrives(sock: socket.socket) -> None:
    """From now on the kernel acknowledges nothing of this connection, as if the machine were gone."""
    ignore = ctypes.create_string_buffer(struct.pack("=HBBI", BPF_RET, 0, 0, 0))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", 1, ctypes.addressof(ignore)))


@pytest.fixture
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        peer = listener.accept()[0]
    with client, peer:
        yield client, peer


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slowness, "LONGEST_REPLY", 0.05)
    monkeypatch.setattr(silence, "LONGEST_SILENCE", 300)
    monkeypatch.setattr(silence, "LAST_ANSWER", 100)
    monkeypatch.setattr(reconnecting, "LOOK", 0.02)


@pytest.mark.parametrize("structured", [True], indirect=True)
@pytest.mark.parametrize("begun", [0, 20, 2000])
def test_a_reply_that_does_not_come(
    server: NbdServer, served: Served, begun: int, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of it, or only so many bytes: the log says that the guest waits, and when the rest has come."""
    caplog.set_level(logging.INFO)
    go = threading.Event()

    def slowly(request: Request, server: NbdServer) -> bytes:
        reply = server.usual(request)
        server.connections[0].sendall(reply[:begun])
        assert go.wait(PATIENCE)
        return reply[begun:]

    server.reply = slowly
    driver = served()
    sent = driver._submit_request(READ, 0, b"", 4096, 0)
    wait_until(lambda: "the server has not replied to a request for " in caplog.text)
    go.set()
    assert driver._answer(*sent).data == server.content[:4096]
    wait_until(lambda: "the server replies again" in caplog.text)
    assert caplog.text.count("the guest waits") == 1


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_server_that_is_killed_while_it_hangs(
    server: NbdServer,
    hanging: threading.Event,
    served: Served,
    impatient: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It has not replied then, though no request waits for it any more."""
    caplog.set_level(logging.INFO)
    driver = served()
    sent = driver._submit_request(READ, 0, b"", 4096, 0)
    wait_until(lambda: "the guest waits" in caplog.text)
    server.drop_connections()
    assert driver._answer(*sent).status == IOERR
    wait_until(lambda: "connected again" in caplog.text)
    assert "replies again" not in caplog.text


def test_a_peer_that_is_gone(connected: tuple[socket.socket, socket.socket], impatient: None) -> None:
    client, peer = connected
    client.send(b"x")
    assert peer.recv(1) == b"x"
    wait_until(lambda: not silence.is_silent(client))
    drop_what_arrives(peer)
    client.send(b"y")
    wait_until(lambda: silence.is_silent(client))


@pytest.mark.parametrize(
    ("probes", "unacknowledged", "sent", "acknowledged", "silent"),
    [
        (0, 1, 2_000, 26_000, True),
        (0, 1, 500, 26_000, False),
        (0, 1, 2_000, 24_000, False),
        (2, 0, 100, 26_000, True),
        # Nothing is on its way: keepalive asks.
        (0, 0, 26_000, 26_000, False),
        # It has no room, and has answered the last repetition, or the last question but one.
        (0, 1, 26_000, 26_000, False),
        (1, 0, 100, 26_000, False),
    ],
)
def test_when_a_peer_is_silent(probes: int, unacknowledged: int, sent: int, acknowledged: int, silent: bool) -> None:
    """By what the kernel may say of the connection, in milliseconds; when it says what depends on the machine."""
    information = silence.TCP_INFO.pack(probes, unacknowledged, sent, acknowledged)
    sock = cast(socket.socket, SimpleNamespace(getsockopt=lambda *asked: information))
    assert silence.is_silent(sock) == silent


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_server_whose_machine_is_gone(
    tmp_path: Path, impatient: None, caplog: pytest.LogCaptureFixture, served: Served, server: NbdServer
) -> None:
    server.stop()
    server.port = 0
    server.start()
    driver = served(nbd_reconnect_delay=3600)
    drop_what_arrives(server.connections[0])
    assert driver.read(0, 4096) == server.content[:4096]
    assert any("the server's machine, or the network to it, does not answer" in line for line in caplog.messages)
    assert server.accepted == 2
