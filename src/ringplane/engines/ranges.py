"""Ranges of an image discarded, or filled with zeros: system calls that wait, so for helper threads alone.

Sources: fallocate(2), which block devices know as well; the ioctls of <linux/fs.h>.
"""

from __future__ import annotations

import numpy as np

from ringplane.engines import memory
from ringplane.engines.common import DISCARD, SECURE_ERASE, WRITE, ZERO
from ringplane.engines.memory import MAPPED_IMAGE
from ringplane.native.access import address_of, view
from ringplane.native.jit import compiled
from ringplane.native.syscalls import EINTR, EIO, ENOSYS, EOPNOTSUPP, IOVEC, fallocate, ioctl, pwritev

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 0x01, 0x02, 0x10
BLKDISCARD, BLKSECDISCARD = 0x1277, 0x127D

# start and length in bytes, the layout that the ioctls want; unmap: zeros may be holes
RANGE = np.dtype([("start", "<i8"), ("length", "<i8"), ("unmap", "<i8")])
RANGE_SIZE = RANGE.itemsize

# Zeros are written in pieces of this size at most, from memory that fits O_DIRECT.
ZEROS_SIZE = 1 << 20

# What helper threads know of an image. image: its MAPPED_IMAGE, or 0; zeros: address of ZEROS_SIZE bytes of them
BACKING = np.dtype([(name, "<i8") for name in ("fd", "block_device", "image", "zeros")])


@compiled
def apply(backing, operation, ranges, count, vector):
    """Do this with each of `count` RANGE structs at `ranges`; 0, or the first -errno. `vector` is room for an IOVEC."""
    for index in range(count):
        result = apply_one(backing, operation, view(ranges + index * RANGE_SIZE, RANGE), view(vector, IOVEC))
        if result < 0:
            return result
    return 0


@compiled
def apply_one(backing, operation, piece, vector):
    if piece.length == 0:
        return 0
    if operation == ZERO:
        return zero(backing, piece, vector)
    if operation == DISCARD and not backing.block_device:
        return allocate(backing, FALLOC_FL_PUNCH_HOLE, piece)
    request = BLKSECDISCARD if operation == SECURE_ERASE else BLKDISCARD
    return ioctl(backing.fd, request, address_of(piece))


@compiled
def zero(backing, piece, vector):
    """By the first way that the storage knows: a hole where that is allowed, a range marked as zeros, zeros."""
    result = -EOPNOTSUPP
    if piece.unmap:
        result = allocate(backing, FALLOC_FL_PUNCH_HOLE, piece)
    if result == -EOPNOTSUPP:
        result = allocate(backing, FALLOC_FL_ZERO_RANGE, piece)
    return write_zeros(backing, piece, vector) if result == -EOPNOTSUPP else result


@compiled
def allocate(backing, mode, piece):
    """fallocate(2) that goes on after a signal; -EOPNOTSUPP where the file system does not know the mode."""
    while True:
        result = fallocate(backing.fd, mode | FALLOC_FL_KEEP_SIZE, piece.start, piece.length)
        if result != -EINTR:
            break
    if result == 0 and mode == FALLOC_FL_PUNCH_HOLE and backing.image:
        memory.mark_absent(view(backing.image, MAPPED_IMAGE), piece.start, piece.length)
    return -EOPNOTSUPP if result == -ENOSYS else result


@compiled
def write_zeros(backing, piece, vector):
    """Write what is left of the range, which shrinks meanwhile; 0 or -errno."""
    while piece.length > 0:
        vector.base = backing.zeros
        vector.len = min(piece.length, ZEROS_SIZE)
        if backing.image:
            image = view(backing.image, MAPPED_IMAGE)
            result = memory.transfer(image, WRITE, address_of(vector), 1, piece.start, vector.len)
        else:
            result = pwritev(backing.fd, address_of(vector), 1, piece.start)
        if result == -EINTR:
            continue
        if result <= 0:
            # Nothing at all, although something was asked for, is no success.
            return result if result < 0 else -EIO
        piece.start += result
        piece.length -= result
    return 0
