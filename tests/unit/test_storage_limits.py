"""The limits of the storage: of real files, and of block devices as sysfs describes them."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ringplane.block import storage_limits as module
from ringplane.block.image import Image
from ringplane.block.sources.file import FileSource
from ringplane.block.storage_limits import Limits, limits
from ringplane.dataplane.worker import Worker
from ringplane.device.disk import Disk
from ringplane.native.fs import BLKDISCARD
from ringplane.options.disk_config import DiskOptions
from ringplane.virtio import blk

from .rig import loop_device


@pytest.mark.parametrize("folder", ["/dev/shm", None])
def test_a_file_system_with_holes(folder: str | None) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(5000))
        file.flush()
        found = limits(file.fileno(), read_only=False)
        assert found.punches
        assert found.discard == os.fstatvfs(file.fileno()).f_frsize
        assert found.optimal_io == os.fstat(file.fileno()).st_blksize
        assert os.fstat(file.fileno()).st_size == 5000, "the probe has changed the file"


def test_a_read_only_image_cannot_be_discarded() -> None:
    with tempfile.TemporaryFile() as file:
        found = limits(file.fileno(), read_only=True)
        assert (found.discard, found.secure_erase, found.punches) == (0, 0, False)


def test_a_file_system_without_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.libc, "fallocate", refuse)
    with tempfile.TemporaryFile() as file:
        found = limits(file.fileno(), read_only=False)
        assert (found.discard, found.punches) == (0, False)


def device(folder: Path, **values: object) -> Path:
    """A block device's folder in sysfs."""
    for name, value in values.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return folder


@pytest.fixture
def block_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the block device 7:3 in a simulated sysfs; every file is that device."""
    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        values = list(real(fd))
        values[0] = stat.S_IFBLK | 0o660
        return os.stat_result(values, {"st_rdev": os.makedev(7, 3)})

    monkeypatch.setattr(module.os, "fstat", fstat)
    return tmp_path / "7:3"


def limits_of_device(folder: Path, *, read_only: bool = False) -> Limits:
    with tempfile.TemporaryFile() as file:
        return limits(file.fileno(), read_only=read_only, sysfs=folder.parent)


def test_a_block_device(block_device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device(
        block_device,
        queue__physical_block_size=4096,
        queue__minimum_io_size=16384,
        queue__optimal_io_size=1 << 20,
        queue__discard_granularity=8192,
        queue__discard_max_bytes=1 << 30,
    )
    monkeypatch.setattr(
        module, "_refusal", lambda fd, request: errno.EINVAL if request == BLKDISCARD else errno.EOPNOTSUPP
    )
    found = limits_of_device(block_device)
    assert found == Limits(4096, 16384, 1 << 20, discard=8192, punches=True)
    assert limits_of_device(block_device, read_only=True).discard == 0


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EPERM, errno.ENOTTY, errno.EINVAL])
def test_a_block_device_that_cannot_discard(block_device: Path, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe discards half a sector, which is EINVAL on devices that can discard."""

    def refuse(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(module.fcntl, "ioctl", refuse)
    device(block_device, queue__physical_block_size=512, queue__discard_granularity=1024)
    can = error == errno.EINVAL
    found = limits_of_device(block_device)
    assert (found.discard, found.secure_erase) == ((1024, 1024) if can else (0, 0))


def test_a_real_block_device_without_sysfs(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with loop_device(image, "--sector-size", "8192") as path, open(path, "r+b", buffering=0) as opened:
        found = limits(opened.fileno(), read_only=False, sysfs=tmp_path)
    assert found == Limits(8192, 8192, discard=8192, punches=True)


def test_a_real_block_device(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with loop_device(image, "--sector-size", "16384") as path:
        # `ringplane check` opens it for reading.
        for mode in ("r+b", "rb"):
            with open(path, mode, buffering=0) as opened:
                found = limits(opened.fileno(), read_only=False)
            assert (found.physical_block, found.minimum_io) == (16384, 16384)
            assert (found.discard, found.secure_erase) == (16384, 0)


def test_a_block_device_without_limits_in_sysfs(block_device: Path) -> None:
    assert limits_of_device(block_device) == Limits(4096, 4096, 0, punches=True)


def test_a_partition_is_like_its_disk(block_device: Path, tmp_path: Path) -> None:
    disk = device(tmp_path / "sda", queue__physical_block_size=4096, queue__discard_granularity=4096)
    device(disk / "sda1", partition=1)
    block_device.symlink_to(disk / "sda1")
    assert limits_of_device(block_device).physical_block == 4096


def test_wear_of_flash_memory(block_device: Path) -> None:
    device(block_device, device__life_time="0x02 0x0b", device__pre_eol_info="0x03")
    assert limits_of_device(block_device).lifetime == (3, 2, 11)


def test_invalid_wear_is_not_reported(block_device: Path) -> None:
    device(block_device, device__life_time="much", device__pre_eol_info="0x03")
    assert limits_of_device(block_device).lifetime is None


# The limits that a guest sees.


@pytest.fixture
def file_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Limits]:
    """The limits of a file on a file system with this preferred size, on the block device 7:3 of a simulated sysfs."""
    real = os.fstat

    def make(preferred: int, fragment: int = 4096, **values: object) -> Limits:
        def fstat(fd: int) -> os.stat_result:
            values = list(real(fd))
            values[stat.ST_DEV] = os.makedev(7, 3)
            return os.stat_result(values, {"st_blksize": preferred})

        monkeypatch.setattr(module.os, "fstat", fstat)
        monkeypatch.setattr(module.os, "fstatvfs", lambda fd: SimpleNamespace(f_frsize=fragment))
        device(tmp_path / "7:3", **values)
        with tempfile.TemporaryFile() as file:
            return limits(file.fileno(), read_only=False, sysfs=tmp_path)

    return make


@pytest.mark.parametrize("preferred", [2 << 20, 1 << 20, 128 << 10, 64 << 10])
def test_a_preferred_size_is_not_a_physical_block(file_on: Callable[..., Limits], preferred: int) -> None:
    """For example on tmpfs with huge pages and on network file systems, whose devices are not in sysfs."""
    found = file_on(preferred).for_blocks(512)
    assert found == Limits(4096, 4096, preferred, discard=4096, punches=True)


@pytest.mark.parametrize("size", [512, 4096, 16384])
def test_the_physical_block_is_that_of_the_device_below(file_on: Callable[..., Limits], size: int) -> None:
    found = file_on(4096, queue__physical_block_size=size)
    assert found.for_blocks(512).physical_block == size
    assert found.for_blocks(4096).physical_block == max(size, 4096)


@pytest.mark.parametrize("nonsense", [0, 1, 100, 3 << 10, 128 << 10, 1 << 40])
def test_invalid_sizes_in_sysfs(nonsense: int) -> None:
    for logical in (512, 4096):
        found = Limits(nonsense, nonsense, nonsense, discard=nonsense, secure_erase=nonsense).for_blocks(logical)
        assert found.physical_block == 4096
        assert found.minimum_io % 4096 == 0
        assert 4096 <= found.minimum_io <= 0xFFFF * logical
        assert found.optimal_io % 4096 == 0
        assert found.optimal_io <= 64 << 20
        for granularity in (found.discard, found.secure_erase):
            assert granularity % logical == 0
            assert (granularity > 0) == (nonsense > 0)
            assert granularity <= 1 << 30


def test_a_chosen_physical_block_size() -> None:
    of_the_storage = Limits(4096, 4096, 1 << 20, discard=4096)
    assert of_the_storage.for_blocks(512, 512) == Limits(512, 512, 1 << 20, discard=4096)
    assert of_the_storage.for_blocks(512, 65536) == Limits(65536, 65536, 1 << 20, discard=4096)
    # The stripe unit of an array is not a physical block.
    assert Limits(512, 65536, 1 << 20).for_blocks(512, 4096) == Limits(4096, 65536, 1 << 20)
    assert Limits(512, 65536, 96 << 10).for_blocks(512, 65536) == Limits(65536, 65536, 0)


def test_discards_through_the_page_cache_are_whole_pages() -> None:
    assert Limits(512, 512, discard=512, granule=4096).for_blocks(512).discard == 4096
    assert Limits(512, 512, discard=8192, granule=4096).for_blocks(512).discard == 8192
    assert Limits(512, 512, discard=0, granule=4096).for_blocks(512).discard == 0


@pytest.mark.parametrize("block_size", [512, 4096])
def test_the_configuration_space_has_the_limits(tmp_path: Path, block_size: int) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    options = DiskOptions(num_queues=1, block_size=block_size)
    source = FileSource(Image(path, options))
    worker = Worker("io", slots=1)
    disk = Disk(source, [worker], options)
    try:
        disk.limits = Limits(4096, 8192, 1 << 20, discard=65536, secure_erase=4096, punches=True, lifetime=(1, 2, 3))
        config = np.frombuffer(disk.config_space(), blk.CONFIG)[0]
        assert config["physical_block_exp"] == (3 if block_size == 512 else 0)
        assert (config["min_io_size"], config["opt_io_size"]) == (8192 // block_size, (1 << 20) // block_size)
        assert (config["discard_sector_alignment"], config["secure_erase_sector_alignment"]) == (128, 8)
        for name in ("discard", "write_zeroes", "secure_erase"):
            assert config[f"max_{name}_sectors"] > 0
            assert config[f"max_{name}_seg"] > 0
        assert config["write_zeroes_may_unmap"] == 1
        assert config["writeback"] == 1
        assert config["cylinders"] * config["heads"] * config["sectors"] > 0
        offered = blk.VIRTIO_BLK_F_DISCARD | blk.VIRTIO_BLK_F_SECURE_ERASE | blk.VIRTIO_BLK_F_LIFETIME
        assert disk.features & offered == offered
    finally:
        disk.close()
        worker.stop()


def test_a_sysfs_that_is_hidden_is_like_none(tmp_path: Path) -> None:
    """A container may forbid to look there. Root may look everywhere, so another error stands for that one."""
    hidden = tmp_path / ("x" * 300)
    with pytest.raises(OSError, match="File name too long"):
        hidden.stat()
    assert module.physical_block_below(os.makedev(254, 0), hidden) == module.USUAL_BLOCK
