"""A PC in QEMU whose disk is an RBD image of a real Ceph cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from ceph import CephCluster

from . import workloads
from .back_end_processes import STAND_IN, BackendFactory, Disturbed
from .machines import QemuGuest, when
from .test_migration import migrate

pytestmark = pytest.mark.skipif(STAND_IN, reason="these are about ringplane's own source")

SIZE = "512M"
RINGPLANE_KILLS, OSD_KILLS = 10, 5
# Seconds between kills. The cluster takes some until it lets the next process write (`lively_watches`).
LIFE = 5.0


@pytest.fixture
def lively_watches(failing_cluster: CephCluster) -> CephCluster:
    """A cluster that notices within two seconds that a client is gone: 30 are the default."""
    failing_cluster.ceph("tell", "osd.0", "config", "set", "osd_client_watch_timeout", "2")
    return failing_cluster


def test_filesystem(backend: BackendFactory, qemu: QemuGuest, cluster: CephCluster) -> None:
    disk = backend(cluster.address(cluster.new_image(SIZE)), num_queues=2)
    qemu.run(disk, workloads.filesystem())
    qemu.run(disk, workloads.fio_verify(num_queues=2, cpus=2))
    disk.stop()


def test_ranges(backend: BackendFactory, qemu: QemuGuest, cluster: CephCluster) -> None:
    """Discarded and zeroed ranges, and file systems that are trimmed."""
    image = cluster.new_image(SIZE)
    disk = backend(cluster.address(image), num_queues=2)
    seen = qemu.run(disk, workloads.ranges(), memory_mib=1024)
    assert int(seen.value("discard_granularity")) == 64 << 10
    disk.stop()


def test_live_resize(backend: BackendFactory, qemu: QemuGuest, cluster: CephCluster, tmp_path: Path) -> None:
    """Another client resizes the image, and nobody signals ringplane."""
    image = cluster.new_image(SIZE)
    disk, console = backend(cluster.address(image), num_queues=2), tmp_path / "console-1.txt"
    when(console, "RESIZE-ME", lambda: resize(cluster, image, 600))
    when(console, "RESIZE-AGAIN", lambda: resize(cluster, image, 300))
    qemu.run(disk, workloads.resized(600 << 20, 300 << 20))
    disk.stop()


def resize(cluster: CephCluster, image: str, mib: int) -> None:
    cluster.rbd("resize", image, "--size", f"{mib}M", "--allow-shrink", "--no-progress")


@pytest.mark.parametrize("victim", ["ringplane", "osd"])
def test_killed_under_load(
    backend: BackendFactory, qemu: QemuGuest, lively_watches: CephCluster, tmp_path: Path, victim: str
) -> None:
    """The guest notices only pauses: no error, and all that it reads is verified."""
    cluster, image = lively_watches, lively_watches.new_image(SIZE)
    qemu.chardev = "reconnect=1"
    started = backend(cluster.address(image))

    def say_enough() -> None:
        cluster.wait_for_owner(image)
        cluster.write(image, workloads.ENOUGH_AT, workloads.ENOUGH.ljust(512, b"\0"))

    happens, most = (started.crash, RINGPLANE_KILLS) if victim == "ringplane" else (cluster.kill_osd, OSD_KILLS)
    disk = Disturbed(started, say_enough, tmp_path / "console-1.txt", happens, most, LIFE)
    seen = qemu.run(disk, workloads.fio_verify_until_enough("split"))  # type: ignore[arg-type]
    assert disk.times == most
    assert int(seen.value("verified_kib")) > 0
    started.stop()


def test_live_migration(backend: BackendFactory, qemu: QemuGuest, cluster: CephCluster, tmp_path: Path) -> None:
    """The lock of the image follows the guest to the other process; another client resizes it while both have it."""
    image = cluster.new_image(SIZE)
    disks = [backend(cluster.address(image)) for _ in range(2)]
    when(tmp_path / "console-source.txt", "fio begins", lambda: resize(cluster, image, 600))
    workload = workloads.fio_verify_and_grow(seconds=30, ring="split", size=600 << 20)
    result = migrate(qemu, [disk.socket for disk in disks], workload, tmp_path)
    assert int(result.value("verified_kib")) > 0
    for disk in disks:
        disk.stop()
        assert "ERROR" not in disk.logged()
