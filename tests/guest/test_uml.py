"""User-mode Linux with a ringplane disk: another implementation of a front end, at nearly the speed of the host."""

from pathlib import Path

from . import host, workloads
from .backends import STAND_IN, BackendFactory
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
    assert "VRING_KICK" in disk.told()
    assert "SET_VRING_CALL" not in disk.told()


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
