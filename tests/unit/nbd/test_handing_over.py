"""Connections that another process takes over, and the end of a disk."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ringplane
from ringplane.block.image import ImageError
from ringplane.block.sources.choose_source import open_source, take_over_source
from ringplane.block.sources.nbd import protocol as nbd
from ringplane.block.sources.nbd.nbd_source import NbdSource
from ringplane.control.handover import HandoverError
from ringplane.control.taking_over import Predecessor
from ringplane.driver import Driver
from ringplane.options.disk_config import DiskConfig

from ..nbd_server import EVERYTHING, NbdServer
from ..rig import OK, PATIENCE, eventually, pattern
from ..waiting import wait_until
from .names import READ


def test_it_is_taken_over(server: NbdServer, tmp_path: Path) -> None:
    """With its connection: the server may allow only one."""
    server.flags = EVERYTHING & ~nbd.FLAG_CAN_MULTI_CONN
    path = tmp_path / "socket"
    with (
        ringplane.serve(server.uri, path, num_queues=1, upgradable=True) as export,
        Driver(path, timeout=PATIENCE) as driver,
    ):
        driver.write(0, pattern(4096, 7))
        with ringplane.serve(server.uri, path, num_queues=1, upgrade=True) as successor:
            assert export.wait(PATIENCE)
            assert driver.read(0, 4096) == pattern(4096, 7)
            assert server.accepted == 1
            server.stop()
            server.start()
            assert eventually(lambda: driver.request(READ, 0, read=512).status == OK)
            successor.disk.sync()


@pytest.fixture
def source(config: DiskConfig) -> Iterator[NbdSource]:
    """That of a disk without an I/O thread."""
    with contextlib.closing(open_source(config).prepare([])) as made:
        assert isinstance(made, NbdSource)
        made.part(64)
        made.start_threads()
        made.watch(lambda: None)
        yield made


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_replies_to_its_successor_are_left_alone(source: NbdSource) -> None:
    """Between the end of its I/O and its own end both processes have the connection."""
    [fd] = source.hand_over()["nbd"]["connections"]
    source.let_go()
    with socket.socket(fileno=os.dup(fd.number)) as successor:
        for _ in range(20):
            successor.send(struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_READ, 1, 0, 512))
            readable = select.poll()
            readable.register(successor, select.POLLIN)
            assert readable.poll(PATIENCE * 1000)
            # Nor does a flush that comes too late look at what arrives.
            with pytest.raises(OSError, match="another process takes over the disk"):
                source.sync()
            assert len(successor.recv(8192)) == 20 + 8 + 512


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_successor_that_never_serves_leaves_the_connection_as_it_is(
    server: NbdServer, config: DiskConfig, source: NbdSource, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with contextlib.closing(take_over_source(config, source.hand_over()).prepare([])) as successor:
        successor.part(64)
        source.let_go()
    source.take_back()
    source.sync()
    assert server.commands() == [nbd.CMD_FLUSH]
    # And its end is noticed as before.
    server.drop_connections()
    wait_until(lambda: "connected again" in caplog.text)
    source.sync()


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_connection_that_was_offered_and_lost(
    server: NbdServer, source: NbdSource, caplog: pytest.LogCaptureFixture
) -> None:
    """The successor would have one that has ended."""
    caplog.set_level(logging.INFO)
    source.hand_over()
    server.drop_connections()
    wait_until(lambda: "connected again" in caplog.text)
    with pytest.raises(ImageError, match="was lost, or made again, meanwhile; try again"):
        source.let_go()
    source.take_back()
    source.sync()
    source.hand_over()
    source.let_go()


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_an_upgrade_while_the_connection_is_lost(
    server: NbdServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is refused in one line, and the running process serves on."""
    caplog.set_level(logging.INFO)
    take = Predecessor.take

    def take_late(self: Predecessor, *arguments: Any) -> None:
        server.drop_connections()
        wait_until(lambda: "connected again" in caplog.text)
        take(self, *arguments)

    monkeypatch.setattr(Predecessor, "take", take_late)
    path, options = tmp_path / "socket", {"num_queues": 1, "nbd_reconnect_delay": 3600}
    with (
        ringplane.serve(server.uri, path, upgradable=True, **options) as export,
        Driver(path, timeout=PATIENCE) as driver,
    ):
        words = "the running process continues to serve: .* its connection to the server was lost, or made again"
        with pytest.raises(HandoverError, match=words):
            ringplane.serve(server.uri, path, upgrade=True, **options)
        assert driver.read(0, 4096) == server.content[:4096]
        export.disk.sync()
        monkeypatch.setattr(Predecessor, "take", take)
        with ringplane.serve(server.uri, path, upgrade=True, **options):
            assert export.wait(PATIENCE)
            assert driver.read(0, 4096) == server.content[:4096]


@pytest.mark.parametrize("structured", [True], indirect=True)
def test_a_flush_of_a_disk_that_is_closed(server: NbdServer, source: NbdSource) -> None:
    """It ends, and it uses no fd that others have by then."""
    server.reply = lambda request, server: b""
    problems: list[OSError] = []

    def flush() -> None:
        try:
            source.sync()
        except OSError as error:
            problems.append(error)

    flushing = threading.Thread(target=flush)
    flushing.start()
    wait_until(lambda: server.commands() == [nbd.CMD_FLUSH])
    source.close()
    others = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(8)]
    flushing.join(PATIENCE)
    with pytest.raises(OSError, match="the disk was closed"):
        source.sync()
    for fd in others:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
        os.close(fd)
    assert [problem.strerror for problem in problems] == ["the disk was closed"]
