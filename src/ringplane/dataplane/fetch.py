"""From the available ring to a request: walk the chain, check and translate each descriptor, split off the header.

The driver is not trusted: each value is read once into a local variable, then checked, then used (the compiler cannot
repeat the loads of native.access). A function that finds a broken rule returns its number (ring_rules.py), otherwise 0.
"""

from __future__ import annotations

from ringplane.block.io import BLOCK_IO
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.dataplane import ring_rules
from ringplane.dataplane.state import MAX_IOVECS, QUEUE, REQUEST, REQUEST_HEADER
from ringplane.guest_memory.regions import REGION, REGION_SIZE, find_region
from ringplane.inflight import tracking
from ringplane.native.access import address_of, load64, view
from ringplane.native.buffers import consume, copy_from
from ringplane.native.uio import IOVEC, IOVEC_SIZE
from ringplane.virtio import packed
from ringplane.virtio.blk import HEADER_SIZE
from ringplane.virtio.split import (
    DESC_SIZE,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    read_desc,
)

MAX_CHAIN_BYTES = 1 << 32


@compiled
def gather(queue, request, io):
    """Fill `request` with the buffers of the chain that starts at `request.head`; `io` is its block I/O."""
    request.readable_count = request.readable_bytes = 0
    request.writable_count = request.writable_bytes = 0
    if request.head >= queue.size:
        return ring_rules.HEAD_RANGE
    table, entries, index = queue.desc, queue.size, request.head
    seen = 0
    nested = False
    while True:
        if seen == entries:
            return ring_rules.LOOP
        seen += 1
        addr, length, flags, following = read_desc(table, index)
        if flags & VIRTQ_DESC_F_INDIRECT:
            rule = check_indirect(queue, nested, length, flags)
            if rule != ring_rules.OK:
                return rule
            table = translate_table(queue, addr, length)
            if table == 0:
                return ring_rules.INDIRECT_ADDRESS
            entries, index, seen, nested = length // DESC_SIZE, 0, 0, True
            continue
        rule = add_buffer(queue, request, addr, length, flags & VIRTQ_DESC_F_WRITE)
        if rule != ring_rules.OK:
            return rule
        if not flags & VIRTQ_DESC_F_NEXT:
            break
        if following >= entries:
            return ring_rules.NEXT_RANGE
        index = following
    return split_off_header_and_status(request, io)


@unit
def take_packed(queue_address, request_address, io_address):
    """Take the next chain of a packed ring; while there are some to resubmit, the chain at `request.entry` again.

    A unit, because few drivers use packed rings: it costs them a call by address per chain.
    """
    queue, request = view(queue_address, QUEUE), view(request_address, REQUEST)
    io = view(io_address, BLOCK_IO)
    # A packed chain's id is known only at its last descriptor.
    request.head = -1
    if queue.resubmits:
        return gather_copy(queue, request, io)
    if queue.in_flight >= queue.size:
        return ring_rules.TOO_MANY_IN_FLIGHT
    rule = gather_packed(queue, request, io)
    if rule == ring_rules.OK and queue.inflight:
        request.entry = tracking.fetch_packed(queue, request.descriptors)
    return rule


@compiled
def gather_packed(queue, request, io):
    """Fill `request` with the buffers of the next chain of a packed ring, and advance past it."""
    request.readable_count = request.readable_bytes = 0
    request.writable_count = request.writable_bytes = 0
    index = queue.last_avail
    entry = queue.free_head
    for seen in range(1, queue.size + 1):
        addr, length, identifier, flags = packed.read_desc(queue.desc, index)
        rule = add_descriptor(queue, request, addr, length, flags)
        if rule != ring_rules.OK:
            return rule
        if queue.inflight:
            if entry == queue.size:
                # The end of the list of free entries.
                return ring_rules.TOO_MANY_IN_FLIGHT
            entry = tracking.copy_descriptor(queue, entry, addr, length, identifier, flags)
        if not flags & VIRTQ_DESC_F_NEXT:
            if identifier >= queue.size:
                return ring_rules.HEAD_RANGE
            request.head, request.descriptors = identifier, seen
            packed.take(queue, seen)
            return split_off_header_and_status(request, io)
        index = index + 1 if index + 1 < queue.size else 0
    return ring_rules.LOOP


@compiled
def gather_copy(queue, request, io):
    """Like `gather_packed`, for a chain whose descriptors were copied when first fetched (inflight/tracking.py)."""
    request.readable_count = request.readable_bytes = 0
    request.writable_count = request.writable_bytes = 0
    entry, count = request.entry, load64(queue.counts + 8 * request.entry)
    for _ in range(count):
        addr, length, request.head, flags = tracking.read_copy(queue, entry)
        rule = add_descriptor(queue, request, addr, length, flags)
        if rule != ring_rules.OK:
            return rule
        entry = tracking.next_free(queue, entry)
    if request.head >= queue.size:
        return ring_rules.HEAD_RANGE
    request.descriptors = count
    return split_off_header_and_status(request, io)


@compiled
def add_descriptor(queue, request, addr, length, flags):
    """Add one descriptor of a packed ring: a buffer, or an indirect table of buffers."""
    if not flags & VIRTQ_DESC_F_INDIRECT:
        return add_buffer(queue, request, addr, length, flags & VIRTQ_DESC_F_WRITE)
    rule = check_indirect(queue, False, length, flags)
    return add_table(queue, request, addr, length) if rule == ring_rules.OK else rule


@compiled
def add_table(queue, request, addr, length):
    """Add the buffers of a packed ring's indirect table: one after the other, without NEXT (section 2.8.7)."""
    table = translate_table(queue, addr, length)
    if table == 0:
        return ring_rules.INDIRECT_ADDRESS
    for index in range(length // DESC_SIZE):
        addr, length, _, flags = packed.read_desc(table, index)
        if flags & VIRTQ_DESC_F_INDIRECT:
            return ring_rules.INDIRECT_NESTED
        rule = add_buffer(queue, request, addr, length, flags & VIRTQ_DESC_F_WRITE)
        if rule != ring_rules.OK:
            return rule
    return ring_rules.OK


@compiled
def check_indirect(queue, nested, length, flags):
    """The rules of section 2.7.5.3 for the descriptor that refers to an indirect table."""
    if not queue.indirect:
        return ring_rules.INDIRECT_NOT_NEGOTIATED
    if nested:
        return ring_rules.INDIRECT_NESTED
    if flags & VIRTQ_DESC_F_NEXT:
        return ring_rules.INDIRECT_NEXT
    if length == 0 or length % DESC_SIZE != 0:
        return ring_rules.INDIRECT_LENGTH
    return ring_rules.OK


@compiled
def translate_table(queue, addr, length):
    """Our address of an indirect table, 0 unless it lies within one region."""
    index = find_region(queue.regions, queue.region_count, addr, queue.last_region)
    if index < 0:
        return 0
    region = view(queue.regions + index * REGION_SIZE, REGION)
    offset = addr - region.guest
    return region.host + offset if length <= region.size - offset else 0


@compiled
def add_buffer(queue, request, addr, length, writable):
    """Translate one descriptor's buffer; it becomes several IOVEC structs where it spans adjacent regions."""
    if length == 0:
        return ring_rules.ZERO_LENGTH
    if not writable and request.writable_count > 0:
        return ring_rules.ORDER
    if request.readable_bytes + request.writable_bytes + length > MAX_CHAIN_BYTES:
        return ring_rules.TOO_MANY_BYTES
    if writable:
        request.writable_bytes += length
    else:
        request.readable_bytes += length
    while length > 0:
        count = request.readable_count + request.writable_count
        if count == MAX_IOVECS:
            return ring_rules.TOO_MANY_SEGMENTS
        index = find_region(queue.regions, queue.region_count, addr, queue.last_region)
        if index < 0:
            return ring_rules.ADDRESS
        queue.last_region = index
        region = view(queue.regions + index * REGION_SIZE, REGION)
        offset = addr - region.guest
        iovec = view(request.iovecs + count * IOVEC_SIZE, IOVEC)
        iovec.base = region.host + offset
        iovec.len = min(length, region.size - offset)
        if writable:
            request.writable_count += 1
        else:
            request.readable_count += 1
        addr += iovec.len
        length -= iovec.len
    return ring_rules.OK


@compiled
def split_off_header_and_status(request, io):
    """Copy the header out of the first readable bytes, and reserve the last writable byte for the status.

    What remains of the readable buffers is in `io.iov`.

    Any framing is accepted (section 2.7.4.1): the header in several descriptors, or in one with the data; the status in
    a descriptor of its own, or at the end of the last data buffer.
    """
    if request.readable_bytes < HEADER_SIZE:
        return ring_rules.NO_HEADER
    if request.writable_bytes == 0:
        return ring_rules.NO_STATUS
    writable = request.iovecs + request.readable_count * IOVEC_SIZE
    last = view(writable + (request.writable_count - 1) * IOVEC_SIZE, IOVEC)
    last.len -= 1
    request.status_address = last.base + last.len
    request.writable_bytes -= 1
    if last.len == 0:
        request.writable_count -= 1
    io.iov, io.iov_count = request.iovecs, request.readable_count
    copy_from(io.iov, address_of(request) + REQUEST_HEADER, HEADER_SIZE)
    consume(io, HEADER_SIZE)
    request.readable_bytes -= HEADER_SIZE
    return ring_rules.OK
