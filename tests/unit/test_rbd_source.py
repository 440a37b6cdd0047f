"""An RBD disk whose cluster answers whatever a test wants."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ringplane
from ringplane.block.image import NoAnswer
from ringplane.block.sources import rbd, rbd_cluster
from ringplane.control.changes import Changes
from ringplane.control.handover import HandoverError
from ringplane.control.server import Server
from ringplane.control.start import serve_all
from ringplane.control.state_file import StateFile
from ringplane.driver import Driver
from ringplane.driver.driver import segments
from ringplane.options.api_options import ApiOptions
from ringplane.options.image_address import parse_server
from ringplane.options.thread_options import IoThread
from ringplane.system.signals import NONE
from ringplane.vhost_user.messages import Request
from ringplane.virtio.blk import (
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
)

from .fake_rbd_library import FakeLibrary
from .protocol_rig import Machine, machine
from .rig import PATIENCE
from .test_operations import Idle, disk
from .waiting import wait_until

OK, IOERR = VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    fake = FakeLibrary()
    monkeypatch.setattr(rbd_cluster, "library", lambda: fake)
    return fake


@pytest.fixture
def driver(library: FakeLibrary, tmp_path: Path) -> Iterator[Driver]:
    path = tmp_path / "socket"
    with ringplane.serve("rbd:rbd/vm1", path, num_queues=1), Driver(path, timeout=PATIENCE) as made:
        yield made


@pytest.mark.parametrize("result", [0, 1, 511, 512, 5000, 8191])
def test_a_short_read(library: FakeLibrary, driver: Driver, result: int) -> None:
    """The rest is zeros, in each of the buffers."""
    library.result = result
    answer = driver.request(VIRTIO_BLK_T_IN, 8, read=8192, writable=[100, 5000, 3092, 1])
    assert (answer.status, answer.data) == (OK, b"d" * result + bytes(8192 - result))


@pytest.mark.parametrize("result", [8192, 8193, 1 << 31, (1 << 63) - 1])
def test_a_read_of_more_than_was_asked_for(library: FakeLibrary, driver: Driver, result: int) -> None:
    library.result = result
    answer = driver.request(VIRTIO_BLK_T_IN, 8, read=8192)
    assert (answer.status, answer.used, answer.data) == (OK, 8193, b"d" * 8192)


# -EPERM, -EINTR, the last errno, and numbers that mean something else in our data plane.
FAILURES = (-1, -4, -4095, -4096, -0x10000, -0x10000 - 3, -(1 << 31), -(1 << 63))


@pytest.mark.parametrize("result", FAILURES)
def test_numbers_that_are_not_an_errno(library: FakeLibrary, driver: Driver, result: int) -> None:
    """Each failure of the cluster is one for the guest."""
    library.result = result
    zeroes = segments((0, 8, 0))
    assert driver.request(VIRTIO_BLK_T_IN, 8, read=4096).status == IOERR
    assert driver.request(VIRTIO_BLK_T_OUT, 8, b"w" * 4096).status == IOERR
    assert driver.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, zeroes).status == IOERR
    assert driver.request(VIRTIO_BLK_T_FLUSH, 0).status == IOERR
    library.result = None
    assert driver.read(4096, 4096) == b"d" * 4096
    assert driver.request(VIRTIO_BLK_T_OUT, 8, b"w" * 4096).status == OK
    assert driver.request(VIRTIO_BLK_T_FLUSH, 0).status == IOERR, "a flush has failed before"


@pytest.fixture
def cached(library: FakeLibrary, tmp_path: Path) -> Iterator[tuple[ringplane.Export, Driver]]:
    """A disk with librbd's cache that can be taken over, and its driver, which has written to it."""
    path = tmp_path / "socket"
    with (
        ringplane.serve("rbd:rbd/vm1", path, num_queues=1, direct=False, upgradable=True) as export,
        Driver(path, timeout=PATIENCE) as made,
    ):
        made.write(0, b"w" * 4096)
        yield export, made


def taking_over(export: ringplane.Export) -> ringplane.Export:
    assert export.socket_path is not None
    return ringplane.serve("rbd:rbd/vm1", export.socket_path, num_queues=1, direct=False, upgrade=True)


def fail(export: ringplane.Export, monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Have this function of librbd fail for the image of this disk."""
    opened = export.disk.source._opened  # type: ignore[attr-defined]
    whole = opened.call

    def failing(called: str, *arguments: Any) -> int:
        if called == name:
            raise OSError(number, os.strerror(number))
        return int(whole(called, *arguments))

    monkeypatch.setattr(opened, "call", failing)


def test_an_upgrade_after_a_flush_that_failed(
    library: FakeLibrary, cached: tuple[ringplane.Export, Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next process learns of it. Nothing is flushed again, and the cache may be as it likes."""
    running, driver = cached
    library.result = -errno.EIO
    assert driver.request(VIRTIO_BLK_T_FLUSH, 0).status == IOERR
    library.result = None
    fail(running, monkeypatch, "rbd_invalidate_cache", errno.EIO)
    with taking_over(running):
        assert running.wait(PATIENCE)
        assert library.calls.count("rbd_flush") == 0
        assert driver.read(0, 512) == b"d" * 512
        assert driver.request(VIRTIO_BLK_T_FLUSH, 0).status == IOERR


@pytest.mark.parametrize(
    ("name", "number"),
    [("rbd_flush", errno.EBUSY), ("rbd_flush", errno.ETIMEDOUT), ("rbd_invalidate_cache", errno.EBUSY)],
)
def test_a_cache_that_cannot_be_written(
    library: FakeLibrary,
    cached: tuple[ringplane.Export, Driver],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    number: int,
) -> None:
    """The line has the name of the disk, which continues; what was cached is dropped if that is possible."""
    running, driver = cached
    emptied = library.calls.count("rbd_invalidate_cache")
    with monkeypatch.context() as patch:
        fail(running, patch, name, number)
        with pytest.raises(HandoverError, match=f"vm1: its cache cannot be written: {os.strerror(number)}"):
            taking_over(running)
    assert driver.read(0, 512) == b"d" * 512
    # One is that of the other process.
    assert library.calls.count("rbd_invalidate_cache") - emptied == (2 if name == "rbd_flush" else 1)


def test_a_cache_that_is_not_written_in_time(library: FakeLibrary, cached: tuple[ringplane.Export, Driver]) -> None:
    running, driver = cached
    library.hanging.add("rbd_flush")
    try:
        with pytest.raises(HandoverError, match="vm1: writing its cache took longer than 2 seconds"):
            taking_over(running)
        assert driver.read(0, 512) == b"d" * 512
    finally:
        library.answers.set()


STOPS: dict[str, Callable[[Machine], object]] = {
    "GET_VRING_BASE": lambda guest: guest.peer.get_vring_base(0),
    "SET_VRING_ENABLE": lambda guest: guest.peer.set_vring_enable(0, False),
    "SET_STATUS": lambda guest: guest.peer.set_status(0),
    "RESET_OWNER": lambda guest: guest.peer.send(Request.RESET_OWNER),
    "RESET_DEVICE": lambda guest: guest.peer.send(Request.RESET_DEVICE),
    "disconnects": lambda guest: guest.peer.close(),
}


@pytest.mark.parametrize("how", STOPS)
def test_the_cache_is_emptied_when_the_rings_stop(library: FakeLibrary, tmp_path: Path, how: str) -> None:
    """Once, because later another client may use the image. Nothing was written, so no flush takes its lock."""
    with ringplane.serve("rbd:rbd/vm1", tmp_path / "socket", num_queues=2, direct=False) as export:
        with machine(export) as guest:
            guest.start()
            guest.read()
            before = library.calls.count("rbd_invalidate_cache")
            STOPS[how](guest)
            wait_until(lambda: library.calls.count("rbd_invalidate_cache") == before + 1)
        wait_until(lambda: export.state == "listening")
    assert library.calls.count("rbd_invalidate_cache") == before + 1
    assert "rbd_flush" not in library.calls


def test_what_was_written_is_flushed_when_the_front_end_goes(
    library: FakeLibrary, cached: tuple[ringplane.Export, Driver]
) -> None:
    _, driver = cached
    assert "rbd_flush" not in library.calls
    driver.front_end.close()
    wait_until(lambda: "rbd_flush" in library.calls)
    assert library.calls.count("rbd_flush") == 1


def serve_beside_a_cluster(folder: Path) -> Server:
    """A file, disks of a state, and a cluster whose images can be added."""
    interface = Idle(folder / "interface")
    interface.options = ApiOptions(folder, allow_folders=(folder,), allow_servers=(parse_server("rbd::id=vms"),))
    state = StateFile(folder / "state", trusted=True)
    return serve_all([disk(folder, "a")], [IoThread("io0")], interface=interface, state=state)


@pytest.mark.parametrize(
    ("code", "asks", "words", "remedy", "why"),
    [
        (
            errno.ETIMEDOUT, 1, "no monitor answers; check mon_host and the network", "it answers",
            "its server does not answer",
        ),
        (
            errno.EACCES, 2, "the cluster does not accept client.vms with this key", "this is mended",
            "the cluster does not accept client.vms with this key",
        ),
    ],
    ids=["silent", "rejects the key"],
)  # fmt: skip
def test_a_cluster_that_cannot_be_reached_stops_no_other_disk(
    library: FakeLibrary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    asks: int,
    words: str,
    remedy: str,
    why: str,
) -> None:
    """A silent one is asked once. Its disks are served when it can be reached at a later start."""
    asked: list[str] = []
    really_call = library.call
    added = {"name": "b", "image": "rbd:rbd/b:id=vms", "socket-path": str(tmp_path / "b.sock"), "num-queues": 1}
    with contextlib.closing(StateFile(tmp_path / "state", trusted=True)) as state:
        state.open()
        state.store(Changes(added=[added]))

    def call(name: str, *arguments: Any) -> int:
        if name == "rados_connect":
            asked.append(name)
            raise OSError(code, os.strerror(code))
        return really_call(name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(library, "call", call)
        with serve_beside_a_cluster(tmp_path) as server:
            assert [export.name for export in server.exports] == ["a"]
            assert [each.name for each in server.not_served] == ["b"]
    assert len(asked) == asks
    assert f"rbd::id=vms: {words}" in caplog.text
    assert f"; to add disks there, restart ringplane when {remedy}" in caplog.text
    assert f"b: was added at run time and is not served: rbd:rbd/b: {why}" in caplog.text
    with serve_beside_a_cluster(tmp_path) as server:
        assert [export.name for export in server.exports] == ["a", "b"]


def test_what_hangs_may_continue_in_a_confined_process(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library has begun at the start makes system calls later."""
    kept: list[object] = []
    monkeypatch.setattr(rbd, "OPEN_PATIENCE", 0.05)
    monkeypatch.setattr(rbd, "keep", kept.append)
    library.hanging.add("rados_connect")
    with pytest.raises(NoAnswer, match="the cluster does not answer within"):
        rbd.reach(parse_server("rbd::id=hangs"), NONE)
    assert kept == [rbd.SYSTEM_CALLS]
    library.answers.set()
    wait_until(lambda: "rados_shutdown" in library.calls)
