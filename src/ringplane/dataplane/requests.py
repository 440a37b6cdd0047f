"""From a request to a block I/O: the request is checked against the device, then completed at once or passed on.

`begin` and `begin_other` are the list of all request types that every disk has. Types that only some disks have are
units of their own, in the device's table of REQUEST_TYPE structs (state.py).
"""

from __future__ import annotations

from ringplane.block.io import BLOCK_IO, DISCARD, FLUSH, FUA, READ, REPEATED, SECURE_ERASE, WRITE, ZERO
from ringplane.block.ranges import RANGE, RANGE_SIZE
from ringplane.block.route import submit
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import call, unit
from ringplane.dataplane.state import (
    DEVICE,
    DEVICE_LIFETIME,
    DEVICE_SERIAL,
    KIND_DISCARD,
    KIND_FLUSH,
    KIND_OTHER,
    KIND_READ,
    KIND_WRITE,
    KIND_ZERO,
    MAX_IOVECS,
    MAX_RANGE_SECTORS,
    MAX_RANGES,
    PENDING,
    QUEUE,
    REQUEST,
    REQUEST_TYPE,
    REQUEST_TYPE_SIZE,
    REQUEST_TYPES,
)
from ringplane.native.access import address_of, view
from ringplane.native.buffers import copy_from, copy_to
from ringplane.native.uio import IOVEC_SIZE
from ringplane.virtio.blk import (
    LIFETIME_SIZE,
    SECTOR,
    SEGMENT,
    SEGMENT_F_UNMAP,
    SEGMENT_SIZE,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_LIFETIME,
    VIRTIO_BLK_F_SECURE_ERASE,
    VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_BARRIER,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_GET_LIFETIME,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_SECURE_ERASE,
    VIRTIO_BLK_T_WRITE_ZEROES,
)

TYPE_MASK = 0xFFFF_FFFF ^ VIRTIO_BLK_T_BARRIER


@compiled
def execute(worker, channel, queue, request, io):
    """Begin the request: its status if it is complete already, else PENDING."""
    device = view(queue.device, DEVICE)
    request.type = request.header_type & TYPE_MASK
    request.sector = request.header_sector
    request.length = request.done = request.written = request.end = 0
    io.stack = queue.stack
    io.queue = queue.number
    io.flags = 0
    special = find_special(device, request)
    status = (
        call(special, address_of(queue), address_of(request), address_of(io))
        if special
        else begin(worker, queue, device, request, io)
    )
    if status == PENDING:
        submit(channel, io)
    return status


@compiled
def find_special(device, request):
    """The unit that begins requests of this type if only some disks have them, or 0."""
    if device.request_types == 0 or request.type >= REQUEST_TYPES:
        return 0
    entry = view(device.request_types + request.type * REQUEST_TYPE_SIZE, REQUEST_TYPE)
    request.kind = KIND_OTHER
    request.end = entry.end
    return entry.begin


@compiled
def begin(worker, queue, device, request, io):
    """Check the request and fill in its block I/O: PENDING, or the status of a request that is complete."""
    if request.type == VIRTIO_BLK_T_IN:
        prepare_read(request, io)
        return check_io(device, request, io)
    if request.type == VIRTIO_BLK_T_OUT:
        prepare_write(queue, request, io)
        return VIRTIO_BLK_S_IOERR if device.read_only else check_io(device, request, io)
    if request.type == VIRTIO_BLK_T_FLUSH:
        request.kind, io.operation = KIND_FLUSH, FLUSH
        io.offset = io.length = 0
        return VIRTIO_BLK_S_OK if device.read_only else PENDING
    return call(worker.begin_other, address_of(queue), address_of(request), address_of(io))


@unit
def begin_other(queue_address, request_address, io_address):
    """`begin` for the types that are rare: a unit, so that they are not compiled into the loop."""
    queue, request = view(queue_address, QUEUE), view(request_address, REQUEST)
    device, io = view(queue.device, DEVICE), view(io_address, BLOCK_IO)
    if request.type == VIRTIO_BLK_T_DISCARD:
        request.kind, io.operation = KIND_DISCARD, DISCARD
        return check_ranges(queue, device, request, io, VIRTIO_BLK_F_DISCARD)
    if request.type == VIRTIO_BLK_T_WRITE_ZEROES:
        request.kind, io.operation = KIND_ZERO, ZERO
        return check_ranges(queue, device, request, io, VIRTIO_BLK_F_WRITE_ZEROES)
    request.kind = KIND_OTHER
    if request.type == VIRTIO_BLK_T_SECURE_ERASE:
        io.operation = SECURE_ERASE
        return check_ranges(queue, device, request, io, VIRTIO_BLK_F_SECURE_ERASE)
    if request.type == VIRTIO_BLK_T_GET_ID:
        return reply(request, queue.device + DEVICE_SERIAL, VIRTIO_BLK_ID_BYTES)
    if request.type == VIRTIO_BLK_T_GET_LIFETIME and queue.features & VIRTIO_BLK_F_LIFETIME:
        return reply(request, queue.device + DEVICE_LIFETIME, LIFETIME_SIZE)
    return VIRTIO_BLK_S_UNSUPP


# Reads and writes. Fetch has left the device-readable buffers, without the header, in `io.iov`.


@compiled
def writable_buffers(request):
    """The address of the first IOVEC of the device-writable buffers."""
    return request.iovecs + request.readable_count * IOVEC_SIZE


@compiled
def end_of_iovecs(request):
    return request.iovecs + MAX_IOVECS * IOVEC_SIZE


@compiled
def prepare_read(request, io):
    request.kind, io.operation = KIND_READ, READ
    io.iov, io.iov_count = writable_buffers(request), request.writable_count
    io.iov_room = end_of_iovecs(request)
    io.length = request.writable_bytes


@compiled
def prepare_write(queue, request, io):
    request.kind, io.operation = KIND_WRITE, WRITE
    # Behind the data there may be the device-writable buffers.
    io.iov_room = writable_buffers(request) if request.writable_count else end_of_iovecs(request)
    io.length = request.readable_bytes
    io.flags = write_flags(queue)


@compiled
def write_flags(queue):
    """The flags of an I/O that changes the disk."""
    return (FUA if queue.write_through else 0) | (REPEATED if queue.resubmits else 0)


@compiled
def check_io(device, request, io):
    request.length = io.length
    if not is_in_range(device, request.sector, io.length):
        return VIRTIO_BLK_S_IOERR
    io.offset = request.sector * SECTOR
    return PENDING if io.length else VIRTIO_BLK_S_OK


@compiled
def is_in_range(device, sector, length):
    """Whether the range is whole logical blocks inside the disk. Sectors of 2^63 and more are negative here."""
    if length & device.block_mask or sector & (device.block_mask // SECTOR):
        return False
    # Compared in sectors: a number from the driver is not multiplied before it is known to be small.
    return 0 <= sector <= device.capacity and length // SECTOR <= device.capacity - sector


@compiled
def reply(request, source, size):
    """Copy `size` bytes to the driver's buffers, or as many as fit."""
    request.length = request.done = request.written = min(request.writable_bytes, size)
    copy_to(writable_buffers(request), source, request.length)
    return VIRTIO_BLK_S_OK


# Discard, write zeroes, secure erase (section 5.2.6).


@compiled
def check_ranges(queue, device, request, io, feature):
    """All segments are checked before any is acted on."""
    if not queue.features & feature:
        return VIRTIO_BLK_S_UNSUPP
    size = request.readable_bytes
    if size == 0 or size % SEGMENT_SIZE:
        return VIRTIO_BLK_S_IOERR
    io.ranges, io.range_count = request.ranges, size // SEGMENT_SIZE
    if io.range_count > MAX_RANGES:
        return VIRTIO_BLK_S_UNSUPP
    copy_from(io.iov, io.ranges, size)
    io.length = 0
    # From the last to the first, in place: a RANGE is larger than the segment that it is made from.
    for index in range(io.range_count - 1, -1, -1):
        status = take_segment(device, io, index)
        if status != VIRTIO_BLK_S_OK:
            return status
    request.length = io.length
    io.offset = view(io.ranges, RANGE).start
    request.sector = io.offset // SECTOR
    io.flags = write_flags(queue)
    return PENDING


@compiled
def take_segment(device, io, index):
    """Check one of the segments that were copied to `ranges`, and replace it with a RANGE."""
    segment = view(io.ranges + index * SEGMENT_SIZE, SEGMENT)
    sector, count, flags = segment.sector, segment.num_sectors, segment.flags
    if flags & ~SEGMENT_F_UNMAP or (flags and io.operation != ZERO):
        return VIRTIO_BLK_S_UNSUPP
    if count > MAX_RANGE_SECTORS or not is_in_range(device, sector, count * SECTOR):
        return VIRTIO_BLK_S_IOERR
    piece = view(io.ranges + index * RANGE_SIZE, RANGE)
    piece.start, piece.length, piece.unmap = sector * SECTOR, count * SECTOR, flags
    io.length += piece.length
    return VIRTIO_BLK_S_OK
