"""Connections that end: requests wait, and are sent again, or fail."""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ringplane
from ringplane.block.sources.nbd import nbd_units
from ringplane.block.sources.nbd.nbd_source import NbdSource
from ringplane.block.sources.nbd.nbd_units import obey
from ringplane.driver import Driver
from ringplane.virtio import blk

from ..nbd_server import HangUp, NbdServer, Request
from ..rig import IOERR, OK, PATIENCE, eventually, pattern
from ..waiting import wait_until
from .names import READ, SIZE, WRITE, Served


def test_requests_wait_for_the_server(server: NbdServer, served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    came = threading.Event()

    def never(request: Request, server: NbdServer) -> bytes:
        came.set()
        return b""

    server.reply = never
    driver = served(nbd_reconnect_delay=3600)
    sent = [driver._submit_request(READ, 8 * number, b"", 4096, 0) for number in range(20)]
    sent.append(driver._submit_request(WRITE, 1024, pattern(65536, 3), 0, 0))
    assert came.wait(PATIENCE)
    server.stop()
    assert eventually(lambda: any("cannot be reached" in line for line in caplog.messages))
    sent.append(driver._submit_request(blk.VIRTIO_BLK_T_FLUSH, 0, b"", 0, 0))
    server.reply = lambda request, server: None
    server.start()
    answers = [driver._answer(*each) for each in sent]
    assert {answer.status for answer in answers} == {OK}
    assert [answer.data for answer in answers[:20]] == [
        bytes(server.content[4096 * number : 4096 * (number + 1)]) for number in range(20)
    ]
    assert server.content[1024 * 512 :][:65536] == pattern(65536, 3)


class Expiring:
    """Stands for a LINK without a connection. `expired` is stored as soon as the I/O thread has read it."""

    fd = new_fd = -1
    wake_fd = failing = 0

    def __init__(self) -> None:
        self._expired = 0

    @property
    def expired(self) -> int:
        found, self._expired = self._expired, 1
        return found

    @expired.setter
    def expired(self, value: int) -> None:
        self._expired = value


def test_the_end_of_waiting_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when the I/O thread has looked for it: the next turn finds it."""
    link = Expiring()
    monkeypatch.setattr(nbd_units, "view", lambda address, layout: link)
    for name in ("monotonic_ns", "read", "fail_all", "receive_all", "begin_sync", "send_all"):
        monkeypatch.setattr(nbd_units, name, lambda *_: 0)
    obey._function(0, 0)
    assert not link.failing
    obey._function(0, 0)
    assert link.failing


def test_requests_fail_when_it_takes_too_long(
    server: NbdServer, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    driver = served(nbd_reconnect_delay=1)
    server.stop()
    assert driver.request(READ, 0, read=512).status == IOERR
    assert any(
        "requests have waited for 1 s; they fail until there is a connection" in line for line in caplog.messages
    )
    assert driver.request(READ, 0, read=512).status == IOERR
    server.start()
    assert eventually(lambda: driver.request(READ, 0, read=512).status == OK)


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_server_that_shrinks_its_export(server: NbdServer, served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """What lies across its new end fails, in words, and so does all else until it is as it was."""
    driver, whole = served(nbd_reconnect_delay=1), server.content
    server.content = whole[: SIZE // 2]
    assert driver.read(SIZE // 2 - 4096, 4096) == whole[SIZE // 2 - 4096 : SIZE // 2]
    assert driver.request(READ, SIZE // 1024 - 8, read=8192).status == IOERR
    assert driver.request(READ, 0, read=512).status == IOERR
    for words in (
        "the server ended the reply to a read before all data had come",
        f"the server has made the export smaller: {SIZE // 2} bytes instead of {SIZE}",
        "requests have waited for 1 s; they fail until there is a connection",
    ):
        assert any(words in line for line in caplog.messages), words
    server.content = whole
    assert eventually(lambda: driver.request(READ, SIZE // 1024 - 8, read=8192).status == OK)


def hang_up_at(sector: int) -> Callable[[Request, NbdServer], bytes | None]:
    """The server ends each connection at requests for this sector."""

    def reply(request: Request, server: NbdServer) -> bytes | None:
        if request.offset == sector * 512:
            raise HangUp
        return None

    return reply


def test_a_server_that_hangs_up_at_a_certain_request(
    server: NbdServer, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers others, also on the next connection, and so again and again: the delay is over nevertheless."""
    server.reply = hang_up_at(100)
    driver = served(nbd_reconnect_delay=1)
    assert driver.request(WRITE, 100, bytes(4096)).status == IOERR
    assert any("requests have waited for 1 s" in line for line in caplog.messages)
    # There are pauses between its connections.
    assert server.accepted < 20
    assert eventually(lambda: driver.request(READ, 0, read=4096).status == OK)


def test_a_server_that_hangs_up_at_once(server: NbdServer, served: Served) -> None:
    """After each handshake, without a request: the pauses become longer, and requests do not wait for ever."""
    driver = served(nbd_reconnect_delay=1)
    server.hangs_up = True
    server.drop_connections()
    assert driver.request(READ, 0, read=4096).status == IOERR
    assert server.accepted < 20
    server.hangs_up = False
    assert eventually(lambda: driver.request(READ, 0, read=4096).status == OK)


class Failing:
    """An epoll instance that can watch no socket once."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll, self._failed = epoll, False

    def register(self, fd: int, events: int) -> None:
        if not self._failed:
            self._failed = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._epoll.register(fd, events)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_connection_that_cannot_be_watched(
    server: NbdServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ringplane.serve(server.uri, tmp_path / "socket", num_queues=1, nbd_reconnect_delay=3600) as export:
        assert isinstance(export.disk.source, NbdSource)
        [link] = export.disk.source._links
        link._epoll = Failing(link._epoll)  # type: ignore[assignment]
        with Driver(tmp_path / "socket", timeout=PATIENCE) as driver:
            server.drop_connections()
            assert driver.read(0, 4096) == server.content[:4096]
    words = "cannot connect again: its connection cannot be used: No space left on device"
    assert any(words in line for line in caplog.messages)


def test_a_server_that_comes_back_smaller(server: NbdServer, served: Served, caplog: pytest.LogCaptureFixture) -> None:
    driver = served(nbd_reconnect_delay=3600)
    whole = server.content
    server.stop()
    server.content = whole[: SIZE // 2]
    server.start()
    assert eventually(lambda: any("has made the export smaller" in line for line in caplog.messages))
    server.stop()
    server.content = whole
    server.start()
    assert driver.read(SIZE - 512, 512) == whole[-512:]


def test_it_is_closed_while_the_server_is_gone(server: NbdServer, served: Served) -> None:
    driver = served()
    server.stop()
    assert driver.request(READ, 0, read=512).status == IOERR


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_server_that_is_started_again_between_two_guests(
    server: NbdServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first request of the next guest does not fail, also without a delay."""
    caplog.set_level(logging.INFO)
    with ringplane.serve(server.uri, tmp_path / "socket", num_queues=1) as export:
        for number in range(1, 4):
            server.stop()
            server.start()
            wait_until(lambda number=number: caplog.text.count("connected again") == number)  # type: ignore[misc]
            with Driver(tmp_path / "socket", timeout=PATIENCE) as driver:
                assert driver.read(0, 4096) == server.content[:4096]
            # It is not used by the I/O thread any more.
            wait_until(lambda: export.state != "attached")
