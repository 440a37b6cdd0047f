"""Request types of zoned disks (virtio 1.3, section 5.2.6): from the request to the block I/O, and back."""

from __future__ import annotations

from ringplane.block.io import (
    BLOCK_IO,
    ZONE_APPEND,
    ZONE_CLOSE,
    ZONE_FINISH,
    ZONE_OPEN,
    ZONE_REPORT,
    ZONE_RESET,
    ZONE_RESET_ALL,
)
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.dataplane.requests import check_io, prepare_write, writable_buffers
from ringplane.dataplane.state import DEVICE, PENDING, QUEUE, REQUEST, REQUEST_SECTOR, RequestTypes
from ringplane.native.access import view
from ringplane.native.buffers import copy_to
from ringplane.virtio.blk import (
    SECTOR,
    VIRTIO_BLK_F_ZONED,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_OUT,
)
from ringplane.virtio.blk_zones import (
    APPEND_SECTOR_SIZE,
    REPORT_SIZE,
    VIRTIO_BLK_T_ZONE_APPEND,
    VIRTIO_BLK_T_ZONE_CLOSE,
    VIRTIO_BLK_T_ZONE_FINISH,
    VIRTIO_BLK_T_ZONE_OPEN,
    VIRTIO_BLK_T_ZONE_REPORT,
    VIRTIO_BLK_T_ZONE_RESET,
    VIRTIO_BLK_T_ZONE_RESET_ALL,
)


@compiled
def is_inside(device, sector):
    return 0 <= sector < device.capacity


@unit
def begin_write(queue_address, request_address, io_address):
    """Like that of every disk, but a write that does not consist of whole blocks is left to the layer to refuse."""
    queue, request = view(queue_address, QUEUE), view(request_address, REQUEST)
    device, io = view(queue.device, DEVICE), view(io_address, BLOCK_IO)
    prepare_write(queue, request, io)
    if device.read_only:
        return VIRTIO_BLK_S_IOERR
    whole = not io.length & device.block_mask and not request.sector & (device.block_mask // SECTOR)
    if whole or not is_inside(device, request.sector):
        return check_io(device, request, io)
    request.length = io.length
    io.offset = request.sector * SECTOR
    return PENDING


@unit
def begin_append(queue_address, request_address, io_address):
    queue, request = view(queue_address, QUEUE), view(request_address, REQUEST)
    device, io = view(queue.device, DEVICE), view(io_address, BLOCK_IO)
    prepare_write(queue, request, io)
    request.length = io.length
    if device.read_only:
        return VIRTIO_BLK_S_IOERR
    if not queue.features & VIRTIO_BLK_F_ZONED:
        return VIRTIO_BLK_S_UNSUPP
    if request.writable_bytes < APPEND_SECTOR_SIZE or not is_inside(device, request.sector):
        return VIRTIO_BLK_S_IOERR
    io.operation = ZONE_APPEND
    io.offset = request.sector * SECTOR
    return PENDING


@unit
def end_append(_, request_address, io_address, status):
    """Write `append_sector`, which says where the appended data is, in front of the status."""
    request, io = view(request_address, REQUEST), view(io_address, BLOCK_IO)
    if status == VIRTIO_BLK_S_OK:
        request.sector = io.offset // SECTOR
        copy_to(writable_buffers(request), request_address + REQUEST_SECTOR, APPEND_SECTOR_SIZE)
        request.written = APPEND_SECTOR_SIZE
    return status


@unit
def begin_report(queue_address, request_address, io_address):
    queue, request = view(queue_address, QUEUE), view(request_address, REQUEST)
    device, io = view(queue.device, DEVICE), view(io_address, BLOCK_IO)
    if not queue.features & VIRTIO_BLK_F_ZONED:
        return VIRTIO_BLK_S_UNSUPP
    if not is_inside(device, request.sector) or request.writable_bytes < REPORT_SIZE:
        return VIRTIO_BLK_S_IOERR
    io.operation, io.offset, io.done = ZONE_REPORT, request.sector * SECTOR, 0
    io.iov, io.iov_count, io.length = writable_buffers(request), request.writable_count, request.writable_bytes
    return PENDING


@unit
def begin_command(queue_address, request_address, io_address):
    """Open, close, finish, reset."""
    queue, request = view(queue_address, QUEUE), view(request_address, REQUEST)
    device, io = view(queue.device, DEVICE), view(io_address, BLOCK_IO)
    if not queue.features & VIRTIO_BLK_F_ZONED:
        return VIRTIO_BLK_S_UNSUPP
    io.operation = operation_of(request.type)
    if device.read_only or (io.operation != ZONE_RESET_ALL and not is_inside(device, request.sector)):
        return VIRTIO_BLK_S_IOERR
    io.offset = 0 if io.operation == ZONE_RESET_ALL else request.sector * SECTOR
    io.length = io.done = 0
    io.ranges = request.ranges
    return PENDING


@compiled
def operation_of(number):
    if number == VIRTIO_BLK_T_ZONE_OPEN:
        return ZONE_OPEN
    if number == VIRTIO_BLK_T_ZONE_CLOSE:
        return ZONE_CLOSE
    if number == VIRTIO_BLK_T_ZONE_FINISH:
        return ZONE_FINISH
    return ZONE_RESET if number == VIRTIO_BLK_T_ZONE_RESET else ZONE_RESET_ALL


TYPES: RequestTypes = {
    VIRTIO_BLK_T_OUT: (begin_write, None),
    VIRTIO_BLK_T_ZONE_APPEND: (begin_append, end_append),
    VIRTIO_BLK_T_ZONE_REPORT: (begin_report, None),
    VIRTIO_BLK_T_ZONE_OPEN: (begin_command, None),
    VIRTIO_BLK_T_ZONE_CLOSE: (begin_command, None),
    VIRTIO_BLK_T_ZONE_FINISH: (begin_command, None),
    VIRTIO_BLK_T_ZONE_RESET: (begin_command, None),
    VIRTIO_BLK_T_ZONE_RESET_ALL: (begin_command, None),
}
