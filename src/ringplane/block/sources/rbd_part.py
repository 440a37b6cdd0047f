"""The compiled part of the source `rbd`: block I/Os become calls of librbd, whose threads report when they have ended.

All I/O threads of a disk use one open image, because only one can own the image's exclusive lock. So librbd's own event
queue, which belongs to the image, is not used: a callback of each I/O puts it into a list of the I/O thread that began
it (the part), and writes to the eventfd of this thread if the list was empty. The callback is a unit: it needs neither
Python nor the GIL.

Facts of librbd that this file depends on:
- With rbd_non_blocking_aio (rbd_cluster.py sets it) the functions below never wait: they pass the I/O to a thread of
  the library. A completion belongs to its creator, and can be released in its callback. If the function fails, there is
  no callback.
- What is read is copied into the iovecs when all of it has arrived, and what is written is copied before the function
  returns. So the list of iovecs has to stay where it is, and a guest that changes its buffers meanwhile does no harm.
- The results are 32 bits, but for that of a completion, which may be any number of an OSD. A read can end with fewer
  bytes; the rest is zeros.
- rbd_close(3) returns when all callbacks have returned.
"""

from __future__ import annotations

import ctypes
import functools
import os
from errno import EINTR, EIO, EOPNOTSUPP, ESHUTDOWN, ETIMEDOUT
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ringplane.block.events import Event
from ringplane.block.flushes import Flushes
from ringplane.block.io import (
    CHANNEL,
    DISCARD,
    ENDS_EARLY,
    FLUSH,
    FUA,
    READ,
    REFUSED,
    WRITE,
    ZERO,
    bytes_left,
    io_at,
    iovecs_left,
)
from ringplane.block.ranges import RANGE, RANGE_SIZE
from ringplane.block.sources.service import ServiceTimes, count_begin, count_end
from ringplane.block.stack import STACK, SourcePart
from ringplane.compiler.interpreted import INTERPRETED
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import call, unit
from ringplane.engines.common import complete
from ringplane.native.access import address_of, clear, compare_and_swap, load64, view
from ringplane.native.structs import new, struct
from ringplane.native.syscalls import monotonic_ns, write
from ringplane.native.uio import IOVEC, IOVEC_SIZE
from ringplane.virtio.blk import VIRTIO_BLK_S_IOERR

if TYPE_CHECKING:
    from ringplane.block.sources.rbd_library import Library

# librbd copies what is written, so this limits the memory that large requests take; what is longer follows in pieces.
LARGEST_PIECE = 4 << 20

# enum of rbd_write_zeroes(3)
RBD_WRITE_ZEROES_FLAG_THICK_PROVISION = 1

# The functions of librbd that are called here.
FUNCTIONS = (
    *("rbd_aio_create_completion", "rbd_aio_release", "rbd_aio_get_return_value"),
    *("rbd_aio_readv", "rbd_aio_writev", "rbd_aio_flush", "rbd_aio_discard", "rbd_aio_write_zeroes"),
)

# An open image, for all I/O threads. `ended`: the address of the callback. The others are never cleared.
RBD_IMAGE = struct(
    "image",
    *FUNCTIONS,
    "ended",
    "flush_failed",  # earlier writes may be lost
    "blocklisted",  # the cluster accepts nothing from us any more
    "timed_out",  # a request was given up (rados_osd_op_timeout)
)

# What one I/O thread has of it. `done`: the OPERATION structs that have ended, the last one first, 0: none.
# `times`: SERVICE_TIME structs (service.py).
RBD_PART = struct("rbd_image", "operations", "event_fd", "one = 1", "done", "times")
DONE: int = RBD_PART.fields["done"][1]  # type: ignore[index]
ONE: int = RBD_PART.fields["one"][1]  # type: ignore[index]

# The call of librbd that is made for the block I/O of a slot: one at a time.
OPERATION = struct(
    "part",
    "slot",
    "next",
    "result",
    "completion",
    "size",  # bytes to be read or written
    "index",  # of the range
    "flushing",  # this is the flush after a write that has to be stable
    "began",  # nanoseconds, CLOCK_MONOTONIC: when the call was made, and when its callback came
    "called_back",
    "iov_base",  # one IOVEC, for a piece of a large one
    "iov_len",
)
OPERATION_SIZE = OPERATION.itemsize
COMPLETION_FIELD: int = OPERATION.fields["completion"][1]  # type: ignore[index]
PIECE_IOV: int = OPERATION.fields["iov_base"][1]  # type: ignore[index]


@unit
def submit(stack_address, channel_address, first):
    """Begin the I/Os of a turn, a list that begins with slot `first`."""
    channel = view(channel_address, CHANNEL)
    part = view(view(stack_address, STACK).source, RBD_PART)
    slot = first
    while slot >= 0:
        io = io_at(channel, slot)
        slot = io.next
        operation = view(part.operations + io.slot * OPERATION_SIZE, OPERATION)
        operation.index = operation.flushing = 0
        if io.operation == FLUSH and view(part.rbd_image, RBD_IMAGE).flush_failed:
            # It was logged when it happened.
            complete(channel.engine, io.slot, REFUSED - VIRTIO_BLK_S_IOERR)
        elif io.operation <= FLUSH:
            begin(channel, part, operation, io)
        else:
            begin_range(channel, part, operation, io)
    return 0


@compiled
def begin_range(channel, part, operation, io):
    """Make the call for the next range that is not empty; if there is none, the I/O ends."""
    while operation.index < io.range_count and view(io.ranges + operation.index * RANGE_SIZE, RANGE).length == 0:
        operation.index += 1
    if operation.index < io.range_count:
        begin(channel, part, operation, io)
    else:
        make_stable(channel, part, operation, io)


@compiled
def make_stable(channel, part, operation, io):
    """The I/O has changed the disk: it ends, or a flush begins if it has to be stable then."""
    if io.flags & FUA and not operation.flushing:
        operation.flushing = 1
        begin(channel, part, operation, io)
    else:
        end(channel, operation, io)


@compiled
def begin(channel, part, operation, io):
    """Make the next call for this I/O; if it fails, the I/O ends."""
    image = view(part.rbd_image, RBD_IMAGE)
    completion_address = address_of(operation) + COMPLETION_FIELD
    result = int32(call(image.rbd_aio_create_completion, address_of(operation), image.ended, completion_address))
    if result >= 0:
        operation.began = monotonic_ns()
        result = int32(make_call(image, operation, io))
        if result < 0:
            call(image.rbd_aio_release, operation.completion)
    if result < 0:
        fail(channel, part, io, result)
    else:
        count_begin(part.times, FLUSH if operation.flushing else io.operation)


@compiled
def make_call(image, operation, io):
    if operation.flushing or io.operation == FLUSH:
        return call(image.rbd_aio_flush, image.image, operation.completion)
    if io.operation == READ:
        return transfer(image.rbd_aio_readv, image.image, operation, io)
    if io.operation == WRITE:
        return transfer(image.rbd_aio_writev, image.image, operation, io)
    piece = view(io.ranges + operation.index * RANGE_SIZE, RANGE)
    if io.operation == DISCARD:
        return call(image.rbd_aio_discard, image.image, piece.start, piece.length, operation.completion)
    if io.operation == ZERO:
        flags = 0 if piece.unmap else RBD_WRITE_ZEROES_FLAG_THICK_PROVISION
        return call(image.rbd_aio_write_zeroes, image.image, piece.start, piece.length, operation.completion, flags, 0)
    return -EOPNOTSUPP


@compiled
def transfer(function, image, operation, io):
    """Read or write the rest of the I/O, or its first LARGEST_PIECE bytes."""
    iov, count, size = io.iov, iovecs_left(io), bytes_left(io)
    if size > LARGEST_PIECE:
        iov, count, size = first_piece(operation, io)
    operation.size = size
    return call(function, image, iov, count, io.offset + io.done, operation.completion)


@compiled
def first_piece(operation, io):
    """The IOVEC structs of a part of the rest: their address, number, and bytes."""
    first = view(io.iov, IOVEC)
    if first.len > LARGEST_PIECE:
        operation.iov_base, operation.iov_len = first.base, LARGEST_PIECE
        return address_of(operation) + PIECE_IOV, 1, LARGEST_PIECE
    count, size = 0, 0
    while count < io.iov_count:
        length = view(io.iov + count * IOVEC_SIZE, IOVEC).len
        if size + length > LARGEST_PIECE:
            break
        size += length
        count += 1
    return io.iov, count, size


@compiled
def int32(result):
    """A result of 32 bits, whose upper half is undefined."""
    low = result & 0xFFFF_FFFF
    return low - 0x1_0000_0000 if low & 0x8000_0000 else low


@unit
def ended(completion, operation_address):
    """The callback, on a thread of librbd: put the operation into the list of its part."""
    operation = view(operation_address, OPERATION)
    part = view(operation.part, RBD_PART)
    image = view(part.rbd_image, RBD_IMAGE)
    operation.called_back = monotonic_ns()
    operation.result = call(image.rbd_aio_get_return_value, completion)
    call(image.rbd_aio_release, completion)
    # When the operation is in the list, the I/O thread can end everything.
    event_fd, one, place = part.event_fd, address_of(part) + ONE, address_of(part) + DONE
    before = load64(place)
    while True:
        operation.next = before
        # Pairs with that of `take_all`: the result and the link are visible to who takes the list.
        found = compare_and_swap(place, before, operation_address)
        if found == before:
            break
        before = found
    if before == 0:
        write(event_fd, one, 8)
    return 0


@compiled
def take_all(part):
    """The list of what has ended, which is empty then."""
    place = address_of(part) + DONE
    first = load64(place)
    while first:
        found = compare_and_swap(place, first, 0)
        if found == first:
            break
        first = found
    return first


@unit
def ready(part_address, channel_address):
    """The eventfd is readable: continue or end the I/Os that librbd has reported."""
    part, channel = view(part_address, RBD_PART), view(channel_address, CHANNEL)
    address = take_all(part)
    while address:
        operation = view(address, OPERATION)
        address = operation.next
        proceed(channel, part, operation, io_at(channel, operation.slot))
    return 0


@compiled
def proceed(channel, part, operation, io):
    """A call has ended."""
    is_flush = operation.flushing or io.operation == FLUSH
    count_end(part.times, FLUSH if is_flush else io.operation, operation.called_back - operation.began)
    if operation.result < 0:
        fail(channel, part, io, operation.result)
    elif is_flush and view(part.rbd_image, RBD_IMAGE).flush_failed:
        # Another one has failed meanwhile: what both were for may be lost.
        fail(channel, part, io, -EIO)
    elif is_flush:
        end(channel, operation, io)
    elif io.operation == READ:
        clear_rest(io, operation.result, operation.size)
        end(channel, operation, io)
    elif io.operation == WRITE:
        make_stable(channel, part, operation, io)
    else:
        operation.index += 1
        begin_range(channel, part, operation, io)


@compiled
def end(channel, operation, io):
    complete(channel.engine, io.slot, operation.size if io.operation <= WRITE else 0)


@compiled
def fail(channel, part, io, result):
    image = view(part.rbd_image, RBD_IMAGE)
    if io.operation == FLUSH or view(part.operations + io.slot * OPERATION_SIZE, OPERATION).flushing:
        image.flush_failed = 1
    if result == -ETIMEDOUT:
        image.timed_out = channel.attention = 1
    if result == -EINTR or result <= ENDS_EARLY:
        # An OSD can answer with any number; these would have a meaning of ours (block/io.py).
        result = -EIO
    if result == -ESHUTDOWN:
        image.blocklisted = channel.attention = 1
        # One line in the log is enough.
        result = REFUSED - VIRTIO_BLK_S_IOERR
    complete(channel.engine, io.slot, result)


@compiled
def clear_rest(io, start, end):
    """Fill the bytes from `start` to `end` of the I/O's buffers with zeros."""
    if start >= end:
        return
    iov = io.iov
    while end > 0:
        iovec = view(iov, IOVEC)
        size = min(iovec.len, end)
        if start < size:
            skipped = max(start, 0)
            clear(iovec.base + skipped, size - skipped)
        start -= size
        end -= size
        iov += IOVEC_SIZE


@functools.cache
def callback() -> int:
    """The address of `ended` for C."""
    if not INTERPRETED:
        return ended.address()
    kept = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(ended)
    _kept.append(kept)
    return ctypes.cast(kept, ctypes.c_void_p).value or 0


_kept: list[object] = []


class OpenImage:
    """Owns an RBD_IMAGE: an open image as compiled code sees it."""

    def __init__(self, library: Library, image: int) -> None:
        self._record: npt.NDArray[np.void] = new(RBD_IMAGE)
        self.address = int(self._record.ctypes.data)
        record = self._record[0]
        record["image"], record["ended"] = image, callback()
        self.flushes = Flushes(self._record)
        for name in FUNCTIONS:
            record[name] = library.address(name)

    @property
    def blocklisted(self) -> bool:
        return bool(self._record["blocklisted"][0])

    @property
    def timed_out(self) -> bool:
        return bool(self._record["timed_out"][0])


class RbdPart(SourcePart):
    """The part of the source for one I/O thread."""

    merges = True
    ranges = backing = 0

    def __init__(self, image: OpenImage, warnings: Warnings, slots: int) -> None:
        """`slots`: of the I/O thread."""
        self._image, self._warnings = image, warnings
        self._record: npt.NDArray[np.void] = new(RBD_PART)
        self.address, self.submit = int(self._record.ctypes.data), submit.address()
        self._operations: npt.NDArray[np.void] = new(OPERATION, slots)
        self._operations["part"], self._operations["slot"] = self.address, np.arange(slots)
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        record = self._record[0]
        record["rbd_image"], record["event_fd"] = image.address, self._event_fd
        record["operations"] = self._operations.ctypes.data
        self.times = ServiceTimes()
        record["times"] = self.times.address
        self.events = (Event(self._event_fd, ready.address(), self.address),)

    def warning(self) -> str:
        return self._warnings.take(self._image)

    def close(self) -> None:
        """When the image is closed."""
        os.close(self._event_fd)


BLOCKLISTED = (
    "the cluster has blocklisted this client, because another one has taken over the image or an operator wanted it; "
    "all I/O fails from now on, and only a restart opens the image again"
)
TIMED_OUT = (
    "requests have timed out (rados_osd_op_timeout) and failed; a write that has timed out may still be done later"
)


class Warnings:
    """What the log has to say of an image, each line once."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def take(self, image: OpenImage) -> str:
        """The next line; empty: there is none."""
        for holds, line in ((image.blocklisted, BLOCKLISTED), (image.timed_out, TIMED_OUT)):
            if holds and line not in self._given:
                self._given.add(line)
                return line
        return ""
