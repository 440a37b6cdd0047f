"""The split virtqueue (virtio 1.2, section 2.7): layouts, and what both ends do to a ring, compiled.

The functions of the device's end take a queue: any struct with the int64 fields `desc`, `avail`, `used` (addresses),
`size`, `last_avail` (next index to take from the available ring), `seen_avail` (the driver's index when we last
looked), `next_used` (next index to fill in the used ring), `signalled_used` (the used index when we last looked whether
the driver wants a call) and `event_idx` (whether VIRTIO_F_EVENT_IDX was negotiated). Indices run freely modulo 2^16.
"""

from __future__ import annotations

import numpy as np

from ringplane.native.access import (
    fence,
    load16,
    load16_acquire,
    load32,
    load64,
    store16,
    store16_release,
    store32,
)
from ringplane.native.jit import compiled

# struct virtq_desc, section 2.7.5
DESC = np.dtype([("addr", "<i8"), ("len", "<u4"), ("flags", "<u2"), ("next", "<u2")])
DESC_SIZE = DESC.itemsize
DESC_LEN, DESC_FLAGS, DESC_NEXT = (DESC.fields[name][1] for name in ("len", "flags", "next"))  # type: ignore[index]

VIRTQ_DESC_F_NEXT = 1
VIRTQ_DESC_F_WRITE = 2
VIRTQ_DESC_F_INDIRECT = 4

# struct virtq_avail, section 2.7.6: flags, idx, ring[size], used_event
AVAIL_FLAGS, AVAIL_IDX, AVAIL_RING = 0, 2, 4
VIRTQ_AVAIL_F_NO_INTERRUPT = 1

# struct virtq_used, section 2.7.8: flags, idx, {id, len}[size], avail_event
USED_FLAGS, USED_IDX, USED_RING = 0, 2, 4
USED_ELEM_SIZE = 8
VIRTQ_USED_F_NO_NOTIFY = 1

# Section 2.7
DESC_ALIGNMENT, AVAIL_ALIGNMENT, USED_ALIGNMENT = 16, 2, 4

INDEX_MASK = 0xFFFF
MAX_QUEUE_SIZE = 32768


def desc_bytes(size: int) -> int:
    """Bytes of a descriptor table of `size` entries (section 2.7)."""
    return DESC_SIZE * size


def avail_bytes(size: int) -> int:
    """Bytes of an available ring of `size` entries, used_event included (section 2.7)."""
    return 6 + 2 * size


def used_bytes(size: int) -> int:
    """Bytes of a used ring of `size` entries, avail_event included (section 2.7)."""
    return 6 + USED_ELEM_SIZE * size


@compiled
def read_desc(table, index):
    """(addr, len, flags, next) of a descriptor, each read once."""
    desc = table + index * DESC_SIZE
    return load64(desc), load32(desc + DESC_LEN), load16(desc + DESC_FLAGS), load16(desc + DESC_NEXT)


@compiled
def need_event(event, new, old):
    """Whether going from index `old` to `new` passes `event`, modulo 2^16 (section 2.7.10)."""
    return ((new - event - 1) & INDEX_MASK) < ((new - old) & INDEX_MASK)


# The device's end.


@compiled
def available(queue):
    """How many chains are known to wait; more than the ring's size means that the driver's index is corrupt.

    The index is looked at when all that it told of before has been taken.
    """
    if queue.seen_avail == queue.last_avail:
        # Acquire: ring entries and descriptors are read after the index. Pairs with the driver's barrier before its
        # store to avail.idx (section 2.7.13.3).
        queue.seen_avail = load16_acquire(queue.avail + AVAIL_IDX)
    return known(queue)


@compiled
def known(queue):
    """How many chains wait of those that the driver's index told of when it was last looked at."""
    return (queue.seen_avail - queue.last_avail) & INDEX_MASK


@compiled
def take_head(queue):
    """The head of the next available chain, not yet checked against the ring's size."""
    head = load16(queue.avail + AVAIL_RING + 2 * (queue.last_avail & (queue.size - 1)))
    queue.last_avail = (queue.last_avail + 1) & INDEX_MASK
    return head


@compiled
def enable_kicks(queue):
    """Ask the driver for a kick with its next chain. Chains that came meanwhile are seen by `available` after this."""
    if queue.event_idx:
        store16(queue.used + USED_RING + USED_ELEM_SIZE * queue.size, queue.last_avail)
    else:
        store16(queue.used + USED_FLAGS, 0)
    # Our wish is visible before we look at avail.idx again; the driver's is the other way round: it publishes
    # avail.idx, fences, then looks at our wish (section 2.7.13.4.1). So one of us sees the other.
    fence()


@compiled
def disable_kicks(queue):
    """Tell the driver that kicks are not needed; a hint, so without a barrier.

    With EVENT_IDX nothing needs to be stored: avail_event stays behind, and an index that was passed is not passed
    again before 2^16 chains.
    """
    if not queue.event_idx:
        store16(queue.used + USED_FLAGS, VIRTQ_USED_F_NO_NOTIFY)


@compiled
def put_used(queue, head, length):
    """Fill the next used element: the chain of `head` is done, `length` bytes of it were written. Not yet visible."""
    element = queue.used + USED_RING + USED_ELEM_SIZE * (queue.next_used & (queue.size - 1))
    store32(element, head)
    store32(element + 4, length)
    queue.next_used = (queue.next_used + 1) & INDEX_MASK


@compiled
def publish_used(queue):
    """Make all filled used elements visible."""
    # Release: used elements, data and status bytes are visible before the index. Pairs with the driver's barrier
    # after its load of used.idx (section 2.7.14).
    store16_release(queue.used + USED_IDX, queue.next_used)


@compiled
def wants_notification(queue):
    """Whether the driver wants to be called for what was published since this was last asked."""
    # The index is visible before we look whether the driver wants a call; the driver stores its wish, fences, then
    # looks at used.idx (section 2.7.7.2). So one of us sees the other.
    fence()
    old = queue.signalled_used
    queue.signalled_used = queue.next_used
    if queue.event_idx:
        used_event = load16(queue.avail + AVAIL_RING + 2 * queue.size)
        return need_event(used_event, queue.next_used, old)
    return (load16(queue.avail + AVAIL_FLAGS) & VIRTQ_AVAIL_F_NO_INTERRUPT) == 0
