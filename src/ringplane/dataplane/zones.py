"""Zoned disks: how writes change their zones, and the requests about zones (virtio 1.3, section 5.2.6).

A zoned disk is divided into zones that must be written sequentially, each at its *write pointer*. Such a disk is served
by one worker, so nothing here needs a lock; engines/zones.py has the part of the helper threads. A write pointer
advances when a write is accepted, not when it has ended: the next write may come before that.
"""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.dataplane.fetch import consume, copy_to_front
from ringplane.dataplane.helper_threads import send_to_helpers
from ringplane.dataplane.state import DEVICE, PENDING, REQUEST_SECTOR
from ringplane.engines.common import READ, RESET_ZONES
from ringplane.engines.zones import ZONE, ZONES, zone_at
from ringplane.native.access import address_of, load64, store64, view
from ringplane.native.uio import IOVEC_SIZE
from ringplane.virtio.blk import (
    SECTOR,
    VIRTIO_BLK_F_ZONED,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
)
from ringplane.virtio.zoned import (
    APPEND_SECTOR_SIZE,
    DESCRIPTOR,
    DESCRIPTOR_SIZE,
    REPORT,
    REPORT_SIZE,
    VIRTIO_BLK_S_ZONE_ACTIVE_RESOURCE,
    VIRTIO_BLK_S_ZONE_INVALID_CMD,
    VIRTIO_BLK_S_ZONE_OPEN_RESOURCE,
    VIRTIO_BLK_S_ZONE_UNALIGNED_WP,
    VIRTIO_BLK_T_ZONE_APPEND,
    VIRTIO_BLK_T_ZONE_CLOSE,
    VIRTIO_BLK_T_ZONE_FINISH,
    VIRTIO_BLK_T_ZONE_OPEN,
    VIRTIO_BLK_T_ZONE_REPORT,
    VIRTIO_BLK_T_ZONE_RESET_ALL,
    VIRTIO_BLK_ZS_CLOSED,
    VIRTIO_BLK_ZS_EMPTY,
    VIRTIO_BLK_ZS_EOPEN,
    VIRTIO_BLK_ZS_FULL,
    VIRTIO_BLK_ZS_IOPEN,
    VIRTIO_BLK_ZS_NOT_WP,
    VIRTIO_BLK_ZT_CONV,
    VIRTIO_BLK_ZT_SWR,
)

# Reads and writes. They were checked: they are inside the disk and not empty.


@compiled
def start_io(queue, zones, request):
    """PENDING if the zone accepts this read or write, else the status with which it fails."""
    count = request.length // SECTOR
    first = request.sector // zones.size
    last = (request.sector + count - 1) // zones.size
    if last < zones.conventional:
        return PENDING
    if first != last:
        return VIRTIO_BLK_S_ZONE_INVALID_CMD
    zone = zone_at(zones, first)
    if request.operation == READ or is_repeated(queue, zone, request):
        return PENDING
    return start_write(zones, zone, request, count)


@compiled
def is_repeated(queue, zone, request):
    """Whether a resubmitted write lies below the write pointer: then it is written again at the same place.

    The previous process completed it, or a later one, but the driver does not know. Some of its data may be missing,
    because the pointer is where the last completed write ends. A resubmitted append is appended again: its driver
    cannot distinguish that from another append.
    """
    return queue.resubmits and end_of(zone, request) <= zone.pointer and not zone.reset_by


@compiled
def start_write(zones, zone, request, count):
    """Accept a write of `count` sectors to a sequential zone: advance the write pointer."""
    if zone.state == VIRTIO_BLK_ZS_FULL:
        return VIRTIO_BLK_S_ZONE_INVALID_CMD
    if request.sector != zone.start + zone.pointer:
        return VIRTIO_BLK_S_ZONE_UNALIGNED_WP
    if zone.reset_by or count > zones.capacity - zone.pointer:
        return VIRTIO_BLK_S_ZONE_INVALID_CMD
    status = open_zone(zones, zone, VIRTIO_BLK_ZS_IOPEN)
    if status != VIRTIO_BLK_S_OK:
        return status
    zone.pointer += count
    zone.writing += 1
    request.zone = address_of(zone)
    if zone.pointer == zones.capacity:
        set_state(zones, zone, VIRTIO_BLK_ZS_FULL)
    return PENDING


@compiled
def start_append(queue, device, request):
    """Set the sector to the write pointer; from then on the append is a write."""
    if not queue.features & VIRTIO_BLK_F_ZONED:
        return VIRTIO_BLK_S_UNSUPP
    zones = view(device.zones, ZONES)
    count = request.length // SECTOR
    if request.writable_bytes < APPEND_SECTOR_SIZE or not 0 <= request.sector < device.capacity:
        return VIRTIO_BLK_S_IOERR
    zone = zone_at(zones, request.sector // zones.size)
    if zone.state == VIRTIO_BLK_ZS_NOT_WP or request.sector != zone.start or not 0 < count <= zones.max_append:
        return VIRTIO_BLK_S_ZONE_INVALID_CMD
    if request.length & device.block_mask:
        return VIRTIO_BLK_S_ZONE_UNALIGNED_WP
    request.sector += zone.pointer
    return start_write(zones, zone, request, count)


@compiled
def is_misaligned_write(device, request):
    """Whether this is a write to a sequential zone that does not consist of whole blocks."""
    if request.operation == READ or not 0 <= request.sector < device.capacity:
        return False
    zones = view(device.zones, ZONES)
    whole = not (request.length & device.block_mask or request.sector & (device.block_mask // SECTOR))
    return not whole and request.sector // zones.size >= zones.conventional


@compiled
def record_reached(queue, request):
    """The data of this write is written: advance the write pointer that counts after a restart."""
    zone = view(request.zone, ZONE)
    zones = view(view(queue.device, DEVICE).zones, ZONES)
    place = reached_by(zones, zone)
    store64(place, max(load64(place), end_of(zone, request)))


@compiled
def reached_by(zones, zone):
    return zones.reached + 8 * (zone.start // zones.size)


@compiled
def end_of(zone, request):
    """The end of the write, in sectors from the zone's start."""
    return request.sector + request.length // SECTOR - zone.start


@compiled
def end_write(queue, request, status):
    """A write to a sequential zone has ended. If it failed and was the last one, the write pointer moves back."""
    zone = view(request.zone, ZONE)
    request.zone = 0
    zone.writing -= 1
    if status == VIRTIO_BLK_S_OK:
        if request.type == VIRTIO_BLK_T_ZONE_APPEND:
            write_append_sector(request)
    elif zone.pointer == end_of(zone, request):
        zones = view(view(queue.device, DEVICE).zones, ZONES)
        zone.pointer = request.sector - zone.start
        place = reached_by(zones, zone)
        store64(place, min(load64(place), zone.pointer))
        set_state(zones, zone, VIRTIO_BLK_ZS_CLOSED if zone.pointer > 0 else VIRTIO_BLK_ZS_EMPTY)


@compiled
def write_append_sector(request):
    """Write `append_sector`, which says where the appended data is, in front of the status."""
    request.iov = request.iovecs + request.readable_count * IOVEC_SIZE
    request.iov_count = request.writable_count
    copy_to_front(request, address_of(request) + REQUEST_SECTOR, APPEND_SECTOR_SIZE)


# States, and the limits of open and active (open or closed) zones.


@compiled
def is_open(state):
    return VIRTIO_BLK_ZS_IOPEN <= state <= VIRTIO_BLK_ZS_EOPEN


@compiled
def is_active(state):
    return VIRTIO_BLK_ZS_IOPEN <= state <= VIRTIO_BLK_ZS_CLOSED


@compiled
def set_state(zones, zone, state):
    zones.open += is_open(state) - is_open(zone.state)
    zones.active += is_active(state) - is_active(zone.state)
    zone.state = state


@compiled
def open_zone(zones, zone, state):
    """Open the zone implicitly or explicitly, within the limits; returns the status."""
    if not is_open(zone.state):
        if zones.max_active and not is_active(zone.state) and zones.active >= zones.max_active:
            return VIRTIO_BLK_S_ZONE_ACTIVE_RESOURCE
        if zones.max_open and zones.open >= zones.max_open and not close_another(zones):
            return VIRTIO_BLK_S_ZONE_OPEN_RESOURCE
    elif zone.state == VIRTIO_BLK_ZS_EOPEN:
        return VIRTIO_BLK_S_OK
    set_state(zones, zone, state)
    return VIRTIO_BLK_S_OK


@compiled
def close_another(zones):
    """Close the next implicitly opened zone, in round-robin order; False if there is none."""
    for _ in range(zones.count):
        zone = zone_at(zones, zones.next_closed)
        zones.next_closed = (zones.next_closed + 1) % zones.count
        if zone.state == VIRTIO_BLK_ZS_IOPEN:
            set_state(zones, zone, VIRTIO_BLK_ZS_CLOSED)
            return True
    return False


# Requests about zones.


@compiled
def execute_zones(worker, queue, request):
    """Start a request about zones; returns its status if it is complete, else PENDING."""
    device = view(queue.device, DEVICE)
    if not queue.features & VIRTIO_BLK_F_ZONED:
        return VIRTIO_BLK_S_UNSUPP
    zones = view(device.zones, ZONES)
    if request.type == VIRTIO_BLK_T_ZONE_REPORT:
        return report(device, zones, request)
    if device.read_only:
        return VIRTIO_BLK_S_IOERR
    if request.type == VIRTIO_BLK_T_ZONE_RESET_ALL:
        return reset(worker, zones, request, zones.conventional, zones.count)
    if not 0 <= request.sector < device.capacity:
        return VIRTIO_BLK_S_IOERR
    index = request.sector // zones.size
    zone = zone_at(zones, index)
    if zone.state == VIRTIO_BLK_ZS_NOT_WP or request.sector != zone.start or zone.reset_by:
        return VIRTIO_BLK_S_ZONE_INVALID_CMD
    if request.type == VIRTIO_BLK_T_ZONE_OPEN:
        full = zone.state == VIRTIO_BLK_ZS_FULL
        return VIRTIO_BLK_S_ZONE_INVALID_CMD if full else open_zone(zones, zone, VIRTIO_BLK_ZS_EOPEN)
    if request.type == VIRTIO_BLK_T_ZONE_CLOSE:
        return close(zones, zone)
    if request.type == VIRTIO_BLK_T_ZONE_FINISH:
        return finish(zones, zone)
    return reset(worker, zones, request, index, index + 1)


@compiled
def close(zones, zone):
    if not is_active(zone.state):
        return VIRTIO_BLK_S_ZONE_INVALID_CMD
    set_state(zones, zone, VIRTIO_BLK_ZS_CLOSED if zone.pointer > 0 else VIRTIO_BLK_ZS_EMPTY)
    return VIRTIO_BLK_S_OK


@compiled
def finish(zones, zone):
    zone.pointer = zones.capacity
    store64(reached_by(zones, zone), zone.pointer)
    set_state(zones, zone, VIRTIO_BLK_ZS_FULL)
    return VIRTIO_BLK_S_OK


@compiled
def reset(worker, zones, request, first, end):
    """Have a helper empty the zones from `first` up to but not including `end`; empty zones are skipped.

    Fails with writes in flight, which the driver should have waited for: they could be completed and then erased.
    """
    found = False
    for index in range(first, end):
        if zone_at(zones, index).writing:
            return VIRTIO_BLK_S_ZONE_INVALID_CMD
    for index in range(first, end):
        zone = zone_at(zones, index)
        if zone.state != VIRTIO_BLK_ZS_EMPTY and not zone.reset_by:
            zone.reset_by = request.slot + 1
            found = True
    if not found:
        return VIRTIO_BLK_S_OK
    request.operation = RESET_ZONES
    send_to_helpers(worker, request)
    return PENDING


@compiled
def end_reset(queue, request):
    """The zones of this request are empty. If storage failed, their data may still be there, but the pointers are 0."""
    zones = view(view(queue.device, DEVICE).zones, ZONES)
    for index in range(zones.count):
        zone = zone_at(zones, index)
        if zone.reset_by == request.slot + 1:
            zone.reset_by = 0
            zone.pointer = 0
            set_state(zones, zone, VIRTIO_BLK_ZS_EMPTY)


@compiled
def report(device, zones, request):
    """Describe as many zones as fit, from the zone that contains the sector."""
    if not 0 <= request.sector < device.capacity or request.writable_bytes < REPORT_SIZE:
        return VIRTIO_BLK_S_IOERR
    index = request.sector // zones.size
    count = min((request.writable_bytes - REPORT_SIZE) // DESCRIPTOR_SIZE, zones.count - index)
    request.iov = request.iovecs + request.readable_count * IOVEC_SIZE
    request.iov_count = request.writable_count
    head = view(request.ranges, REPORT)
    head.nr_zones = count
    for place in range(8, REPORT_SIZE, 8):
        store64(request.ranges + place, 0)
    append(request, REPORT_SIZE)
    for number in range(index, index + count):
        describe(zones, zone_at(zones, number), view(request.ranges, DESCRIPTOR))
        append(request, DESCRIPTOR_SIZE)
    request.length = request.done = REPORT_SIZE + count * DESCRIPTOR_SIZE
    return VIRTIO_BLK_S_OK


@compiled
def describe(zones, zone, descriptor):
    """Fill in the descriptor, whose reserved bytes are zero."""
    conventional = zone.state == VIRTIO_BLK_ZS_NOT_WP
    descriptor.z_cap = zones.size if conventional else zones.capacity
    descriptor.z_start = zone.start
    # A full zone's write pointer has no meaning; other devices report the end of the zone.
    descriptor.z_wp = zone.start + (zones.size if zone.state == VIRTIO_BLK_ZS_FULL else zone.pointer)
    descriptor.z_type = VIRTIO_BLK_ZT_CONV if conventional else VIRTIO_BLK_ZT_SWR
    descriptor.z_state = zone.state


@compiled
def append(request, size):
    """Append `size` bytes from `ranges` to the driver's buffers."""
    copy_to_front(request, request.ranges, size)
    consume(request, size)
