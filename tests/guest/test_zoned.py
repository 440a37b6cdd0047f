"""Zoned disks in a guest: user-mode Linux 6.12, built from Debian's linux-source-6.12 (see build-zoned-uml)."""

from pathlib import Path

import pytest

from . import workloads
from .back_end_processes import STAND_IN, BackendFactory
from .machines import UmlGuest

pytestmark = pytest.mark.skipif(STAND_IN, reason="QEMU's own back end has no emulated zones")

ZONE_MIB = 16
COUNT = 32


def test_zones(backend: BackendFactory, zoned_uml: UmlGuest, disk_image: Path) -> None:
    spec = f"{ZONE_MIB}M,conventional=2,max-open=6,max-active=8"
    disk = backend(disk_image, num_queues=1, extra=["--zoned", spec])
    seen = zoned_uml.run(disk, workloads.zones(ZONE_MIB, COUNT, conventional=2))
    assert seen.value("states").split() == ["3", "4", "14", "1"]
    disk.stop()
    # All zones were reset, so all space is free.
    assert disk_image.stat().st_blocks == 0


def test_btrfs(backend: BackendFactory, zoned_uml: UmlGuest, disk_image: Path) -> None:
    disk = backend(disk_image, num_queues=1, extra=["--zoned", f"{ZONE_MIB}M"])
    assert int(zoned_uml.run(disk, workloads.zoned_filesystem()).value("files")) == 480
    disk.stop()


def test_a_driver_without_zoned_support_is_refused(backend: BackendFactory, uml: UmlGuest, disk_image: Path) -> None:
    """The user-mode Linux of Debian 12 is older than zoned virtio-blk disks: it finds no disk."""
    disk = backend(disk_image, num_queues=1, extra=["--zoned", f"{ZONE_MIB}M"])
    uml.run(disk, workloads.no_disk())
    disk.stop()
    assert "it does not know zoned disks" in disk.logged()
