"""The driver's end of a split virtqueue (virtio 1.2, section 2.7), compiled: add, publish, reap, notifications.

Guest-physical address 0 is the first byte of the driver's shared memory: an address in a descriptor is an offset there.
State that the device must not be able to change (the free list, the chains in flight) is in private memory: a used
element is accepted only if it names a chain in flight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ringplane.compiler.jit import compiled
from ringplane.native.access import (
    fence,
    load16,
    load16_acquire,
    load32,
    store16,
    store16_release,
    store32,
    store64,
    view,
)
from ringplane.virtio.split import (
    AVAIL_FLAGS,
    AVAIL_IDX,
    AVAIL_RING,
    DESC_FLAGS,
    DESC_LEN,
    DESC_NEXT,
    DESC_SIZE,
    INDEX_MASK,
    USED_ELEM_SIZE,
    USED_FLAGS,
    USED_IDX,
    USED_RING,
    VIRTQ_AVAIL_F_NO_INTERRUPT,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    VIRTQ_USED_F_NO_NOTIFY,
    avail_bytes,
    desc_bytes,
    need_event,
    used_bytes,
)

# The driver's state of one ring. Addresses are ours; indices run freely modulo 2^16.
QUEUE = np.dtype(
    [
        (name, "<i8")
        for name in (
            "memory",  # our address of guest-physical address 0
            "desc",
            "avail",
            "used",
            "size",
            "event_idx",
            "chains",  # `size` CHAIN structs
            "free_head",  # the first free descriptor, NONE if all are taken
            "free_count",
            "next_avail",  # next index to fill in the available ring
            "published_avail",  # the available index that was last published
            "last_used",  # next index to take from the used ring
            "reaped_length",  # of the chain that `reap_at` returned
        )
    ]
)

# The driver's private data for one descriptor: the next one in its chain or in the free list; for the head of a chain
# in flight also the chain's last descriptor, its length (0: no such chain is in flight) and the caller's token.
CHAIN = np.dtype([("next", "<i8"), ("tail", "<i8"), ("count", "<i8"), ("token", "<i8")])
CHAIN_SIZE = CHAIN.itemsize

# A piece of a request: our address, length, and whether (0 or 1) it is writable by the device.
SEGMENT = np.dtype([("address", "<i8"), ("length", "<i8"), ("writable", "<i8")])
SEGMENT_SIZE = SEGMENT.itemsize

NONE = -1
NO_ROOM = -1
BAD_USED = -1


@compiled
def _chain(queue, index):
    return view(queue.chains + index * CHAIN_SIZE, CHAIN)


@compiled
def write_desc(desc, addr, length, flags, following):
    """Fill the descriptor at address `desc` (section 2.7.5)."""
    store64(desc, addr)
    store32(desc + DESC_LEN, length)
    store16(desc + DESC_FLAGS, flags)
    store16(desc + DESC_NEXT, following)


@compiled
def _write_segment(queue, desc, segments, position, count, following):
    segment = view(segments + position * SEGMENT_SIZE, SEGMENT)
    flags = segment.writable * VIRTQ_DESC_F_WRITE
    if position < count - 1:
        flags |= VIRTQ_DESC_F_NEXT
    write_desc(desc, segment.address - queue.memory, segment.length, flags, following)


@compiled
def _write_direct(queue, segments, count):
    """Write a chain into the first `count` free descriptors; returns the last of them."""
    index = tail = queue.free_head
    for position in range(count):
        following = _chain(queue, index).next
        _write_segment(queue, queue.desc + index * DESC_SIZE, segments, position, count, max(following, 0))
        tail, index = index, following
    return tail


@compiled
def _write_indirect(queue, segments, count, table):
    """Write a chain into the indirect `table`, and its descriptor into the first free one (section 2.7.5.3)."""
    for position in range(count):
        _write_segment(queue, table + position * DESC_SIZE, segments, position, count, position + 1)
    desc = queue.desc + queue.free_head * DESC_SIZE
    write_desc(desc, table - queue.memory, count * DESC_SIZE, VIRTQ_DESC_F_INDIRECT, 0)
    return queue.free_head


@compiled
def offer(queue, head):
    """Put a head into the available ring; not yet visible to the device."""
    store16(queue.avail + AVAIL_RING + 2 * (queue.next_avail & (queue.size - 1)), head)
    queue.next_avail = (queue.next_avail + 1) & INDEX_MASK


@compiled
def add(queue, segments, count, table, token):
    """Add a chain of `count` SEGMENTs at address `segments`; returns its head, or NO_ROOM without any change.

    With `table`, the address of room for `count` descriptors in shared memory, the chain is indirect and takes one
    descriptor of the ring. `token` (not negative) comes back from `take_used`. Visible to the device after `publish`.
    """
    needed = 1 if table else count
    if queue.free_count < needed:
        return NO_ROOM
    head = queue.free_head
    tail = _write_indirect(queue, segments, count, table) if table else _write_direct(queue, segments, count)
    chain = _chain(queue, head)
    chain.tail, chain.count, chain.token = tail, needed, token
    queue.free_head = _chain(queue, tail).next
    queue.free_count -= needed
    offer(queue, head)
    return head


@compiled
def publish(queue):
    """Make all added chains visible; returns whether the device wants a kick."""
    # Release: headers, data, descriptors and ring entries are visible before the index (section 2.7.13.3). Pairs with
    # the device's acquire load of avail.idx.
    store16_release(queue.avail + AVAIL_IDX, queue.next_avail)
    # The index is visible before we load whether a kick is wanted. The device stores its wish, fences, then loads
    # avail.idx again (section 2.7.13.4.1). So at least one side sees the other's store.
    fence()
    old = queue.published_avail
    queue.published_avail = queue.next_avail
    if queue.event_idx:
        avail_event = load16(queue.used + USED_RING + USED_ELEM_SIZE * queue.size)
        return need_event(avail_event, queue.next_avail, old)
    return (load16(queue.used + USED_FLAGS) & VIRTQ_USED_F_NO_NOTIFY) == 0


@compiled
def used_count(queue):
    """How many chains the device has used that were not taken yet."""
    # Acquire: used elements, data and status bytes are read after the index (section 2.7.14). Pairs with the device's
    # release store of used.idx.
    return (load16_acquire(queue.used + USED_IDX) - queue.last_used) & INDEX_MASK


@compiled
def take_used(queue):
    """(token, length written) of the next used chain, its descriptors freed; token BAD_USED if there is no such chain.

    Only after `used_count` said that there is one.
    """
    element = queue.used + USED_RING + USED_ELEM_SIZE * (queue.last_used & (queue.size - 1))
    head, length = load32(element), load32(element + 4)
    if head >= queue.size or _chain(queue, head).count == 0:
        return BAD_USED, head
    chain = _chain(queue, head)
    _chain(queue, chain.tail).next = queue.free_head
    queue.free_head = head
    queue.free_count += chain.count
    chain.count = 0
    queue.last_used = (queue.last_used + 1) & INDEX_MASK
    return chain.token, length


@compiled
def enable_notifications(queue):
    """Ask for a notification of the next used chain. Check `used_count` after this: chains may have come meanwhile."""
    if queue.event_idx:
        store16(queue.avail + AVAIL_RING + 2 * queue.size, queue.last_used)
    else:
        store16(queue.avail + AVAIL_FLAGS, 0)
    # Our request is visible before we load used.idx again. The device stores used.idx, fences, then loads our request
    # (section 2.7.7.2). So at least one side sees the other's store.
    fence()


@compiled
def disable_notifications(queue):
    """Ask the device not to notify: a hint, so it needs no barrier.

    With EVENT_IDX the flag is ignored (section 2.7.7) and nothing needs to be stored: used_event stays behind, and the
    device's index does not pass it again before 2^16 chains. So a polling driver gets one notification per 65536
    chains.
    """
    if not queue.event_idx:
        store16(queue.avail + AVAIL_FLAGS, VIRTQ_AVAIL_F_NO_INTERRUPT)


# Entry points for Python: addresses in, numbers out.


@compiled
def add_at(queue_address, segments, count, table, token):
    """`add` on the QUEUE at an address."""
    return add(view(queue_address, QUEUE), segments, count, table, token)


@compiled
def offer_at(queue_address, head):
    """`offer` on the QUEUE at an address."""
    offer(view(queue_address, QUEUE), head)


@compiled
def publish_at(queue_address):
    """`publish` on the QUEUE at an address."""
    return publish(view(queue_address, QUEUE))


@compiled
def reap_at(queue_address):
    """The token of the next used chain of the QUEUE at an address; its length is in `reaped_length`.

    NONE and 0: there is no used chain; NONE and 1 + head: it is a bad one.
    """
    queue = view(queue_address, QUEUE)
    queue.reaped_length = 0
    if used_count(queue) == 0:
        return NONE
    token, length = take_used(queue)
    queue.reaped_length = length + 1 if token == BAD_USED else length
    return token


@compiled
def enable_notifications_at(queue_address):
    """`enable_notifications` on the QUEUE at an address; returns how many used chains are there already."""
    queue = view(queue_address, QUEUE)
    enable_notifications(queue)
    return used_count(queue)


@compiled
def disable_notifications_at(queue_address):
    """`disable_notifications` on the QUEUE at an address."""
    disable_notifications(view(queue_address, QUEUE))


ALIGNMENT = 64


def _align(value: int) -> int:
    return -(-value // ALIGNMENT) * ALIGNMENT


class BadUsed(ValueError):
    """The device used a chain that is not in flight."""


class Ring:
    """One split ring of `size` descriptors in shared memory at our address `start`.

    `memory` is our address of guest-physical address 0. `state` is the ring's QUEUE struct, `address` its address.
    """

    def __init__(self, memory: int, start: int, size: int, event_idx: bool) -> None:
        """Lay out and reset the ring; raises ValueError for a size that a split ring cannot have."""
        if not 1 <= size <= 32768 or size & (size - 1):
            raise ValueError(f"the size of a split ring is a power of two up to 32768, not {size}")
        self._state: npt.NDArray[np.void] = np.zeros(1, QUEUE)
        self._chains: npt.NDArray[np.void] = np.zeros(size, CHAIN)
        self.state = self._state[0]
        self.address = int(self._state.ctypes.data)
        self.size = size
        self.memory = memory
        self.desc = start
        self.avail = _align(self.desc + desc_bytes(size))
        self.used = _align(self.avail + avail_bytes(size))
        for name in ("memory", "desc", "avail", "used", "size"):
            self.state[name] = getattr(self, name)
        self.state["event_idx"] = event_idx
        self.state["chains"] = int(self._chains.ctypes.data)
        self.reset(0)

    @staticmethod
    def bytes_needed(size: int) -> int:
        """Bytes of shared memory for a ring of `size` descriptors, from a start that is a multiple of ALIGNMENT."""
        return _align(desc_bytes(size)) + _align(avail_bytes(size)) + _align(used_bytes(size))

    def reset(self, base: int) -> None:
        """Empty the ring; both indices start at `base`, as after SET_VRING_BASE. Only while the device is stopped."""
        from ctypes import memset

        memset(self.desc, 0, self.bytes_needed(self.size))
        self._chains["next"] = np.arange(1, self.size + 1)
        self._chains["next"][-1] = NONE
        self._chains["count"] = 0
        self.state["free_head"], self.state["free_count"] = 0, self.size
        for name in ("next_avail", "published_avail", "last_used"):
            self.state[name] = base & INDEX_MASK
        self.poke16(self.avail + AVAIL_IDX, base)
        self.poke16(self.used + USED_IDX, base)
        # A device that resumes at another index than 0 need not write avail_event before it has checked the ring once
        # (libvhost-user does not): without this the first chain would cause no kick.
        self.poke16(self.used + USED_RING + USED_ELEM_SIZE * self.size, base)
        self.poke16(self.avail + AVAIL_RING + 2 * self.size, base)

    @property
    def in_flight(self) -> int:
        """How many chains are in flight."""
        return int(np.count_nonzero(self._chains["count"]))

    def add(self, segments: Sequence[tuple[int, int, bool]], token: int, table: int = 0) -> int:
        """Add a chain of (our address, length, writable by the device); returns its head, NO_ROOM if it is too long.

        `table` is our address of room for an indirect table, 0 for a direct chain.
        """
        array = np.array([tuple(map(int, segment)) for segment in segments], SEGMENT)
        return int(add_at(self.address, int(array.ctypes.data), len(segments), table, token))

    def publish(self) -> bool:
        """Make added chains visible; returns whether the device wants a kick."""
        return bool(publish_at(self.address))

    def reap(self) -> tuple[int, int] | None:
        """(token, length written) of the next used chain, None if there is none; raises BadUsed."""
        token, length = int(reap_at(self.address)), int(self.state["reaped_length"])
        if token != NONE:
            return token, length
        if length:
            raise BadUsed(f"the device used chain {length - 1}, which is not in flight")
        return None

    def enable_notifications(self) -> int:
        """Ask for a notification of the next used chain; returns how many are there already (then do not wait)."""
        return int(enable_notifications_at(self.address))

    def disable_notifications(self) -> None:
        """Ask the device not to notify."""
        disable_notifications_at(self.address)

    # For misbehaving drivers.

    def poke_desc(self, index: int, addr: int, length: int, flags: int, following: int = 0) -> None:
        """Write a descriptor with a guest-physical `addr`, whatever is there."""
        desc = np.array([(addr, length, flags, following)], "<u8,<u4,<u2,<u2").tobytes()
        poke(self.desc + index * DESC_SIZE, desc)

    def poke16(self, address: int, value: int) -> None:
        """Write 16 bits of the ring at our `address` (`avail + AVAIL_IDX`, for example)."""
        poke(address, (value & INDEX_MASK).to_bytes(2, "little"))

    def offer(self, head: int) -> None:
        """Put any number into the available ring; visible after `publish`."""
        offer_at(self.address, head)


def poke(address: int, data: bytes) -> None:
    """Copy bytes to our address `address`."""
    from ctypes import memmove

    memmove(address, data, len(data))


def peek(address: int, size: int) -> bytes:
    """`size` bytes at our address `address`."""
    from ctypes import string_at

    return string_at(address, size)
