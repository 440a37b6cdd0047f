"""A PC in QEMU, emulated without KVM, with a ringplane disk: SeaBIOS and then Linux drive it through virtio-pci."""

import random
from pathlib import Path

from . import host, workloads
from .backends import STAND_IN, BackendFactory
from .machines import QemuGuest


def test_probe(backend: BackendFactory, qemu: QemuGuest, disk_image: Path) -> None:
    disk = backend(disk_image, num_queues=2)
    seen = qemu.run(disk, workloads.probe())
    assert int(seen.value("size")) == disk_image.stat().st_size
    assert seen.value("ro") == "0"
    assert seen.value("logical_block_size") == "512"
    assert seen.value("queues") == "2"
    # Else the guest would never flush. QEMU's own back end offers the switch (CONFIG_WCE) and leaves it off.
    assert seen.value("write_cache") == ("write through" if STAND_IN else "write back")
    assert seen.value("serial")
    disk.stop()


def test_filesystem(backend: BackendFactory, qemu: QemuGuest, disk_image: Path, tmp_path: Path) -> None:
    disk = backend(disk_image, num_queues=2)
    qemu.run(disk, workloads.filesystem())
    disk.stop()
    host.check_filesystem(disk_image)
    host.check_files(disk_image, tmp_path / "files")


def test_fio_verify(backend: BackendFactory, qemu: QemuGuest, disk_image: Path) -> None:
    disk = backend(disk_image, num_queues=2)
    qemu.run(disk, workloads.fio_verify(num_queues=2, cpus=2))
    disk.stop()


def test_next_front_end_is_served(backend: BackendFactory, qemu: QemuGuest, disk_image: Path) -> None:
    """One back end process, one machine after another: the second finds what the first wrote."""
    disk = backend(disk_image, num_queues=2)
    written = qemu.run(disk, workloads.write_pattern(mib=16)).value("sha256")
    assert qemu.run(disk, workloads.read_pattern(mib=16)).value("sha256") == written
    disk.stop()
    assert host.sha256(disk_image, 16 << 20) == written


def test_read_only(backend: BackendFactory, qemu: QemuGuest, disk_image: Path) -> None:
    with disk_image.open("r+b") as file:
        file.write(random.Random(1).randbytes(4 << 20))
    before = host.sha256(disk_image)
    disk = backend(disk_image, num_queues=2, read_only=True)
    seen = qemu.run(disk, workloads.read_only(mib=4))
    assert seen.value("sha256") == host.sha256(disk_image, 4 << 20)
    disk.stop()
    assert host.sha256(disk_image) == before
