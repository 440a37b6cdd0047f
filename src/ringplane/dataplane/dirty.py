"""The dirty log of a live migration: one bit for each page of guest memory that the device has written.

Source: QEMU's docs/interop/vhost-user.rst, section "Migration". A page is marked after it is written. If it were marked
before, QEMU could copy it in between, and the destination would miss the write. The guest addresses of a request's
buffers are recorded when it is fetched, because the memory table may have been replaced when it ends.

All of it is in units, because it is rare: only while a guest is migrated.
"""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.dataplane.state import QUEUE, REQUEST
from ringplane.guest_memory.regions import REGION, REGION_SIZE
from ringplane.native.access import atomic_or8, view
from ringplane.native.uio import IOVEC, IOVEC_SIZE
from ringplane.virtio.packed import EVENT_SIZE
from ringplane.virtio.split import DESC_SIZE, USED_ELEM_SIZE, USED_RING

# VHOST_LOG_PAGE
PAGE_BITS = 12


@unit
def record_buffers(queue_address, request_address):
    """Record the buffers that the device may write, and the status byte, before the request begins."""
    queue, request = view(queue_address, QUEUE), view(request_address, REQUEST)
    for index in range(request.writable_count):
        iovec = view(request.iovecs + (request.readable_count + index) * IOVEC_SIZE, IOVEC)
        entry = view(request.log_iovecs + index * IOVEC_SIZE, IOVEC)
        entry.base = guest_address(queue, iovec.base)
        entry.len = iovec.len
    request.log_iovec_count = request.writable_count
    request.log_status = guest_address(queue, request.status_address)
    return 0


@compiled
def guest_address(queue, host):
    """The guest address of our address `host`, which was translated with the queue's table; -1 if there is none."""
    for index in range(queue.region_count):
        region = view(queue.regions + index * REGION_SIZE, REGION)
        if region.host <= host < region.host + region.size:
            return region.guest + host - region.host
    return -1


@unit
def mark_request(queue_address, request_address):
    """Mark all that the request may have written."""
    queue, request = view(queue_address, QUEUE), view(request_address, REQUEST)
    for index in range(request.log_iovec_count):
        entry = view(request.log_iovecs + index * IOVEC_SIZE, IOVEC)
        mark(queue, entry.base, entry.len)
    mark(queue, request.log_status, 1)
    return 0


@unit
def mark_ring(queue_address):
    """Mark what the device writes of a ring: used elements, and whether it wants kicks.

    All of it, not only what has just changed: a ring has few pages.
    """
    queue = view(queue_address, QUEUE)
    if queue.packed:
        mark(queue, guest_address(queue, queue.desc), queue.size * DESC_SIZE)
        mark(queue, guest_address(queue, queue.used), EVENT_SIZE)
    else:
        mark(queue, guest_address(queue, queue.used), USED_RING + queue.size * USED_ELEM_SIZE + 2)
    return 0


@compiled
def mark(queue, guest, size):
    """Set the bits of the pages of these bytes. Atomic: the front end and other queues change other bits meanwhile."""
    if guest < 0:
        return
    for page in range(guest >> PAGE_BITS, ((guest + size - 1) >> PAGE_BITS) + 1):
        if page >> 3 < queue.log_size:
            atomic_or8(queue.log + (page >> 3), 1 << (page & 7))
