"""The packed virtqueue (virtio 1.2, section 2.8): layouts, and the device's end of it, compiled.

One ring of descriptors that both sides write: the driver makes a descriptor available, the device overwrites it with a
used one. Two bits in it, compared with a wrap counter that flips with each lap, say which side owns it. The functions
take a queue: any struct with the int64 fields `desc` (address of the ring), `avail` and `used` (addresses of the
driver's and the device's event suppression structs), `size`, `last_avail` and `next_used` (indices of the next
descriptor to take and to overwrite) with `avail_wrap` and `used_wrap` (1 in the first lap, 0 in the second, and so on),
`batch` and `batch_flags` (the first used descriptor that is not visible yet, and the flags that will make it visible),
`uncounted` (how many descriptors were used since the last check whether the driver wants a notification), `event_idx`.
"""

from __future__ import annotations

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
from ringplane.virtio.split import DESC_SIZE, VIRTQ_DESC_F_WRITE, need_event

# struct pvirtq_desc, section 2.8.13: addr, len, id, flags
DESC_LEN, DESC_ID, DESC_FLAGS = 8, 12, 14
VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED = 1 << 7, 1 << 15

# struct pvirtq_event_suppress, section 2.8.14: offset and wrap counter of a descriptor, and flags
EVENT_DESC, EVENT_FLAGS, EVENT_SIZE = 0, 2, 4
RING_EVENT_FLAGS_ENABLE, RING_EVENT_FLAGS_DISABLE, RING_EVENT_FLAGS_DESC = 0, 1, 2
WRAP_BIT = 15
OFFSET_MASK = (1 << WRAP_BIT) - 1


@compiled
def read_desc(table, index):
    """(addr, len, id, flags) of a descriptor, each read once; flags first, because they say whether it is ours."""
    desc = table + index * DESC_SIZE
    flags = load16(desc + DESC_FLAGS)
    return load64(desc), load32(desc + DESC_LEN), load16(desc + DESC_ID), flags


@compiled
def available(queue):
    """Whether a chain is available at the next position: 1 or 0."""
    # Acquire: the chain is read after the flags of its first descriptor. Pairs with the driver's barrier before its
    # store of them (section 2.8.21.1).
    flags = load16_acquire(queue.desc + queue.last_avail * DESC_SIZE + DESC_FLAGS)
    made_available = (flags & VIRTQ_DESC_F_AVAIL != 0) == (queue.avail_wrap != 0)
    return 1 if made_available and (flags & VIRTQ_DESC_F_USED != 0) != (queue.avail_wrap != 0) else 0


@compiled
def take(queue, count):
    """Advance past a chain of `count` descriptors."""
    queue.last_avail += count
    if queue.last_avail >= queue.size:
        queue.last_avail -= queue.size
        queue.avail_wrap ^= 1


@compiled
def enable_kicks(queue):
    """Ask the driver for a kick with its next chain. Check `available` after this: chains may have come meanwhile."""
    if queue.event_idx:
        store16(queue.used + EVENT_DESC, queue.last_avail | queue.avail_wrap << WRAP_BIT)
        # Release: the position is stored before the flags that enable it. Pairs with the driver's barrier between its
        # loads of flags and position.
        store16_release(queue.used + EVENT_FLAGS, RING_EVENT_FLAGS_DESC)
    else:
        store16(queue.used + EVENT_FLAGS, RING_EVENT_FLAGS_ENABLE)
    # Our request for kicks is visible before we load from the ring again. The driver does the reverse: it stores the
    # chain's flags, fences, then loads our request (section 2.8.21.3.1). So at least one side sees the other's store.
    fence()


@compiled
def disable_kicks(queue):
    """Ask the driver not to kick: a hint, so it needs no barrier."""
    store16(queue.used + EVENT_FLAGS, RING_EVENT_FLAGS_DISABLE)


@compiled
def put_used(queue, identifier, count, length):
    """Overwrite a chain of `count` descriptors with the next used one: `length` bytes were written. Not yet visible.

    The driver reads used descriptors in order, so it sees none of a batch before the first.
    """
    desc = queue.desc + queue.next_used * DESC_SIZE
    store32(desc + DESC_LEN, length)
    store16(desc + DESC_ID, identifier)
    flags = VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED if queue.used_wrap else 0
    flags |= VIRTQ_DESC_F_WRITE if length > 0 else 0
    if queue.batch == 0:
        queue.batch, queue.batch_flags = desc, flags
    else:
        store16(desc + DESC_FLAGS, flags)
    queue.uncounted += count
    queue.next_used += count
    if queue.next_used >= queue.size:
        queue.next_used -= queue.size
        queue.used_wrap ^= 1


@compiled
def publish_used(queue):
    """Make all used descriptors of the batch visible."""
    if queue.batch:
        # Release: used descriptors, data and status bytes are visible before these flags. Pairs with the driver's
        # barrier after its load of them (section 2.8.22).
        store16_release(queue.batch + DESC_FLAGS, queue.batch_flags)
        queue.batch = 0


@compiled
def wants_notification(queue):
    """Whether the driver wants a notification of what was published since the last call of this function."""
    # Used descriptors are visible before we load whether the driver wants a notification. The driver stores its wish,
    # fences, then loads from the ring (section 2.8.14). So at least one side sees the other's store.
    fence()
    count = queue.uncounted
    queue.uncounted = 0
    # Acquire: the position is read after the flags. Pairs with the driver's barrier between its stores of them.
    flags = load16_acquire(queue.avail + EVENT_FLAGS)
    if flags != RING_EVENT_FLAGS_DESC or not queue.event_idx:
        return flags != RING_EVENT_FLAGS_DISABLE
    wanted = load16(queue.avail + EVENT_DESC)
    place = wanted & OFFSET_MASK
    if wanted >> WRAP_BIT != queue.used_wrap:
        # A position in the previous lap.
        place -= queue.size
    return need_event(place, queue.next_used, queue.next_used - count)
