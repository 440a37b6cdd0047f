"""From a request to the engine: check the request against the device, then complete it at once or queue its I/O."""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.dataplane import zones
from ringplane.dataplane.fetch import copy_from_front, copy_to_front
from ringplane.dataplane.flush import flush
from ringplane.dataplane.helper_threads import send_to_helpers
from ringplane.dataplane.merge import hold, offset_in_image, queue_io
from ringplane.dataplane.state import (
    BOUNCE_SIZE,
    DEVICE,
    DEVICE_LIFETIME,
    DEVICE_SERIAL,
    KIND_DISCARD,
    KIND_FLUSH,
    KIND_OTHER,
    KIND_READ,
    KIND_WRITE,
    KIND_ZERO,
    MAX_RANGE_SECTORS,
    MAX_RANGES,
    PENDING,
    QUEUE,
    REQUEST,
    REQUEST_BOUNCE_IOV,
    REQUEST_SIZE,
)
from ringplane.engines import memory
from ringplane.engines.common import (
    DISCARD,
    IN_MEMORY,
    NOWHERE,
    READ,
    SECURE_ERASE,
    SYNC_ZONES,
    THROUGH_WORKER,
    WRITE,
    ZERO,
    complete,
)
from ringplane.engines.memory import MAPPED_IMAGE
from ringplane.engines.ranges import RANGE, RANGE_SIZE
from ringplane.engines.zones import ZONES
from ringplane.native.access import address_of, load64, store64, view
from ringplane.native.uio import IOVEC, IOVEC_SIZE
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
from ringplane.virtio.zoned import (
    VIRTIO_BLK_S_ZONE_UNALIGNED_WP,
    VIRTIO_BLK_T_ZONE_APPEND,
    VIRTIO_BLK_T_ZONE_REPORT,
    VIRTIO_BLK_T_ZONE_RESET_ALL,
)

TYPE_MASK = 0xFFFF_FFFF ^ VIRTIO_BLK_T_BARRIER


@compiled
def execute(worker, queue, request):
    """Start the request; returns its status if it is complete, else PENDING."""
    request.type = request.header_type & TYPE_MASK
    request.sector = request.header_sector
    request.done = 0
    request.operation = READ
    request.zone = 0
    if request.type == VIRTIO_BLK_T_IN:
        request.kind = KIND_READ
        request.iov = request.iovecs + request.readable_count * IOVEC_SIZE
        request.iov_count = request.writable_count
        request.length = request.writable_bytes
        return execute_io(worker, queue, request)
    if request.type == VIRTIO_BLK_T_OUT:
        request.kind = KIND_WRITE
        request.operation = WRITE
        request.length = request.readable_bytes
        return execute_io(worker, queue, request)
    if request.type == VIRTIO_BLK_T_ZONE_APPEND:
        request.kind, request.operation = KIND_WRITE, WRITE
        request.length = request.readable_bytes
        return execute_append(worker, queue, request)
    request.length = 0
    if request.type == VIRTIO_BLK_T_FLUSH:
        request.kind = KIND_FLUSH
        return execute_flush(worker, queue, request)
    if request.type == VIRTIO_BLK_T_DISCARD:
        request.kind, request.operation = KIND_DISCARD, DISCARD
        return execute_ranges(worker, queue, request, VIRTIO_BLK_F_DISCARD)
    if request.type == VIRTIO_BLK_T_WRITE_ZEROES:
        request.kind, request.operation = KIND_ZERO, ZERO
        return execute_ranges(worker, queue, request, VIRTIO_BLK_F_WRITE_ZEROES)
    request.kind = KIND_OTHER
    if request.type == VIRTIO_BLK_T_SECURE_ERASE:
        request.operation = SECURE_ERASE
        return execute_ranges(worker, queue, request, VIRTIO_BLK_F_SECURE_ERASE)
    if request.type == VIRTIO_BLK_T_GET_ID:
        return answer(request, queue.device + DEVICE_SERIAL, VIRTIO_BLK_ID_BYTES)
    if request.type == VIRTIO_BLK_T_GET_LIFETIME and queue.features & VIRTIO_BLK_F_LIFETIME:
        return answer(request, queue.device + DEVICE_LIFETIME, LIFETIME_SIZE)
    if VIRTIO_BLK_T_ZONE_REPORT <= request.type <= VIRTIO_BLK_T_ZONE_RESET_ALL and request.type % 2 == 0:
        return zones.execute_zones(worker, queue, request)
    return VIRTIO_BLK_S_UNSUPP


@compiled
def execute_io(worker, queue, request):
    device = view(queue.device, DEVICE)
    if request.operation == WRITE and device.read_only:
        return VIRTIO_BLK_S_IOERR
    if not is_in_range(device, request.sector, request.length):
        misaligned = device.zones and zones.is_misaligned_write(device, request)
        return VIRTIO_BLK_S_ZONE_UNALIGNED_WP if misaligned else VIRTIO_BLK_S_IOERR
    if request.length == 0:
        return VIRTIO_BLK_S_OK
    if device.zones:
        status = zones.start_io(queue, view(device.zones, ZONES), request)
        if status != PENDING:
            return status
    return start_io(worker, device, request)


@compiled
def execute_append(worker, queue, request):
    device = view(queue.device, DEVICE)
    if device.read_only:
        return VIRTIO_BLK_S_IOERR
    status = zones.start_append(queue, device, request)
    return start_io(worker, device, request) if status == PENDING else status


@compiled
def start_io(worker, device, request):
    if device.storage == THROUGH_WORKER and is_aligned(device, request.iov, request.iov_count):
        hold(worker, request)
    else:
        transfer(worker, request)
    return PENDING


@compiled
def is_in_range(device, sector, length):
    """Whether the range is whole logical blocks inside the disk. Sectors of 2^63 and more are negative here."""
    if length & device.block_mask or sector & (device.block_mask // SECTOR):
        return False
    # Compared in sectors: a number from the driver is not multiplied before it is known to be small.
    return 0 <= sector <= device.capacity and length // SECTOR <= device.capacity - sector


@compiled
def execute_flush(worker, queue, request):
    device = view(queue.device, DEVICE)
    if device.read_only:
        return VIRTIO_BLK_S_OK
    if device.flush_failed:
        return VIRTIO_BLK_S_IOERR
    if device.storage == NOWHERE:
        return VIRTIO_BLK_S_OK
    if device.zones:
        request.operation = SYNC_ZONES
        send_to_helpers(worker, request)
        return PENDING
    if device.storage == IN_MEMORY:
        # The data is in memory already, and there is no storage below it.
        return VIRTIO_BLK_S_OK
    flush(worker, queue, request)
    return PENDING


@compiled
def answer(request, source, size):
    """Copy `size` bytes to the driver's buffers, or as many as fit."""
    request.iov = request.iovecs + request.readable_count * IOVEC_SIZE
    request.iov_count = request.writable_count
    request.length = request.done = min(request.writable_bytes, size)
    copy_to_front(request, source, request.length)
    return VIRTIO_BLK_S_OK


@compiled
def execute_ranges(worker, queue, request, feature):
    """Discard, write zeroes, secure erase (section 5.2.6): all segments are checked before any is acted on."""
    if not queue.features & feature:
        return VIRTIO_BLK_S_UNSUPP
    size = request.readable_bytes
    if size == 0 or size % SEGMENT_SIZE:
        return VIRTIO_BLK_S_IOERR
    request.range_count = size // SEGMENT_SIZE
    if request.range_count > MAX_RANGES:
        return VIRTIO_BLK_S_UNSUPP
    copy_from_front(request, request.ranges, size)
    device = view(queue.device, DEVICE)
    # From the last to the first, in place: a RANGE is larger than the segment that it is made from.
    for index in range(request.range_count - 1, -1, -1):
        status = take_segment(device, request, index)
        if status != VIRTIO_BLK_S_OK:
            return status
    request.sector = view(request.ranges, RANGE).start // SECTOR
    if device.storage == NOWHERE:
        return VIRTIO_BLK_S_OK
    send_to_helpers(worker, request)
    return PENDING


@compiled
def take_segment(device, request, index):
    """Check one of the segments that were copied to `ranges`, and replace it with a RANGE."""
    segment = view(request.ranges + index * SEGMENT_SIZE, SEGMENT)
    sector, count, flags = segment.sector, segment.num_sectors, segment.flags
    if flags & ~SEGMENT_F_UNMAP or (flags and request.operation != ZERO):
        return VIRTIO_BLK_S_UNSUPP
    if count > MAX_RANGE_SECTORS or not is_in_range(device, sector, count * SECTOR):
        return VIRTIO_BLK_S_IOERR
    piece = view(request.ranges + index * RANGE_SIZE, RANGE)
    piece.start, piece.length, piece.unmap = sector * SECTOR, count * SECTOR, flags
    request.length += piece.length
    return VIRTIO_BLK_S_OK


@compiled
def transfer(worker, request):
    """Perform or queue the I/O for the rest of a read or write."""
    device = view(view(request.queue, QUEUE).device, DEVICE)
    if device.storage == THROUGH_WORKER:
        transfer_through_worker(worker, device, request)
    elif device.storage == IN_MEMORY:
        queue_copy(worker, request)
    else:
        complete(worker.engine, request.slot, request.length - request.done)


# Copies: the I/O of images in memory, queued until the end of the turn. In a large image most of a copy's time is the
# walk through the page tables. All copies of a turn are prefetched first, so that their walks run in parallel.


@compiled
def queue_copy(worker, request):
    request.next = -1
    if worker.copy_first < 0:
        worker.copy_first = request.slot
    else:
        view(worker.requests + worker.copy_last * REQUEST_SIZE, REQUEST).next = request.slot
    worker.copy_last = request.slot


@compiled
def do_copies(worker):
    """Perform all queued copies; they have ended when this returns."""
    slot = worker.copy_first
    while slot >= 0:
        request = view(worker.requests + slot * REQUEST_SIZE, REQUEST)
        memory.prefetch_pages(image_of(request), offset_in_image(request))
        slot = request.next
    slot = worker.copy_first
    worker.copy_first = -1
    while slot >= 0:
        request = view(worker.requests + slot * REQUEST_SIZE, REQUEST)
        image, offset, size = image_of(request), offset_in_image(request), request.length - request.done
        result = memory.transfer(image, request.operation, request.iov, request.iov_count, offset, size)
        complete(worker.engine, slot, result)
        if image.lost and not image.reported:
            image.reported = 1
            worker.attention = 1
        slot = request.next


@compiled
def image_of(request):
    return view(view(view(request.queue, QUEUE).device, DEVICE).image, MAPPED_IMAGE)


@compiled
def transfer_through_worker(worker, device, request):
    """Queue the I/O with the worker's engine, through a bounce buffer if O_DIRECT needs one."""
    iov, iov_count = request.iov, request.iov_count
    request.bounce_iov_len = 0
    if not is_aligned(device, iov, iov_count):
        if request.bounce == 0:
            if worker.bounce_free == 0:
                wait_for_bounce(worker, request)
                return
            take_bounce(worker, request)
        fill_bounce(request)
        iov, iov_count = address_of(request) + REQUEST_BOUNCE_IOV, 1
    queue_io(worker, request, iov, iov_count)


@compiled
def is_aligned(device, iov, iov_count):
    if device.memory_mask == 0 and device.segment_mask == 0:
        return True
    bases, lengths = 0, 0
    for index in range(iov_count):
        iovec = view(iov + index * IOVEC_SIZE, IOVEC)
        bases |= iovec.base
        lengths |= iovec.len
    return bases & device.memory_mask == 0 and lengths & device.segment_mask == 0


# Bounce buffers: aligned memory that a request with unaligned buffers borrows until it ends. The request transfers up
# to BOUNCE_SIZE at a time and continues as after a short read or write. Free bounce buffers form a list, each holding
# the address of the next; requests that find none wait in a first-in first-out list.


@compiled
def take_bounce(worker, request):
    request.bounce = worker.bounce_free
    worker.bounce_free = load64(request.bounce)


@compiled
def give_bounce(worker, request):
    """Return the request's bounce buffer, if it has one, and give it to the request that has waited longest."""
    if request.bounce == 0:
        return
    store64(request.bounce, worker.bounce_free)
    worker.bounce_free = request.bounce
    request.bounce = 0
    if worker.waiting_first >= 0:
        waiter = view(worker.requests + worker.waiting_first * REQUEST_SIZE, REQUEST)
        worker.waiting_first = waiter.next
        transfer(worker, waiter)


@compiled
def wait_for_bounce(worker, request):
    request.next = -1
    if worker.waiting_first < 0:
        worker.waiting_first = request.slot
    else:
        last = view(worker.requests + worker.waiting_last * REQUEST_SIZE, REQUEST)
        last.next = request.slot
    worker.waiting_last = request.slot


@compiled
def fill_bounce(request):
    request.bounce_iov_base = request.bounce
    request.bounce_iov_len = min(BOUNCE_SIZE, request.length - request.done)
    if request.operation == WRITE:
        copy_from_front(request, request.bounce, request.bounce_iov_len)
