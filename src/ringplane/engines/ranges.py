"""Ranges of an image discarded, or filled with zeros: system calls that wait, so for helper threads alone.

Sources: fallocate(2), which block devices know as well; the ioctls of <linux/fs.h>; the kernel's block/fops.c.
Facts that this file depends on:
- Storage may refuse any of these calls, with any errno: EOPNOTSUPP is only one of them, EPERM comes from seccomp
  profiles and some network file systems, EINVAL from block devices for a part of a sector. So an errno of a cheap way
  is never reported to the driver: zeros are written over the whole range instead, also if the call failed half way.
- A block device does whole sectors. On kernels before 6.15 a buffered write to a page that is not cached does not
  exclude fallocate(2) of another part of the same page: it reads the page, and writes old data back where the device
  has zeros by then. So where I/O goes through the page cache, cheap ways get whole pages alone.
- The edges that remain are written with pwritev(2). Neither of its two ways needs a read-modify-write of ours.
  Through the page cache the kernel does it, under the lock of the page that all buffered writes take, so a concurrent
  write to the neighbouring sectors is not lost. With O_DIRECT a range is a multiple of the logical block size, and an
  image whose storage transfers larger blocks than that is not served (image.py).
- For a block device fallocate(2) and BLKDISCARD drop the page cache of the range while they hold it locked: what is
  read later comes from the device. Files are their file system's affair.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import struct

import numpy as np

from ringplane.engines import memory
from ringplane.engines.common import DISCARD, WRITE, ZERO
from ringplane.engines.memory import MAPPED_IMAGE
from ringplane.native.access import address_of, view
from ringplane.native.jit import compiled
from ringplane.native.syscalls import (
    EACCES,
    EINTR,
    EIO,
    ENODEV,
    ENOSYS,
    ENOTTY,
    EOPNOTSUPP,
    EPERM,
    IOVEC,
    fallocate,
    ioctl,
    pwritev,
)

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 0x01, 0x02, 0x10
BLKSSZGET, BLKDISCARD, BLKSECDISCARD = 0x1268, 0x1277, 0x127D

# start and length in bytes, the layout that the ioctls want; unmap: zeros may be holes
RANGE = np.dtype([("start", "<i8"), ("length", "<i8"), ("unmap", "<i8")])
RANGE_SIZE = RANGE.itemsize

# Zeros are written in pieces of this size at most, from memory that fits O_DIRECT.
ZEROS_SIZE = 1 << 20

# What helper threads know of an image. image: its MAPPED_IMAGE, or 0; zeros: address of ZEROS_SIZE bytes of them;
# granule: cheap ways are for whole multiples of so many bytes; refused: the modes of fallocate(2) that storage has
# refused for good, one bit each (helpers write it: of two that do so at a time one may be lost, and is found again).
BACKING = np.dtype([(name, "<i8") for name in ("fd", "block_device", "image", "zeros", "granule", "refused")])


def granule(fd: int, *, page_cache: bool) -> int:
    """The BACKING's of an open image, whose I/O goes through the page cache or not."""
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        return 1
    sector = int(struct.unpack("i", fcntl.ioctl(fd, BLKSSZGET, bytes(4)))[0])
    return max(sector, mmap.PAGESIZE) if page_cache else sector


@compiled
def apply(backing, operation, ranges, count, vector):
    """Do this with each of `count` RANGE structs at `ranges`; 0, or the first -errno. `vector` is room for an IOVEC."""
    failed = 0
    for index in range(count):
        result = apply_one(backing, operation, view(ranges + index * RANGE_SIZE, RANGE), view(vector, IOVEC))
        if result < 0 and operation != DISCARD:
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
    return call_device(backing, BLKSECDISCARD, piece)


# Whole granules: where those of a range begin and end; there are none if that is not before.


@compiled
def first_granule(backing, piece):
    return (piece.start + backing.granule - 1) // backing.granule * backing.granule


@compiled
def end_of_granules(backing, piece):
    return (piece.start + piece.length) // backing.granule * backing.granule


@compiled
def discard(backing, piece):
    """Discard what can be: it is advice. The result is for the log; no errno of it is the driver's (complete.py)."""
    start, end = first_granule(backing, piece), end_of_granules(backing, piece)
    if start >= end:
        return 0
    if backing.block_device:
        piece.start, piece.length = start, end - start
        return call_device(backing, BLKDISCARD, piece)
    # The log has a refusal for good from when it came.
    return 0 if backing.refused & FALLOC_FL_PUNCH_HOLE else allocate(backing, FALLOC_FL_PUNCH_HOLE, start, end - start)


@compiled
def zero(backing, piece, vector):
    """Have zeros made of the whole granules of the range, and write the rest; all of it where that fails."""
    start, end = piece.start, piece.start + piece.length
    middle, middle_end = first_granule(backing, piece), end_of_granules(backing, piece)
    if middle >= middle_end or not zero_cheaply(backing, middle, middle_end - middle, piece.unmap):
        return write_zeros(backing, start, end, vector)
    result = write_zeros(backing, start, middle, vector)
    return result if result < 0 else write_zeros(backing, middle_end, end, vector)


@compiled
def zero_cheaply(backing, start, length, unmap):
    """By the first way that the storage knows: a hole where that is allowed, a range marked as zeros; whether it did.

    On block devices the kernel writes the zeros in the second way, if the device cannot.
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
        # Also if it failed: it may have done a part. A page that is there all the same is reached by system calls.
        memory.mark_absent(view(backing.image, MAPPED_IMAGE), start, length)
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
    """Whether storage that returns this -errno will never do what was asked for.

    It does not know the call (EOPNOTSUPP, ENOSYS, ENOTTY, ENODEV), or is not allowed it (EPERM, EACCES). All else may
    be about this range (EINVAL, EIO) or this moment (ENOSPC, EBUSY, ENOMEM), and the next range is tried again.
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
    """Write the bytes from `start` on and before `end`; 0 or -errno."""
    while start < end:
        vector.base = backing.zeros
        vector.len = min(end - start, ZEROS_SIZE)
        if backing.image:
            image = view(backing.image, MAPPED_IMAGE)
            result = memory.transfer(image, WRITE, address_of(vector), 1, start, vector.len)
        else:
            result = pwritev(backing.fd, address_of(vector), 1, start)
        if result == -EINTR:
            continue
        if result <= 0:
            # Nothing at all, although something was asked for, is no success.
            return result if result < 0 else -EIO
        start += result
    return 0
