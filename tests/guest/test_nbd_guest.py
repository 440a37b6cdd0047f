"""A QEMU guest whose disk is an export of a real NBD server."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from storage.nbd_processes import NbdServer, qemu_nbd

from . import host, workloads
from .back_end_processes import STAND_IN, BackendFactory, Disturbed
from .machines import QemuGuest

pytestmark = pytest.mark.skipif(STAND_IN, reason="the disk of QEMU's own back end is a file")

KILLS = 10
# Seconds between kills.
LIFE = 2.5

WAITING = ("--nbd-reconnect-delay", "3600")


@pytest.fixture
def server(disk_image: Path) -> Iterator[NbdServer]:
    made = NbdServer(qemu_nbd, disk_image)
    yield made
    made.stop()


def test_filesystem(
    backend: BackendFactory, qemu: QemuGuest, server: NbdServer, disk_image: Path, tmp_path: Path
) -> None:
    disk = backend(server.uri)
    qemu.run(disk, workloads.filesystem())
    disk.stop()
    server.stop()
    host.check_filesystem(disk_image)
    host.check_files(disk_image, tmp_path / "files")


def test_ranges(backend: BackendFactory, qemu: QemuGuest, server: NbdServer, disk_image: Path) -> None:
    """Discards and zeroes of the guest, fstrim among them."""
    disk = backend(server.uri)
    qemu.run(disk, workloads.ranges(), memory_mib=1024)
    disk.stop()
    assert disk_image.stat().st_blocks * 512 < 130 << 20


def test_the_server_is_killed_under_load(
    backend: BackendFactory, qemu: QemuGuest, server: NbdServer, disk_image: Path, tmp_path: Path
) -> None:
    started = backend(server.uri, extra=WAITING)
    enough = partial(workloads.say_enough, disk_image)
    disk = Disturbed(started, enough, tmp_path / "console-1.txt", server.crash, KILLS, LIFE)
    seen = qemu.run(disk, workloads.fio_verify_until_enough("split"))  # type: ignore[arg-type]
    assert disk.times == KILLS
    assert int(seen.value("verified_kib")) > 0
    started.stop()
    assert started.logged().count("connected again") >= KILLS


def test_ringplane_is_killed_under_load(
    backend: BackendFactory, qemu: QemuGuest, server: NbdServer, disk_image: Path, tmp_path: Path
) -> None:
    qemu.chardev = "reconnect=1"
    started = backend(server.uri, extra=WAITING)
    enough = partial(workloads.say_enough, disk_image)
    disk = Disturbed(started, enough, tmp_path / "console-1.txt", started.crash, KILLS, LIFE)
    seen = qemu.run(disk, workloads.fio_verify_until_enough("split"))  # type: ignore[arg-type]
    assert disk.times == KILLS
    assert int(seen.value("verified_kib")) > 0
    started.stop()
