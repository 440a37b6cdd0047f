"""What the storage behind an image can do besides reading and writing, and what sizes it likes.

Source of the block devices' part: the kernel's Documentation/ABI/stable/sysfs-block.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from ringplane.engines.ranges import BLKSECDISCARD, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from ringplane.native import libc

SYSFS = Path("/sys/dev/block")

# A file system's idea of a good size (huge pages, a striped array) may be larger than what it must read and write.
LARGEST_BLOCK = 64 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes; `physical_block` is what storage writes at once, a power of two, `optimal_io` 0 if it is unknown.

    `discard` and `secure_erase` tell the granularity at which ranges can be discarded so, 0 where they cannot.
    `punches` says that zeros may be holes. `lifetime` is (pre-EOL information, estimates of type A and B) as eMMC tells
    them, if it does.
    """

    physical_block: int = 512
    minimum_io: int = 512
    optimal_io: int = 0
    discard: int = 0
    secure_erase: int = 0
    punches: bool = False
    lifetime: tuple[int, int, int] | None = None


def limits(fd: int, *, read_only: bool, sysfs: Path = SYSFS) -> Limits:
    """Those of an open image; of one that is read-only nothing can be discarded. `sysfs` is where devices are told."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return _of_device(fd, sysfs / f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}", read_only)
    block = min(status.st_blksize, LARGEST_BLOCK)
    punches = not read_only and _can_punch(fd, status.st_size)
    return Limits(block, block, discard=status.st_blksize if punches else 0, punches=punches)


def _can_punch(fd: int, size: int) -> bool:
    """Whether the file system makes holes: asked for one beyond the end of the file, which is there anyway."""
    try:
        libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, -(-size // 4096) * 4096, 4096)
    except OSError:
        return False
    return True


def _of_device(fd: int, entry: Path, read_only: bool) -> Limits:
    """A partition has the limits of its disk."""
    disk = entry.resolve().parent if (entry / "partition").exists() else entry
    granularity = _number(disk / "queue/discard_granularity") if _number(disk / "queue/discard_max_bytes") else 0
    physical = _number(disk / "queue/physical_block_size") or 512
    return Limits(
        physical_block=physical,
        minimum_io=_number(disk / "queue/minimum_io_size") or physical,
        optimal_io=_number(disk / "queue/optimal_io_size"),
        discard=0 if read_only else granularity,
        secure_erase=(granularity or physical) if not read_only and _can_erase(fd) else 0,
        punches=not read_only,
        lifetime=_lifetime(disk / "device"),
    )


def _can_erase(fd: int) -> bool:
    """Whether there is secure erase: half a sector is invalid where there is, else the request is not supported."""
    try:
        fcntl.ioctl(fd, BLKSECDISCARD, struct.pack("QQ", 1, 1))
    except OSError as error:
        return error.errno == errno.EINVAL
    return True


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
