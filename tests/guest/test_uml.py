"""User-mode Linux with a ringplane disk: another implementation of a front end, at nearly the speed of the host."""

import os
import subprocess
from pathlib import Path

import pytest

from unit.rig import loop_device, small_tmpfs

from . import host, workloads
from .back_end_processes import STAND_IN, Backend, BackendFactory
from .machines import QemuGuest, UmlGuest


def test_probe(backend: BackendFactory, uml: UmlGuest, disk_image: Path) -> None:
    disk = backend(disk_image, num_queues=1)
    seen = uml.run(disk, workloads.probe())
    assert int(seen.value("size")) == disk_image.stat().st_size
    assert seen.value("ro") == "0"
    assert seen.value("logical_block_size") == "512"
    assert seen.value("queues") == "1"
    # Otherwise the guest would never flush. QEMU's own back end offers CONFIG_WCE and leaves the cache off.
    assert seen.value("write_cache") == ("write through" if STAND_IN else "write back")
    assert seen.value("serial")
    disk.stop()


LIMITS = ("physical_block_size", "minimum_io_size", "optimal_io_size", "discard_granularity")


def limits_in(guest: UmlGuest | QemuGuest, disk: Backend) -> list[int]:
    """The limits of the disk as the guest's kernel sees them; it must be able to discard."""
    seen = guest.run(disk, workloads.probe(), num_queues=1)
    assert int(seen.value("discard_max_bytes")) > 0
    disk.stop()
    return [int(seen.value(limit)) for limit in LIMITS]


def sparse(path: Path, mib: int = 64) -> Path:
    path.touch()
    os.truncate(path, mib << 20)
    return path


@pytest.mark.skipif(STAND_IN, reason="only for ringplane")
@pytest.mark.skipif(os.geteuid() != 0, reason="file systems and loop devices are made here, which needs root")
class TestLimitsOfTheStorage:
    """Databases break on physical blocks above 4096 bytes."""

    def test_huge_pages(self, backend: BackendFactory, uml: UmlGuest, qemu: QemuGuest, tmp_path: Path) -> None:
        with small_tmpfs(tmp_path / "huge", 128, "huge=always") as folder:
            image = sparse(folder / "disk.img")
            huge = image.stat().st_blksize
            for guest in (uml, qemu):
                assert limits_in(guest, backend(image, num_queues=1)) == [4096, 4096, huge, 4096]

    def test_a_file_on_a_device(self, backend: BackendFactory, uml: UmlGuest, tmp_path: Path) -> None:
        device, folder = sparse(tmp_path / "device", 128), tmp_path / "mounted"
        folder.mkdir()
        for sector, block in ((512, 1024), (4096, 4096)):
            with loop_device(device, "--sector-size", str(sector)) as loop:
                subprocess.run(["mkfs.ext4", "-q", "-F", "-b", str(block), loop], check=True)
                subprocess.run(["mount", loop, folder], check=True)
                try:
                    image = sparse(folder / "disk.img")
                    disk = backend(image, num_queues=1, extra=["--buffered"])
                    assert limits_in(uml, disk) == [sector, sector, image.stat().st_blksize, block]
                finally:
                    subprocess.run(["umount", folder], check=True)

    def test_a_device(self, backend: BackendFactory, uml: UmlGuest, tmp_path: Path) -> None:
        with loop_device(sparse(tmp_path / "device"), "--sector-size", "16384") as loop:
            assert limits_in(uml, backend(loop, num_queues=1, extra=["--buffered"])) == [16384, 16384, 0, 16384]
            extra = ["--buffered", "--physical-block-size", "4096"]
            assert limits_in(uml, backend(loop, num_queues=1, extra=extra)) == [4096, 4096, 0, 16384]


def test_default_number_of_queues(backend: BackendFactory, uml: UmlGuest, disk_image: Path) -> None:
    disk = backend(disk_image, num_queues=0)
    assert uml.run(disk, workloads.probe()).value("queues") == "1"
    disk.stop()


def test_filesystem(backend: BackendFactory, uml: UmlGuest, disk_image: Path, tmp_path: Path) -> None:
    disk = backend(disk_image, num_queues=1)
    uml.run(disk, workloads.filesystem())
    disk.stop()
    host.check_filesystem(disk_image)
    host.check_files(disk_image, tmp_path / "files")


def test_fio_verify(backend: BackendFactory, uml: UmlGuest, disk_image: Path) -> None:
    disk = backend(disk_image, num_queues=1)
    uml.run(disk, workloads.fio_verify(num_queues=1, cpus=1, ring="packed"))
    disk.stop()


def test_in_band(backend: BackendFactory, uml: UmlGuest, disk_image: Path) -> None:
    """Kicks and calls are messages; this guest accepts the feature if it is offered."""
    disk = backend(disk_image, num_queues=1, extra=["--feature", "inband-notifications=on", "--log-level", "debug"])
    uml.run(disk, workloads.fio_verify(num_queues=1, cpus=1, ring="packed"))
    disk.stop()
    assert "VRING_KICK" in disk.logged()
    assert "SET_VRING_CALL" not in disk.logged()


def test_next_front_end_is_served(backend: BackendFactory, uml: UmlGuest, disk_image: Path) -> None:
    """User-mode Linux never stops its ring with GET_VRING_BASE: it only closes the connection."""
    disk = backend(disk_image, num_queues=1)
    written = uml.run(disk, workloads.write_pattern(mib=16)).value("sha256")
    assert uml.run(disk, workloads.read_pattern(mib=16)).value("sha256") == written
    disk.stop()
    assert host.sha256(disk_image, 16 << 20) == written


def test_a_different_front_end_is_served_next(
    backend: BackendFactory, uml: UmlGuest, qemu: QemuGuest, disk_image: Path
) -> None:
    """No features, memory or queues of one front end are left when the next one connects."""
    disk = backend(disk_image, num_queues=2)
    written = uml.run(disk, workloads.write_pattern(mib=4)).value("sha256")
    assert qemu.run(disk, workloads.read_pattern(mib=4)).value("sha256") == written
    assert uml.run(disk, workloads.read_pattern(mib=4)).value("sha256") == written
    disk.stop()
