"""Block I/Os as requests to the server: what an I/O needs next, and its end."""

from __future__ import annotations

from errno import EIO, EOPNOTSUPP

from ringplane.block.io import BLOCK_IO, DISCARD, FLUSH, FUA, READ, REFUSED, WRITE, ZERO, bytes_left
from ringplane.block.ranges import RANGE, RANGE_SIZE, ZEROS_SIZE, is_final
from ringplane.block.sources.nbd.layout import EVENTFD_SIZE, EXPORT, FREE, ONE, QUEUED, ZEROS_IOV, request_at
from ringplane.block.sources.nbd.protocol import (
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    REQUEST_MAGIC,
)
from ringplane.block.sources.service import count_begin, count_end
from ringplane.compiler.jit import compiled
from ringplane.engines.common import complete
from ringplane.native.access import address_of, view
from ringplane.native.byte_order import swap64
from ringplane.native.syscalls import write
from ringplane.virtio.blk import VIRTIO_BLK_S_IOERR

# A trim or write of zeros is for at most this many bytes: it has no payload, but a length of 32 bits.
LARGEST_RANGE = 1 << 30

GENERATIONS = (1 << 31) - 1


@compiled
def begin(link, channel, io):
    """Begin an I/O: its first request is queued, or it ends at once."""
    request = request_at(link, io.slot)
    request.io = address_of(io)
    request.range = request.within = request.flushing = request.writing_zeros = request.result = 0
    proceed(link, channel, request, io)


@compiled
def proceed(link, channel, request, io):
    """Queue the next request of an I/O, or end it."""
    export = view(link.export, EXPORT)
    if io.operation == READ or io.operation == WRITE:
        request.result = length = min(bytes_left(io), export.largest)
        command = CMD_READ if io.operation == READ else CMD_WRITE
        queue(link, request, command, fua_flag(export, io), io.offset + io.done, length)
        request.iov = request.at = io.iov
    elif io.operation == FLUSH:
        start_flush(link, channel, export, request, io)
    elif io.operation == ZERO or (io.operation == DISCARD and export.flags & FLAG_SEND_TRIM):
        if not start_range(link, export, request, io):
            end_writes(link, channel, export, request, io)
    else:
        end(channel, request, io, -EOPNOTSUPP)


@compiled
def fua_flag(export, io):
    return CMD_FLAG_FUA if io.operation != READ and io.flags & FUA and export.flags & FLAG_SEND_FUA else 0


@compiled
def start_flush(link, channel, export, request, io):
    if export.flush_failed:
        # It was logged when it happened.
        end(channel, request, io, REFUSED - VIRTIO_BLK_S_IOERR)
    elif export.flags & FLAG_SEND_FLUSH:
        queue(link, request, CMD_FLUSH, 0, 0, 0)
    else:
        end(channel, request, io, request.result)


@compiled
def start_range(link, export, request, io):
    """Queue a request for the next part of the ranges; False if there is none."""
    while request.range < io.range_count:
        piece = view(io.ranges + request.range * RANGE_SIZE, RANGE)
        left = piece.length - request.within
        if left > 0:
            start_piece(link, export, request, io, piece, left)
            return True
        request.range += 1
        request.within = 0
    return False


@compiled
def start_piece(link, export, request, io, piece, left):
    offset, flags = piece.start + request.within, fua_flag(export, io)
    if io.operation == DISCARD:
        queue(link, request, CMD_TRIM, flags, offset, min(left, LARGEST_RANGE))
    elif export.flags & FLAG_SEND_WRITE_ZEROES and not request.writing_zeros:
        flags |= 0 if piece.unmap else CMD_FLAG_NO_HOLE
        queue(link, request, CMD_WRITE_ZEROES, flags, offset, min(left, LARGEST_RANGE))
    else:
        length = min(min(left, ZEROS_SIZE), export.largest)
        queue(link, request, CMD_WRITE, flags, offset, length)
        request.zeros_iov_base, request.zeros_iov_len = export.zeros, length
        request.iov = request.at = address_of(request) + ZEROS_IOV


@compiled
def end_writes(link, channel, export, request, io):
    """Everything was written: if it must be stable, and the server did not take the flag for that, flush."""
    if io.flags & FUA and not export.flags & FLAG_SEND_FUA and not request.flushing:
        request.flushing = 1
        start_flush(link, channel, export, request, io)
    else:
        end(channel, request, io, request.result)


@compiled
def end(channel, request, io, result):
    request.state = FREE
    complete(channel.engine, io.slot, result)


@compiled
def queue(link, request, command, flags, offset, length):
    """Queue a request."""
    request.losses = 0
    request.began = link.now
    count_begin(link.times, operation_of(command))
    request.command, request.offset, request.length = command, offset, length
    request.payload = length if command == CMD_WRITE else 0
    request.header = swap64(REQUEST_MAGIC << 32 | flags << 16 | command)
    request.header_offset = swap64(offset)
    request.header_length = swap64(length << 32)
    put(link, request)


@compiled
def put(link, request):
    """Append a request to those that wait to be sent, or to be sent again."""
    link.generation = (link.generation + 1) & GENERATIONS
    request.cookie = link.generation << 32 | request.slot
    request.announced = request.moment = request.position = request.skip = request.error = request.errors = 0
    request.at = request.iov
    request.state = QUEUED
    request.next = -1
    if link.first < 0:
        link.first = request.slot
    else:
        request_at(link, link.last).next = request.slot
    link.last = request.slot


@compiled
def operation_of(command):
    """What a command does, as a number of block/io.py: reads and writes have the same one there."""
    if command == CMD_FLUSH:
        return FLUSH
    if command == CMD_TRIM:
        return DISCARD
    return ZERO if command == CMD_WRITE_ZEROES else command


@compiled
def take_back(link, request):
    """The server has a request no more."""
    request.state = FREE
    count_end(link.times, operation_of(request.command), link.now - request.began)


@compiled
def succeed(link, channel, request):
    """The server has done a request."""
    link.unanswered -= 1
    if request.command == CMD_FLUSH and view(link.export, EXPORT).flush_failed:
        # Another one has failed meanwhile, and a server reports lost writes only once.
        fail(link, channel, request, EIO)
        return
    take_back(link, request)
    if request.io == 0:
        end_sync(link, 0)
        return
    io, export = view(request.io, BLOCK_IO), view(link.export, EXPORT)
    if io.operation == READ or io.operation == FLUSH:
        end(channel, request, io, request.result)
    elif io.operation == WRITE or request.flushing:
        end_writes(link, channel, export, request, io)
    else:
        request.within += request.length
        proceed(link, channel, request, io)


@compiled
def fail(link, channel, request, error):
    """The server, or the lack of one, has failed a request."""
    take_back(link, request)
    if request.io == 0:
        end_sync(link, -error)
    else:
        end(channel, request, view(request.io, BLOCK_IO), -error)


@compiled
def refuse(link, channel, request, error):
    """The server has replied an error."""
    link.unanswered -= 1
    export = view(link.export, EXPORT)
    if request.command == CMD_FLUSH:
        export.flush_failed = 1
    if request.command == CMD_WRITE_ZEROES:
        write_zeros(link, channel, request, export, error)
    else:
        fail(link, channel, request, error)


@compiled
def write_zeros(link, channel, request, export, error):
    """The server has not made zeros, whatever the reason: they are written, and an error of that is the guest's."""
    if is_final(-error):
        export.flags &= ~FLAG_SEND_WRITE_ZEROES
    take_back(link, request)
    request.writing_zeros = 1
    proceed(link, channel, request, view(request.io, BLOCK_IO))


@compiled
def begin_sync(link):
    """Queue the flush that the control plane wants. One that is under way may be too early for it."""
    request = request_at(link, link.slots)
    if not link.sync_wanted or request.state != FREE:
        return
    link.sync_wanted = 0
    if link.failing:
        end_sync(link, -EIO)
    elif view(link.export, EXPORT).flags & FLAG_SEND_FLUSH:
        queue(link, request, CMD_FLUSH, 0, 0, 0)
    else:
        end_sync(link, 0)


@compiled
def end_sync(link, result):
    if link.sync_wanted:
        return
    link.sync_result = result
    write(link.sync_fd, address_of(link) + ONE, EVENTFD_SIZE)


@compiled
def fail_all(link, channel):
    """End all I/Os: there is no connection, and they do not wait for one."""
    link.first = -1
    for slot in range(link.slots + 1):
        request = request_at(link, slot)
        if request.state != FREE:
            fail(link, channel, request, EIO)
