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
from .test_migration import migrate

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


@pytest.mark.parametrize("victim", ["server", "ringplane"])
def test_killed_under_load(
    backend: BackendFactory, qemu: QemuGuest, server: NbdServer, disk_image: Path, tmp_path: Path, victim: str
) -> None:
    """The guest notices only pauses: no error, and all that it reads is verified."""
    qemu.chardev = "reconnect=1"
    started = backend(server.uri, extra=WAITING)
    enough = partial(workloads.say_enough, disk_image)
    happens = server.crash if victim == "server" else started.crash
    disk = Disturbed(started, enough, tmp_path / "console-1.txt", happens, KILLS, LIFE)
    seen = qemu.run(disk, workloads.fio_verify_until_enough("split"))  # type: ignore[arg-type]
    assert disk.times == KILLS
    assert int(seen.value("verified_kib")) > 0
    started.stop()
    assert started.logged().count("connected again") >= (KILLS if victim == "server" else 0)


def test_live_migration(backend: BackendFactory, qemu: QemuGuest, server: NbdServer, tmp_path: Path) -> None:
    """The two processes have connections to one export."""
    disks = [backend(server.uri) for _ in range(2)]
    result = migrate(
        qemu, [disk.socket for disk in disks], workloads.fio_verify_for(seconds=30, ring="split"), tmp_path
    )
    assert int(result.value("verified_kib")) > 0
    for disk in disks:
        disk.stop()
        assert "WARNING" not in disk.logged()
