"""Storage that refuses an operation: ringplane uses another way, and reports only errors of the last one."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringplane.driver import Driver
from ringplane.driver.driver import FEATURES, segments
from ringplane.virtio.blk import (
    SECTOR,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_F_ZONED,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
)
from ringplane.virtio.blk_zones import VIRTIO_BLK_T_ZONE_RESET
from unit.rig import loop_device, pattern, small_tmpfs

from .fuse import FuseFile, Operation, mounted, obey
from .serving import Disk, serving, wait_until
from .test_failures import only, small_disk, submit

MIB = 1 << 20
BLOCK = 4096
OK, IOERR = VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR
UNMAP = 1
# The sizes that losetup(8) accepts.
SECTOR_SIZES = [512 << doublings for doublings in range(8)]


@pytest.fixture
def fuse(tmp_path: Path) -> Iterator[FuseFile]:
    with mounted(FuseFile(tmp_path / "mounted", 2 * MIB)) as file:
        yield file


def ask(driver: Driver, kind: int, *ranges: tuple[int, int, int]) -> int:
    return driver.request(kind, 0, segments(*ranges)).status


def check_ranges(driver: Driver, block: int, size: int = MIB, *, discards: bool = True) -> None:
    """Check ranges of whole logical blocks at any place: zeros are written, and each discard succeeds.

    Nothing outside the ranges changes; discarded ranges may contain anything.
    """
    randomness = random.Random(block + size)
    model = bytearray(pattern(size, block))
    driver.write(0, bytes(model))
    count = block // SECTOR
    places = [(0, 1), (1, 1), (7, 1), (size // block - 1, 1), (3, 129), (0, size // block // 4)]
    places += [(start := randomness.randrange(size // block), randomness.randrange(1, size // block - start + 1))
               for _ in range(20)]  # fmt: skip
    for number, (start, length) in enumerate(places):
        place = slice(start * block, (start + length) * block)
        status = ask(driver, VIRTIO_BLK_T_WRITE_ZEROES, (start * count, length * count, number % 2))
        assert status == OK, (start, length)
        model[place] = bytes(length * block)
        assert driver.read(0, size) == model, (start, length)
        if discards:
            assert ask(driver, VIRTIO_BLK_T_DISCARD, (start * count, length * count, 0)) == OK
            found = driver.read(0, size)
            assert found[: place.start] + found[place.stop :] == model[: place.start] + model[place.stop :]
        again = slice(place.start, min(place.stop, place.start + 16 * block))
        model[place] = pattern(length * block, number)
        driver.write(place.start, bytes(model[place]))
        assert driver.read(again.start, again.stop - again.start) == model[again]
    driver.flush()
    assert driver.read(0, size) == model


# Block devices.


@pytest.mark.parametrize("sector", SECTOR_SIZES)
def test_ranges_of_a_device_of_any_sector_size(tmp_path: Path, sector: int) -> None:
    """Always through the page cache, and with O_DIRECT if the disk's blocks are not smaller than the device's."""
    ways = [(block, direct) for block in (512, 4096) for direct in (False, True) if block >= sector or not direct]
    with contextlib.ExitStack() as stack:
        disks = []
        for number, (block, direct) in enumerate(ways):
            file = tmp_path / f"{number}.img"
            file.touch()
            os.truncate(file, MIB)
            device = stack.enter_context(loop_device(file, "--sector-size", str(sector)))
            disks.append(Disk(device, direct=direct, block_size=block))
        served = stack.enter_context(serving(*disks))
        for number, (block, _) in enumerate(ways):
            with served.driver(number) as driver:
                check_ranges(driver, block)
                driver.flush()
                assert driver.read(0, MIB) == (tmp_path / f"{number}.img").read_bytes()
        assert "failed" not in served.logged()


def test_zeroing_part_of_a_sector_keeps_concurrent_writes_beside_it(tmp_path: Path) -> None:
    """They share one sector of the device, at the same time and through its page cache: all bytes are right."""
    file = tmp_path / "disk.img"
    file.touch()
    os.truncate(file, MIB)
    with (
        loop_device(file, "--sector-size", "4096") as device,
        serving(Disk(device, direct=False)) as served,
        served.driver() as driver,
    ):
        for attempt in range(50):
            driver.write(0, pattern(8 * SECTOR, attempt))
            data = pattern(8 * SECTOR, 1000 + attempt)
            zeros = segments((2, 1, UNMAP * (attempt % 2)), (5, 1, 0))
            writes = [number for number in range(8) if number not in (2, 5)]
            asked = [submit(driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, zeros)]
            asked += [submit(driver, VIRTIO_BLK_T_OUT, n * SECTOR, data[n * SECTOR : (n + 1) * SECTOR]) for n in writes]
            assert [driver._answer(*each).status for each in asked] == [OK] * 7
            expected = bytearray(data)
            for number in (2, 5):
                expected[number * SECTOR : (number + 1) * SECTOR] = bytes(SECTOR)
            assert driver.read(0, 8 * SECTOR) == expected
        driver.flush()
        assert file.read_bytes()[: 8 * SECTOR] == expected


# File systems.


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("block", [512, 4096])
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
def test_ranges_of_a_file(tmp_path: Path, kind: str, block: int, direct: bool) -> None:
    with contextlib.ExitStack() as stack:
        if kind == "tmpfs":
            folder = stack.enter_context(small_tmpfs(tmp_path / "small", mib=4))
        else:
            folder = stack.enter_context(small_disk(tmp_path / "small", kind))
        image = folder / "disk.img"
        image.touch()
        os.truncate(image, MIB)
        served = stack.enter_context(serving(Disk(image, direct=direct, block_size=block)))
        with served.driver() as driver:
            check_ranges(driver, block)
        assert "failed" not in served.logged()


@pytest.mark.parametrize("error", [errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV])
def test_a_permanent_refusal_is_remembered(fuse: FuseFile, error: int) -> None:
    """Zeros are written instead, discards are ignored, and the operation is not tried again each time."""
    with serving(Disk(fuse.path)) as served, served.driver() as driver:
        assert driver.features & VIRTIO_BLK_F_DISCARD
        fuse.rule = only("allocate", error)
        fuse.seen.clear()
        check_ranges(driver, SECTOR)
        # Two modes with one refusal each; the kernel itself remembers some.
        assert 0 <= len([each for each in fuse.seen if each.kind == "allocate"]) <= 2


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EIO, errno.ENOSPC, errno.EBUSY, errno.ETXTBSY, errno.ENOMEM])
def test_a_temporary_failure_is_retried_at_the_next_request(fuse: FuseFile, error: int) -> None:
    with serving(Disk(fuse.path)) as served, served.driver() as driver:
        fuse.rule = only("allocate", error)
        check_ranges(driver, SECTOR)
        fuse.rule = obey
        for flags in (0, UNMAP):
            fuse.seen.clear()
            assert ask(driver, VIRTIO_BLK_T_WRITE_ZEROES, (0, 8, flags)) == OK
            assert [each.kind for each in fuse.seen] == ["allocate"]


def test_an_error_of_writing_zeros_is_reported(fuse: FuseFile) -> None:
    with serving(Disk(fuse.path)) as served, served.driver() as driver:
        driver.write(0, pattern(MIB))
        for error in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            bad = only("write", error, 8 * BLOCK, 9 * BLOCK)
            fuse.rule = lambda each, bad=bad: errno.EPERM if each.kind == "allocate" else bad(each)
            assert ask(driver, VIRTIO_BLK_T_WRITE_ZEROES, (64, 8, 0)) == IOERR
            # Requests that do not touch the bad place succeed.
            assert ask(driver, VIRTIO_BLK_T_WRITE_ZEROES, (0, 8, 0)) == OK
            text = f"write_zeroes of {BLOCK} bytes at {8 * BLOCK} failed: {os.strerror(error)}"
            wait_until(lambda text=text: text in served.logged(), text)


def test_a_partly_failed_range_is_zeroed_by_writing(fuse: FuseFile) -> None:
    def half(operation: Operation) -> int | None:
        if operation.kind != "allocate":
            return None
        fuse.content[operation.offset : operation.offset + operation.size // 2] = b"?" * (operation.size // 2)
        return errno.EIO

    with serving(Disk(fuse.path)) as served, served.driver() as driver:
        driver.write(0, pattern(MIB))
        fuse.rule = half
        assert ask(driver, VIRTIO_BLK_T_WRITE_ZEROES, (0, 64, 0), (96, 32, UNMAP)) == OK
        expected = bytearray(pattern(MIB))
        expected[: 64 * SECTOR] = bytes(64 * SECTOR)
        expected[96 * SECTOR : 128 * SECTOR] = bytes(32 * SECTOR)
        assert driver.read(0, MIB) == expected


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EINVAL])
def test_a_failed_discard_is_logged_and_the_request_succeeds(fuse: FuseFile, error: int) -> None:
    with serving(Disk(fuse.path)) as served, served.driver() as driver:
        driver.write(0, pattern(MIB))
        fuse.rule = only("allocate", error, 0, BLOCK)
        assert ask(driver, VIRTIO_BLK_T_DISCARD, (0, 8, 0), (16, 8, 0)) == OK
        expected = bytearray(pattern(MIB))
        expected[16 * SECTOR : 24 * SECTOR] = bytes(8 * SECTOR)
        assert driver.read(0, MIB) == expected, "what could be discarded was not"
        text = f"discard of {2 * BLOCK} bytes at 0 failed: {os.strerror(error)}; discard is advice"
        wait_until(lambda: text in served.logged(), text)


# fallocate(2) is forbidden, as in seccomp profiles of containers.

FORBIDDING = """
import sys
from ringplane.system import libc
from ringplane.system import seccomp
from ringplane.system.syscall_numbers import NUMBERS
libc.forbid_new_rights()
seccomp.install([
    (seccomp.LOAD, 0, 0, seccomp.NUMBER),
    (seccomp.IF_EQUAL, 0, 1, NUMBERS["fallocate"]),
    (seccomp.RETURN, 0, 0, seccomp.REFUSE),
    (seccomp.RETURN, 0, 0, seccomp.SECCOMP_RET_ALLOW),
])
from ringplane.cli import main
main()
"""


@pytest.mark.parametrize("engine", ["auto", "aio"])
def test_fallocate_is_forbidden(tmp_path: Path, engine: str) -> None:
    with contextlib.ExitStack() as stack:
        folders = [tmp_path, stack.enter_context(small_tmpfs(tmp_path / "small", mib=4))]
        images = [folder / "disk.img" for folder in folders]
        files = [*images, tmp_path / "device.img"]
        for file in files:
            file.touch()
            os.truncate(file, MIB)
        images.append(stack.enter_context(loop_device(files[-1])))
        disks = [Disk(image, direct=image != images[-1], engine=engine) for image in images]
        served = stack.enter_context(serving(*disks, engine="aio", program=FORBIDDING))
        for number in range(len(disks)):
            with served.driver(number) as driver:
                assert driver.features & VIRTIO_BLK_F_WRITE_ZEROES
                # A hole in a file needs fallocate(2); a device is discarded by ioctl(2).
                discards = bool(driver.features & VIRTIO_BLK_F_DISCARD)
                assert discards == (number == 2)
                check_ranges(driver, SECTOR, discards=discards)


# Zoned disks.

ZONE = 64 << 10


def test_zones_are_reset_by_writing_zeros(fuse: FuseFile, tmp_path: Path) -> None:
    image, zoned = tmp_path / "zoned.img", f'zoned = "{ZONE}"'
    with serving(Disk(image, more=f"{zoned}\ncreate = {len(fuse.content)}")):
        pass
    image.unlink()
    image.symlink_to(fuse.path)
    fuse.rule = only("allocate", errno.EPERM)
    with (
        serving(Disk(image, more=zoned)) as served,
        served.driver(feature_bits=FEATURES | VIRTIO_BLK_F_ZONED) as driver,
    ):
        driver.write(0, pattern(ZONE))
        assert driver.request(VIRTIO_BLK_T_ZONE_RESET, 0).status == OK
        assert driver.read(0, ZONE) == bytes(ZONE)
        assert fuse.content[:ZONE] == bytes(ZONE)


# Other ways.


def test_a_file_system_without_synchronous_writes(fuse: FuseFile) -> None:
    """RWF_DSYNC is refused: a flush follows each write, which is then stable when it is completed.

    Not with io_uring, because Linux 6.18 itself endlessly repeats a write that fails with EOPNOTSUPP here.
    """

    def refuse(operation: Operation) -> int | None:
        return errno.EOPNOTSUPP if operation.kind == "write" and operation.stable else None

    with (
        serving(Disk(fuse.path), engine="aio") as served,
        served.driver(feature_bits=FEATURES & ~VIRTIO_BLK_F_FLUSH) as driver,
    ):
        fuse.rule = refuse
        asked = [submit(driver, VIRTIO_BLK_T_OUT, n * BLOCK, pattern(BLOCK, n)) for n in range(32)]
        assert [driver._answer(*each).status for each in asked] == [OK] * 32
        kinds = [each.kind for each in fuse.seen]
        assert kinds[-1] == "sync", "a write was answered before it was stable"
        fuse.seen.clear()
        driver.write(0, pattern(BLOCK))
        assert [each.kind for each in fuse.seen] == ["write", "sync"]
        assert fuse.content[BLOCK : 2 * BLOCK] == pattern(BLOCK, 1)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EIO])
def test_direct_io_is_refused_when_the_image_is_opened(fuse: FuseFile, error: int) -> None:
    fuse.open_rule = lambda flags: error if flags & os.O_DIRECT else 0
    with serving(Disk(fuse.path)) as served, served.driver() as driver:
        assert "refuses O_DIRECT; using the page cache" in served.announced
        check_ranges(driver, SECTOR)
