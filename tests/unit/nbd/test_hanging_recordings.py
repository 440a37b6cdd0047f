"""Recordings of disks whose server hangs: what has not ended is in them as unfinished."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

import ringplane
from ringplane.control import operations
from ringplane.control.handover import HandoverError
from ringplane.control.operation_errors import OperationError
from ringplane.control.start import serve_all
from ringplane.driver import Driver
from ringplane.options.delay_options import Delay
from ringplane.options.disk_config import DiskConfig
from ringplane.options.thread_options import IoThread
from ringplane.recordings import entries
from ringplane.recordings.reader import open_recording

from ..nbd_server import NbdServer
from ..rig import FLUSH, IN, OK, OUT, PATIENCE, pattern
from ..waiting import wait_until

pytestmark = pytest.mark.parametrize("structured", [True], indirect=True)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "DRAIN_PATIENCE", 0.2)


def kinds_and_flags(path: Path) -> Sequence[tuple[int, int]]:
    """In any order: storage works on all of them at the same time."""
    return sorted((entry.kind, entry.flags) for entry in open_recording(path))


def at_the_storage(export: ringplane.Export) -> int:
    """The number of requests that the recording has seen on their way down."""
    layer = export.operations.recording.layer
    return sum(int((part._notes["began"] >= 0).sum()) for part in layer._parts) if layer else 0


@pytest.mark.parametrize("delay", [None, Delay(write=0.001)], ids=["plain", "delay"])
def test_the_end_of_a_recording(
    server: NbdServer, hanging: threading.Event, tmp_path: Path, delay: Delay | None
) -> None:
    """The guest continues, and has its answers when the server replies."""
    with (
        ringplane.serve(server.uri, tmp_path / "socket", num_queues=1, delay=delay) as export,
        Driver(tmp_path / "socket", timeout=PATIENCE) as driver,
    ):
        export.start_recording(tmp_path / "disk.rec")
        begun = [driver.begin(OUT, 8, pattern(4096)), driver.begin(FLUSH, 0)]
        reading = driver._submit_request(IN, 0, b"", 512, 0)
        wait_until(lambda: at_the_storage(export) == 2)
        export.end_recording()
        recording = open_recording(tmp_path / "disk.rec")
        assert recording.complete
        assert kinds_and_flags(tmp_path / "disk.rec") == [
            (entries.WRITE, entries.UNFINISHED),
            (entries.FLUSH, entries.UNFINISHED),
        ]
        (data,) = (bytes(entry.data) for entry in recording if entry.kind == entries.WRITE)
        assert data == pattern(4096)
        hanging.set()
        assert [driver.end(each).status for each in begun] == [OK, OK]
        assert len(driver._answer(*reading).data) == 512
        # The next one has nothing of that.
        export.start_recording(tmp_path / "next.rec")
        driver.write(0, pattern(512))
        export.end_recording()
        assert kinds_and_flags(tmp_path / "next.rec") == [(entries.WRITE, 0)]


def test_the_start_of_a_recording(server: NbdServer, hanging: threading.Event, tmp_path: Path) -> None:
    """None begins; the request in flight has its answer, when the server replies, and so have others."""
    with (
        ringplane.serve(server.uri, tmp_path / "socket", num_queues=1) as export,
        Driver(tmp_path / "socket", timeout=PATIENCE) as driver,
    ):
        begun = driver.begin(OUT, 8, pattern(4096))
        wait_until(lambda: export.in_flight == 1)
        with pytest.raises(OperationError, match=r"1 request in flight did not end .*try again when storage answers"):
            export.start_recording(tmp_path / "disk.rec")
        assert not (tmp_path / "disk.rec").exists()
        hanging.set()
        assert driver.end(begun).status == OK
        assert driver.read(4096, 4096) == pattern(4096)


def test_the_end_of_a_process_that_waits_no_longer(
    config: DiskConfig, hanging: threading.Event, tmp_path: Path
) -> None:
    """After a second signal, or too much time."""
    config = dataclasses.replace(config, record=tmp_path / "disk.rec")
    with (
        serve_all([config], [IoThread("io0")]) as server,
        Driver(tmp_path / "socket", timeout=PATIENCE) as driver,
    ):
        begun = driver.begin(OUT, 8, pattern(4096))
        wait_until(lambda: server.exports[0].in_flight == 1)
        server.abandon()
        assert open_recording(tmp_path / "disk.rec").complete
        assert kinds_and_flags(tmp_path / "disk.rec") == [(entries.WRITE, entries.UNFINISHED)]
        hanging.set()
        assert driver.end(begun).status == OK


def test_an_upgrade_that_is_refused_leaves_no_recording(
    server: NbdServer, hanging: threading.Event, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    with (
        ringplane.serve(server.uri, path, num_queues=1, upgradable=True),
        Driver(path, timeout=PATIENCE) as driver,
    ):
        begun = driver.begin(OUT, 8, pattern(4096))
        wait_until(lambda: len(server.requests) == 1)
        with pytest.raises(HandoverError, match="requests in flight took longer"):
            ringplane.serve(server.uri, path, num_queues=1, upgrade=True, record=tmp_path / "next.rec")
        assert not (tmp_path / "next.rec").exists()
        hanging.set()
        assert driver.end(begun).status == OK
