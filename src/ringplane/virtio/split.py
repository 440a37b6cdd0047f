"""The split virtqueue (virtio 1.2, section 2.7): layouts for both ends, and the device's end of it, compiled.

Three parts: a table of descriptors, the *available ring* in which the driver puts the head (first descriptor's index)
of each chain, and the *used ring* in which the device puts it when the request is complete. Each ring has an index that
counts all entries so far, modulo 2^16.

The functions of the device's end take a queue: any struct with the int64 fields `desc`, `avail`, `used` (addresses),
`size`, `last_avail` (next index to take from the available ring), `seen_avail` (the driver's index when we last loaded
it), `next_used` (next index to fill in the used ring), `signalled_used` (the used index when we last checked whether
the driver wants a notification) and `event_idx` (whether VIRTIO_F_EVENT_IDX was negotiated).
"""

from __future__ import annotations

import numpy as np

from ringplane.compiler.jit import compiled
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
    """Whether the index passes `event` on its way from `old` to `new`, modulo 2^16 (section 2.7.10)."""
    return ((new - event - 1) & INDEX_MASK) < ((new - old) & INDEX_MASK)


# The device's end.


@compiled
def available(queue):
    """How many chains are known to be available; more than the ring's size means that the driver's index is corrupt.

    The index is loaded only when all chains up to the last loaded value have been taken.
    """
    if queue.seen_avail == queue.last_avail:
        # Acquire: ring entries and descriptors are read after the index. Pairs with the driver's barrier before its
        # store to avail.idx (section 2.7.13.3).
        queue.seen_avail = load16_acquire(queue.avail + AVAIL_IDX)
    return known(queue)


@compiled
def known(queue):
    """How many chains are available according to the driver's index when it was last loaded."""
    return (queue.seen_avail - queue.last_avail) & INDEX_MASK


@compiled
def take_head(queue):
    """The head of the next available chain, not yet checked against the ring's size."""
    head = load16(queue.avail + AVAIL_RING + 2 * (queue.last_avail & (queue.size - 1)))
    queue.last_avail = (queue.last_avail + 1) & INDEX_MASK
    return head


@compiled
def enable_kicks(queue):
    """Ask the driver for a kick with its next chain. Check `available` after this: chains may have come meanwhile."""
    if queue.event_idx:
        store16(queue.used + USED_RING + USED_ELEM_SIZE * queue.size, queue.last_avail)
    else:
        store16(queue.used + USED_FLAGS, 0)
    # Our request for kicks is visible before we load avail.idx again. The driver does the reverse: it stores avail.idx,
    # fences, then loads our request (section 2.7.13.4.1). So at least one side sees the other's store.
    fence()


@compiled
def disable_kicks(queue):
    """Ask the driver not to kick: a hint, so it needs no barrier.

    With EVENT_IDX nothing needs to be stored: avail_event stays behind, and the driver's index does not pass it again
    before 2^16 chains.
    """
    if not queue.event_idx:
        store16(queue.used + USED_FLAGS, VIRTQ_USED_F_NO_NOTIFY)


@compiled
def put_used(queue, head, length):
    """Fill the next used element: the chain `head` is done, `length` bytes were written. Not yet visible."""
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
    """Whether the driver wants a notification of what was published since the last call of this function."""
    # used.idx is visible before we load whether the driver wants a notification. The driver stores its wish, fences,
    # then loads used.idx (section 2.7.7.2). So at least one side sees the other's store.
    fence()
    old = queue.signalled_used
    queue.signalled_used = queue.next_used
    if queue.event_idx:
        used_event = load16(queue.avail + AVAIL_RING + 2 * queue.size)
        return need_event(used_event, queue.next_used, old)
    return (load16(queue.avail + AVAIL_FLAGS) & VIRTQ_AVAIL_F_NO_INTERRUPT) == 0
