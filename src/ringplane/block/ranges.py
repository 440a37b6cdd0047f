"""Discarding ranges of an image, and filling them with zeros: system calls that block, so only for helper threads.

Sources: fallocate(2), which block devices know as well; the ioctls of <linux/fs.h>; the kernel's block/fops.c.
Facts that this file depends on:
- Storage may refuse any of these calls, with any errno: EOPNOTSUPP is only one of them, EPERM comes from seccomp
  profiles and some network file systems, EINVAL from block devices for a part of a sector. So an errno of a cheap call
  (one that need not write the zeros) is never reported to the driver: zeros are written over the whole range instead,
  even if the call failed half way.
- A block device handles whole sectors. On kernels before 6.15 a buffered write to a page that is not cached does not
  exclude fallocate(2) of another part of the same page: it reads the page, and writes old data back where the device
  has zeros by then. So if I/O goes through the page cache, cheap calls get only whole pages.
- The edges that remain are written with pwritev(2), which never needs a read-modify-write by us. Through the page cache
  the kernel does it, under the lock of the page that all buffered writes take, so a concurrent write to the adjacent
  sectors is not lost. With O_DIRECT a range is a multiple of the logical block size, and an image whose storage
  transfers larger blocks than that is not served (block/image.py).
- For a block device fallocate(2) and BLKDISCARD drop the page cache of the range while they hold it locked: later reads
  come from the device. For files the file system takes care of that.
"""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
import stat
from errno import EACCES, EINTR, EINVAL, EIO, ENODEV, ENOSYS, ENOTTY, EOPNOTSUPP, EPERM
from struct import unpack

import numpy as np
import numpy.typing as npt

from ringplane.block import mapped_image
from ringplane.block.flushes import Flushes
from ringplane.block.io import BLOCK_IO, DISCARD, SECURE_ERASE, ZERO, ZEROS_IOV
from ringplane.block.mapped_image import MAPPED_IMAGE
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.engines.common import WRITE
from ringplane.native.access import address_of, view
from ringplane.native.falloc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
from ringplane.native.fs import BLKDISCARD, BLKSECDISCARD, BLKSSZGET
from ringplane.native.structs import new, struct
from ringplane.native.syscalls import fallocate, fdatasync, ioctl, pwritev
from ringplane.native.uio import IOVEC

# start and length in bytes, the layout that the ioctls require; unmap: zeros may be holes
RANGE = np.dtype([("start", "<i8"), ("length", "<i8"), ("unmap", "<i8")])
RANGE_SIZE = RANGE.itemsize

# Zeros are written in pieces of at most this size, from memory that is aligned for O_DIRECT.
ZEROS_SIZE = 1 << 20

# What is behind a disk, for all I/O threads and their helpers.
BACKING = struct(
    "fd",
    "block_device",
    "image",  # its MAPPED_IMAGE, or 0
    "zeros",  # address of ZEROS_SIZE zero bytes
    "granule",  # cheap calls are used for whole multiples of this many bytes
    # The modes of fallocate(2) that storage has refused for good, one bit each. Helpers write it; if two do at once,
    # one bit may be lost, and is found again.
    "refused",
    "flush_failed",  # set by any I/O thread, never cleared: earlier writes may be lost (flush.py)
)


class Backing:
    """Owns a BACKING; `address` is its address. The fd stays the caller's."""

    def __init__(self, fd: int, *, page_cache: bool = False) -> None:
        """`page_cache`: I/O goes through it."""
        self.page_cache = page_cache
        self._record = new(BACKING)
        self.flushes = Flushes(self._record)
        self.address = int(self._record.ctypes.data)
        record = self._record[0]
        record["fd"], record["block_device"] = fd, stat.S_ISBLK(os.fstat(fd).st_mode)
        record["zeros"] = int(_zeros().ctypes.data)
        record["granule"] = granule(fd, page_cache=page_cache)

    def use_mapping(self, image: int) -> None:
        """The image is mapped; `image` is the address of its MAPPED_IMAGE."""
        self._record["image"] = image

    @property
    def granule(self) -> int:
        """Ranges are discarded in whole multiples of this many bytes."""
        return int(self._record["granule"][0])

    def sync(self) -> None:
        """fdatasync(2); raises OSError, also if another flush failed."""
        self.flushes.make(lambda: os.fdatasync(int(self._record["fd"][0])))


@functools.cache
def _zeros() -> npt.NDArray[np.uint8]:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, ZEROS_SIZE, flags=flags, prot=mmap.PROT_READ), np.uint8)


def granule(fd: int, *, page_cache: bool) -> int:
    """The `granule` of a BACKING for this open image; `page_cache`: its I/O goes through the page cache."""
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        return 1
    sector = int(unpack("i", fcntl.ioctl(fd, BLKSSZGET, bytes(4)))[0])
    return max(sector, mmap.PAGESIZE) if page_cache else sector


@compiled
def sync(backing):
    """Make completed writes stable; 0 or -errno. The caller stores that it failed (flush.py)."""
    return fdatasync(backing.fd)


@unit
def apply(backing_address, io_address):
    """Apply the operation to the ranges of a block I/O; 0 or the first -errno."""
    backing, io = view(backing_address, BACKING), view(io_address, BLOCK_IO)
    vector = view(io_address + ZEROS_IOV, IOVEC)
    failed = 0
    for index in range(io.range_count):
        result = apply_one(backing, io.operation, view(io.ranges + index * RANGE_SIZE, RANGE), vector)
        if result < 0 and io.operation != DISCARD:
            return result
        if result < 0 and failed == 0:
            failed = result
    return failed


@compiled
def apply_one(backing, operation, piece, vector):
    if piece.length == 0:
        return 0
    if operation == ZERO:
        return zero(backing, piece, vector)
    if operation == DISCARD:
        return discard(backing, piece)
    return call_device(backing, BLKSECDISCARD, piece) if operation == SECURE_ERASE else -EINVAL


# Where the whole granules of a range begin and end. There are none if the end is not beyond the begin.


@compiled
def first_granule(backing, piece):
    return (piece.start + backing.granule - 1) // backing.granule * backing.granule


@compiled
def end_of_granules(backing, piece):
    return (piece.start + piece.length) // backing.granule * backing.granule


@compiled
def discard(backing, piece):
    """Discard as much as possible: it is advice. An error is logged, but not reported (dataplane/answer.py)."""
    start, end = first_granule(backing, piece), end_of_granules(backing, piece)
    if start >= end:
        return 0
    if backing.block_device:
        piece.start, piece.length = start, end - start
        return call_device(backing, BLKDISCARD, piece)
    # A permanent refusal was logged when it came.
    return 0 if backing.refused & FALLOC_FL_PUNCH_HOLE else allocate(backing, FALLOC_FL_PUNCH_HOLE, start, end - start)


@compiled
def zero(backing, piece, vector):
    """Zero the whole granules of the range with a cheap call, and write the rest; if the call fails, write it all."""
    start, end = piece.start, piece.start + piece.length
    middle, middle_end = first_granule(backing, piece), end_of_granules(backing, piece)
    if middle >= middle_end or not zero_cheaply(backing, middle, middle_end - middle, piece.unmap):
        return write_zeros(backing, start, end, vector)
    result = write_zeros(backing, start, middle, vector)
    return result if result < 0 else write_zeros(backing, middle_end, end, vector)


@compiled
def zero_cheaply(backing, start, length, unmap):
    """Punch a hole if that is allowed, else have the range marked as zeros; returns whether one of them succeeded.

    On block devices that cannot do the second, the kernel writes the zeros.
    """
    if unmap and allocate(backing, FALLOC_FL_PUNCH_HOLE, start, length) == 0:
        return True
    return allocate(backing, FALLOC_FL_ZERO_RANGE, start, length) == 0


@compiled
def allocate(backing, mode, start, length):
    """fallocate(2), unless the storage has refused this mode for good; 0 or -errno."""
    if backing.refused & mode:
        return -EOPNOTSUPP
    while True:
        result = fallocate(backing.fd, mode | FALLOC_FL_KEEP_SIZE, start, length)
        if result != -EINTR:
            break
    if mode == FALLOC_FL_PUNCH_HOLE and backing.image:
        # Even if it failed: a part may be done. Pages that still have memory can be accessed with system calls.
        mapped_image.mark_absent(view(backing.image, MAPPED_IMAGE), start, length)
    if is_final(result):
        backing.refused |= mode
    return result


@compiled
def call_device(backing, request, piece):
    """ioctl(2) with the range; 0 or -errno."""
    while True:
        result = ioctl(backing.fd, request, address_of(piece))
        if result != -EINTR:
            return result


@compiled
def is_final(result):
    """Whether storage that returns this -errno will refuse this call for every range.

    The call is not supported (EOPNOTSUPP, ENOSYS, ENOTTY, ENODEV) or not permitted (EPERM, EACCES). Other errors may
    concern this range (EINVAL, EIO) or this moment (ENOSPC, EBUSY, ENOMEM), so the call is used again for the next one.
    """
    return (
        result == -EOPNOTSUPP
        or result == -ENOSYS
        or result == -EPERM
        or result == -EACCES
        or result == -ENOTTY
        or result == -ENODEV
    )


@compiled
def write_zeros(backing, start, end, vector):
    """Write zeros from `start` up to but not including `end`; 0 or -errno."""
    while start < end:
        vector.base = backing.zeros
        vector.len = min(end - start, ZEROS_SIZE)
        if backing.image:
            image = view(backing.image, MAPPED_IMAGE)
            result = mapped_image.read_or_write(image, WRITE, address_of(vector), 1, start, vector.len)
        else:
            result = pwritev(backing.fd, address_of(vector), 1, start)
        if result == -EINTR:
            continue
        if result <= 0:
            # 0: nothing was written, although something was asked for.
            return result if result < 0 else -EIO
        start += result
    return 0
