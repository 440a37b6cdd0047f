"""What the storage behind an image can do besides reading and writing, and what sizes it likes.

Source of the block devices' part: the kernel's Documentation/ABI/stable/sysfs-block.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from ringplane.engines.ranges import BLKDISCARD, BLKSECDISCARD, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from ringplane.native import libc

SYSFS = Path("/sys/dev/block")

# ioctl(2) request of block devices, <linux/fs.h>
BLKPBSZGET = 0x127B

# A physical block where nothing says what it is; databases refuse larger ones, unless a device really has them.
USUAL_BLOCK = 4096

# Limits beyond these are mistakes of whoever reports them, or of no use: guests make their read-ahead of `optimal_io`.
LARGEST_BLOCK, LARGEST_OPTIMAL, LARGEST_GRANULARITY = 64 << 10, 64 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes; `physical_block` is what storage writes at once, a power of two, `optimal_io` 0 if it is unknown.

    `discard` and `secure_erase` are the granularity at which ranges can be discarded so, 0 where they cannot.
    `punches` says that zeros may be holes. `lifetime` is (pre-EOL information, estimates of type A and B) as eMMC
    reports them, if it does.
    """

    physical_block: int = 512
    minimum_io: int = 512
    optimal_io: int = 0
    discard: int = 0
    secure_erase: int = 0
    punches: bool = False
    lifetime: tuple[int, int, int] | None = None

    def for_blocks(self, logical: int, physical: int | None = None, granule: int = 1) -> Limits:
        """For a disk of such logical blocks, with another physical block if one is given; sizes fit each other.

        Only whole granules are discarded (engines/ranges.py). Sizes that make no sense are left out: guests divide by
        them and round to them.
        """
        block = max(physical or _power_of_two(self.physical_block, LARGEST_BLOCK), logical)
        # Where it is a block, and not the share of a disk in an array, it is another one with that.
        minimum = max(block, self.minimum_io if self.minimum_io > self.physical_block else 0)
        return replace(
            self,
            physical_block=block,
            minimum_io=minimum if minimum % block == 0 and minimum // logical <= 0xFFFF else block,
            optimal_io=self.optimal_io if self.optimal_io % block == 0 and self.optimal_io <= LARGEST_OPTIMAL else 0,
            discard=_granularity(self.discard, max(logical, granule)),
            secure_erase=_granularity(self.secure_erase, max(logical, granule)),
        )


def _power_of_two(size: int, largest: int) -> int:
    return size if size & (size - 1) == 0 and 512 <= size <= largest else USUAL_BLOCK


def _granularity(size: int, smallest: int) -> int:
    """0 stays 0."""
    return size if size % smallest == 0 and size <= LARGEST_GRANULARITY else smallest


def limits(fd: int, *, read_only: bool, sysfs: Path = SYSFS) -> Limits:
    """Those of an open image; of one that is read-only nothing can be discarded. `sysfs` has the block devices."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return _of_device(fd, _disk(sysfs, status.st_rdev), read_only)
    punches = not read_only and _can_punch(fd, status.st_size)
    # Of the device that the file system is on, if it is on one: network file systems and some others are not.
    block = _number(_disk(sysfs, status.st_dev) / "queue/physical_block_size") or USUAL_BLOCK
    return Limits(block, block, status.st_blksize, discard=_fragment(fd) if punches else 0, punches=punches)


def _disk(sysfs: Path, device: int) -> Path:
    """Its folder in sysfs; a partition has the limits of its disk."""
    entry = sysfs / f"{os.major(device)}:{os.minor(device)}"
    return entry.resolve().parent if (entry / "partition").exists() else entry


def _can_punch(fd: int, size: int) -> bool:
    """Whether the file system makes holes: asked for one beyond the end of the file, which is there anyway."""
    try:
        libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, -(-size // 4096) * 4096, 4096)
    except OSError:
        return False
    return True


def _fragment(fd: int) -> int:
    """What a file system gives back at once, which may be less than it likes to transfer (huge pages on tmpfs)."""
    try:
        return os.fstatvfs(fd).f_frsize or USUAL_BLOCK
    except OSError:
        return USUAL_BLOCK


def _of_device(fd: int, disk: Path, read_only: bool) -> Limits:
    granularity = _number(disk / "queue/discard_granularity")
    # Where there is no sysfs the device itself has its block size, but not the rest.
    physical = _number(disk / "queue/physical_block_size") or _physical_block(fd)
    return Limits(
        physical_block=physical,
        minimum_io=_number(disk / "queue/minimum_io_size") or physical,
        optimal_io=_number(disk / "queue/optimal_io_size"),
        discard=(granularity or physical) if not read_only and _can_discard(fd, disk) else 0,
        secure_erase=(granularity or physical) if not read_only and _refusal(fd, BLKSECDISCARD) == errno.EINVAL else 0,
        punches=not read_only,
        lifetime=_lifetime(disk / "device"),
    )


def _physical_block(fd: int) -> int:
    try:
        return int(struct.unpack("I", fcntl.ioctl(fd, BLKPBSZGET, bytes(4)))[0])
    except OSError:
        return USUAL_BLOCK


def _can_discard(fd: int, disk: Path) -> bool:
    """By asking the device, unless it is open for reading only (`ringplane check`)."""
    why = _refusal(fd, BLKDISCARD)
    return why == errno.EINVAL or (why == errno.EBADF and _number(disk / "queue/discard_max_bytes") > 0)


def _refusal(fd: int, request: int) -> int | None:
    """The errno of discarding or erasing half a sector: EINVAL where a device can do that, otherwise another one."""
    try:
        fcntl.ioctl(fd, request, struct.pack("QQ", 1, 1))
    except OSError as error:
        return error.errno
    return None


def _lifetime(device: Path) -> tuple[int, int, int] | None:
    """mmc: "life_time" holds two numbers, "pre_eol_info" one, all hexadecimal."""
    try:
        first, second = (device / "life_time").read_text().split()
        return int((device / "pre_eol_info").read_text(), 16), int(first, 16), int(second, 16)
    except (OSError, ValueError):
        return None


def _number(path: Path) -> int:
    """What a file of sysfs says; 0 where it says nothing."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
