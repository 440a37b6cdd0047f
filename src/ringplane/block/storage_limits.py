"""The operations that the storage of an image supports besides reading and writing, and its preferred sizes.

Source of the block devices' part: the kernel's Documentation/ABI/stable/sysfs-block.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import stat
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from ringplane.native.falloc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from ringplane.native.fs import BLKDISCARD, BLKIOMIN, BLKIOOPT, BLKPBSZGET, BLKSECDISCARD
from ringplane.system import libc
from ringplane.system.confinement import is_confined

SYSFS = Path("/sys/dev/block")

# The physical block size if it is unknown. A larger value would be wrong for databases, unless the device has it.
USUAL_BLOCK = 4096

# Larger values are mistakes of the device, or are useless: guests derive their read-ahead from `optimal_io`.
LARGEST_BLOCK, LARGEST_OPTIMAL, LARGEST_GRANULARITY = 64 << 10, 64 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes; `physical_block` is the unit that storage writes, a power of two; `optimal_io` is 0 if unknown.

    `discard` and `secure_erase` are the granularities of these operations, 0 if they are unsupported; only multiples of
    `granule` are discarded (ranges.py). `punches` is whether zeros may be holes. `lifetime` is (pre-EOL information,
    estimates of type A and B), if an eMMC reports it.
    """

    physical_block: int = 512
    minimum_io: int = 512
    optimal_io: int = 0
    discard: int = 0
    secure_erase: int = 0
    punches: bool = False
    lifetime: tuple[int, int, int] | None = None
    granule: int = 1

    def for_blocks(self, logical: int, physical: int | None = None) -> Limits:
        """The limits of a disk with this logical block size, and this physical one if given, made consistent.

        Implausible sizes are dropped, because guests divide by sizes and round to them.
        """
        block = max(physical or _power_of_two(self.physical_block, LARGEST_BLOCK), logical)
        # A larger minimum is a property of the storage (the chunk of an array) and is kept; else it is the block.
        minimum = max(block, self.minimum_io if self.minimum_io > self.physical_block else 0)
        return replace(
            self,
            physical_block=block,
            minimum_io=minimum if minimum % block == 0 and minimum // logical <= 0xFFFF else block,
            optimal_io=self.optimal_io if self.optimal_io % block == 0 and self.optimal_io <= LARGEST_OPTIMAL else 0,
            discard=_granularity(self.discard, max(logical, self.granule)),
            secure_erase=_granularity(self.secure_erase, max(logical, self.granule)),
        )


def _power_of_two(size: int, largest: int) -> int:
    return size if size & (size - 1) == 0 and 512 <= size <= largest else USUAL_BLOCK


def _granularity(size: int, smallest: int) -> int:
    """0 stays 0 (unsupported)."""
    return size if size % smallest == 0 and size <= LARGEST_GRANULARITY else smallest


def limits(fd: int, *, read_only: bool, sysfs: Path = SYSFS) -> Limits:
    """The limits of an open image; a read-only one supports no discard. `sysfs` is the folder of block devices."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return _of_device(fd, _disk(sysfs, status.st_rdev), read_only)
    punches = not read_only and _can_punch(fd, status.st_size)
    block = physical_block_below(status.st_dev, sysfs)
    return Limits(block, block, status.st_blksize, discard=_fragment(fd) if punches else 0, punches=punches)


@functools.cache
def physical_block_below(device: int, sysfs: Path) -> int:
    """The physical block of the device below a file system, if any: network file systems and some others have none.

    It is remembered, because a process that has given up its rights cannot find it out (control/sandbox.py).
    """
    return _number(_disk(sysfs, device) / "queue/physical_block_size") or USUAL_BLOCK


def _disk(sysfs: Path, device: int) -> Path:
    """The folder of a block device in sysfs; for a partition that of its disk, which has the limits."""
    entry = sysfs / f"{os.major(device)}:{os.minor(device)}"
    # Containers hide parts of /sys, by permissions too, for which `Path.exists` raises.
    return entry.resolve().parent if os.path.exists(entry / "partition") else entry


def _can_punch(fd: int, size: int) -> bool:
    """Whether the file system can punch holes, tried beyond the end of the file, where it changes nothing."""
    try:
        libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, -(-size // 4096) * 4096, 4096)
    except OSError:
        return False
    return True


def _fragment(fd: int) -> int:
    """The unit that a file system deallocates; it may be less than the preferred I/O size (tmpfs with huge pages)."""
    try:
        return os.fstatvfs(fd).f_frsize or USUAL_BLOCK
    except OSError:
        return USUAL_BLOCK


def _of_device(fd: int, disk: Path, read_only: bool) -> Limits:
    granularity = _number(disk / "queue/discard_granularity")
    # Without sysfs the device itself reports all sizes but that one.
    physical = _number(disk / "queue/physical_block_size") or _reported(fd, BLKPBSZGET) or USUAL_BLOCK
    return Limits(
        physical_block=physical,
        minimum_io=_number(disk / "queue/minimum_io_size") or _reported(fd, BLKIOMIN) or physical,
        optimal_io=_number(disk / "queue/optimal_io_size") or _reported(fd, BLKIOOPT),
        discard=(granularity or physical) if not read_only and _can_discard(fd, disk) else 0,
        secure_erase=(granularity or physical) if not read_only and _refusal(fd, BLKSECDISCARD) == errno.EINVAL else 0,
        punches=not read_only,
        lifetime=_lifetime(disk / "device"),
    )


def _reported(fd: int, request: int) -> int:
    """The size that a device reports; 0 if it does not."""
    try:
        return int(struct.unpack("I", fcntl.ioctl(fd, request, bytes(4)))[0])
    except OSError:
        return 0


def _can_discard(fd: int, disk: Path) -> bool:
    """Whether the device supports discard. It is tried, unless the fd is read-only (`ringplane check`)."""
    why = _refusal(fd, BLKDISCARD)
    return why == errno.EINVAL or (why == errno.EBADF and _number(disk / "queue/discard_max_bytes") > 0)


def _refusal(fd: int, request: int) -> int | None:
    """The errno of discarding or erasing half a sector: EINVAL if the device supports the operation, else another."""
    try:
        fcntl.ioctl(fd, request, struct.pack("QQ", 1, 1))
    except OSError as error:
        return error.errno
    return None


def _lifetime(device: Path) -> tuple[int, int, int] | None:
    """mmc: "life_time" holds two numbers, "pre_eol_info" one, all hexadecimal."""
    if is_confined():
        return None
    try:
        first, second = (device / "life_time").read_text().split()
        return int((device / "pre_eol_info").read_text(), 16), int(first, 16), int(second, 16)
    except (OSError, ValueError):
        return None


def _number(path: Path) -> int:
    """The number in a file of sysfs; 0 if there is none, or this process may not read it any more."""
    if is_confined():
        return 0
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
