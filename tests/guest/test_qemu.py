"""A PC in QEMU, emulated without KVM, with a ringplane disk: SeaBIOS and then Linux drive it through virtio-pci."""

import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from unit.rig import small_tmpfs

from . import boot, host, initramfs, workloads
from .back_end_processes import STAND_IN, BackendFactory
from .machines import QemuGuest


def test_probe(backend: BackendFactory, qemu: QemuGuest, disk_image: Path) -> None:
    disk = backend(disk_image, num_queues=2)
    seen = qemu.run(disk, workloads.probe())
    assert int(seen.value("size")) == disk_image.stat().st_size
    assert seen.value("ro") == "0"
    assert seen.value("logical_block_size") == "512"
    assert seen.value("queues") == "2"
    # Otherwise the guest would never flush. QEMU's own back end offers CONFIG_WCE and leaves the cache off.
    assert seen.value("write_cache") == ("write through" if STAND_IN else "write back")
    assert seen.value("serial")
    disk.stop()


@pytest.mark.parametrize("wanted", [0, 64])
def test_default_number_of_queues(backend: BackendFactory, qemu: QemuGuest, disk_image: Path, wanted: int) -> None:
    """By default QEMU uses one queue per processor; if it uses all, Linux still uses one per processor."""
    disk = backend(disk_image, num_queues=0)
    assert qemu.run(disk, workloads.probe(), num_queues=wanted).value("queues") == str(qemu.cpus)
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


def test_ranges(backend: BackendFactory, qemu: QemuGuest, disk_image: Path) -> None:
    disk = backend(disk_image, num_queues=2)
    seen = qemu.run(disk, workloads.ranges(), memory_mib=1024)
    assert int(seen.value("discard_granularity")) == os.statvfs(disk_image).f_frsize
    disk.stop()
    # The file systems of 60 MB and their metadata are left; data that was discarded or removed is not.
    assert disk_image.stat().st_blocks * 512 < 130 << 20


def test_live_resize(backend: BackendFactory, qemu: QemuGuest, disk_image: Path, tmp_path: Path) -> None:
    """The guest sees that its disk grows, and then that it shrinks, while it is in use."""
    disk, console = backend(disk_image, num_queues=2), tmp_path / "console-1.txt"
    larger, smaller = 600 << 20, 300 << 20

    def resize() -> None:
        for text, size in (("RESIZE-ME", larger), ("RESIZE-AGAIN", smaller)):
            while not console.exists() or text not in console.read_text(errors="replace"):
                time.sleep(0.1)
            os.truncate(disk_image, size)
            disk.process.send_signal(signal.SIGHUP)

    threading.Thread(target=resize, daemon=True).start()
    qemu.run(disk, workloads.resized(larger, smaller))
    disk.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_no_room_left(backend: BackendFactory, qemu: QemuGuest, tmp_path: Path) -> None:
    """The file system has less space than the size of the image: the guest gets errors until there is space."""
    console, folder = tmp_path / "console-1.txt", tmp_path / "small"
    with small_tmpfs(folder, mib=16):
        image = folder / "disk.img"
        with image.open("wb") as file:
            file.truncate(512 << 20)
        disk = backend(image, num_queues=2)

        def make_room() -> None:
            while not console.exists() or "MAKE-ROOM" not in console.read_text(errors="replace"):
                time.sleep(0.1)
            subprocess.run(["mount", "-o", "remount,size=128M", folder], check=True)

        threading.Thread(target=make_room, daemon=True).start()
        seen = qemu.run(disk, workloads.no_room())
        disk.stop()
        assert "No space left on device" in disk.logged()
        assert host.sha256(image, 8 << 20) == seen.value("kept")
        assert host.sha256(image, 32 << 20, 100 << 20) == seen.value("data")


@pytest.mark.parametrize("transport", ["modern", "legacy"])
def test_boots_from_the_disk(
    backend: BackendFactory, qemu: QemuGuest, disk_image: Path, tmp_path: Path, transport: str
) -> None:
    """SeaBIOS and SYSLINUX read it through the BIOS, then the kernel uses it; also with legacy drivers."""
    workload = workloads.write_pattern(mib=4, start=256)
    initrd = initramfs.with_script(qemu.initramfs(workload), workload.script)
    boot.make(disk_image, qemu.kernel, initrd, qemu.kernel_options, tmp_path)
    disk = backend(disk_image, num_queues=2)
    qemu.boots_from_disk = True
    qemu.properties = "disable-modern=on,disable-legacy=off" if transport == "legacy" else ""
    written = qemu.run(disk, workload).value("sha256")
    disk.stop()
    assert host.sha256(disk_image, 4 << 20, 256 << 20) == written


def test_packed_ring(backend: BackendFactory, qemu: QemuGuest, disk_image: Path) -> None:
    disk = backend(disk_image, num_queues=2)
    qemu.properties = "packed=on"
    workload = workloads.fio_verify(num_queues=2, cpus=2, ring="packed")
    qemu.run(disk, workload)
    disk.stop()


def test_next_front_end_is_served(backend: BackendFactory, qemu: QemuGuest, disk_image: Path) -> None:
    """One back end process serves two machines one after the other: the second reads the data of the first."""
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
