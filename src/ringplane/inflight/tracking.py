"""The in-flight region of a ring, in memory that outlives this process: layouts, and compiled stores in a safe order.

Source: QEMU's docs/interop/vhost-user.rst, section "Inflight I/O tracking". A process can be killed between any two of
these stores. The next process (recover.py) must find each chain either in flight or used, never neither. The kill
itself loses no completed store, so only the order counts: the atomic stores of native.access keep their order.

The front end shares this memory, so nothing is ever read from it here: the content of its lists is known from our own
arrays. The functions take a queue: any struct with the fields of split.py and packed.py and the int64 fields `inflight`
(address of the ring's region), `counter` (number of chains fetched so far), `batch_list` (address of an array with room
for `size` entries) and `batched` (how many are in it: those of the chains used since used elements were last
published). Split rings also need `last_batch_head`. Packed rings need `free_head`, `places` (what PLACES holds),
`links`, `lasts` and `counts` (addresses of arrays: the entry after each entry, and for each chain in flight, by its
first entry, its last entry and its number of entries).

A chain's entry is, on a split ring, its head, and on a packed ring the first of the entries that hold its descriptors.
"""

from __future__ import annotations

import numpy as np

from ringplane.compiler.jit import compiled
from ringplane.native.access import load16, load32, load64, store8, store16, store32, store64
from ringplane.virtio.ring import publish_used, put_used

VERSION = 1
ALIGNMENT = 64

# QueueRegionSplit, and DescStateSplit, one per descriptor of the ring
REGION_SPLIT = np.dtype(
    [("features", "<u8"), ("version", "<u2"), ("desc_num", "<u2"), ("last_batch_head", "<u2"), ("used_idx", "<u2")]
)
STATE_SPLIT = np.dtype([("inflight", "u1"), ("padding", "u1", (5,)), ("next", "<u2"), ("counter", "<u8")])

# QueueRegionPacked, and DescStatePacked, one per descriptor. Entries of a used chain are reused for other chains.
REGION_PACKED = np.dtype(
    [
        ("features", "<u8"),
        ("version", "<u2"),
        ("desc_num", "<u2"),
        ("free_head", "<u2"),
        ("old_free_head", "<u2"),
        ("used_idx", "<u2"),
        ("old_used_idx", "<u2"),
        ("used_wrap_counter", "u1"),
        ("old_used_wrap_counter", "u1"),
        ("padding", "u1", (10,)),
    ]
)
STATE_PACKED = np.dtype(
    [
        ("inflight", "u1"),
        ("padding", "u1"),
        ("next", "<u2"),
        ("last", "<u2"),
        ("num", "<u2"),
        ("counter", "<u8"),
        ("id", "<u2"),
        ("flags", "<u2"),
        ("len", "<u4"),
        ("addr", "<u8"),
    ]
)


def _offset(layout: np.dtype[np.void], name: str) -> int:
    return int(layout.fields[name][1])  # type: ignore[index]


SPLIT_SIZE, SPLIT_STATE_SIZE = REGION_SPLIT.itemsize, STATE_SPLIT.itemsize
SPLIT_LAST_BATCH_HEAD, SPLIT_USED_IDX = (_offset(REGION_SPLIT, name) for name in ("last_batch_head", "used_idx"))
SPLIT_NEXT, SPLIT_COUNTER = (_offset(STATE_SPLIT, name) for name in ("next", "counter"))

PACKED_SIZE, PACKED_STATE_SIZE = REGION_PACKED.itemsize, STATE_PACKED.itemsize
FREE_HEAD, OLD_FREE_HEAD = (_offset(REGION_PACKED, name) for name in ("free_head", "old_free_head"))
# used_idx, old_used_idx, used_wrap_counter, old_used_wrap_counter and padding: one store changes all of them. A process
# that ended between the store of an index and that of its wrap counter would leave an invalid position.
PLACES = _offset(REGION_PACKED, "used_idx")
OLD_PLACE = 0xFF << 40 | 0xFFFF << 16
NEXT, LAST, NUM, COUNTER, ID, FLAGS, LEN, ADDR = (
    _offset(STATE_PACKED, name) for name in ("next", "last", "num", "counter", "id", "flags", "len", "addr")
)


def region_bytes(size: int, *, packed: bool) -> int:
    """Bytes of the region of a ring with `size` descriptors."""
    used = PACKED_SIZE + size * PACKED_STATE_SIZE if packed else SPLIT_SIZE + size * SPLIT_STATE_SIZE
    return -(-used // ALIGNMENT) * ALIGNMENT


# Both formats.


@compiled
def use(queue, entry, head, count, length):
    """Use a chain, as `put_used` of ring.py does. Packed rings: `publish` must follow each one."""
    put_used(queue, head, count, length)
    store64(queue.batch_list + 8 * queue.batched, entry)
    queue.batched += 1


@compiled
def publish(queue):
    """Make all used elements visible, as `publish_used` of ring.py does."""
    if queue.packed:
        before_publishing_packed(queue)
        publish_used(queue)
        after_publishing_packed(queue)
    else:
        before_publishing_split(queue)
        publish_used(queue)
        after_publishing_split(queue)


@compiled
def batch_entry(queue, index):
    return load64(queue.batch_list + 8 * index)


# Split rings.


@compiled
def split_state(queue, head):
    return queue.inflight + SPLIT_SIZE + head * SPLIT_STATE_SIZE


@compiled
def fetch_split(queue, head):
    """The chain has been fetched. The counter is stored before the mark: it must be valid when the mark is set."""
    state = split_state(queue, head)
    store64(state + SPLIT_COUNTER, queue.counter)
    queue.counter += 1
    store8(state, 1)


@compiled
def before_publishing_split(queue):
    """Link the batch, so that a process that finds an advanced used.idx knows which chains were used."""
    for index in range(queue.batched):
        head = batch_entry(queue, index)
        store16(split_state(queue, head) + SPLIT_NEXT, queue.last_batch_head)
        # The link is stored before it can be reached.
        store16(queue.inflight + SPLIT_LAST_BATCH_HEAD, head)
        queue.last_batch_head = head


@compiled
def after_publishing_split(queue):
    """The driver can see that the batch is used: only now may the marks be cleared."""
    for index in range(queue.batched):
        store8(split_state(queue, batch_entry(queue, index)), 0)
    # Until this store, the next process clears the marks of the last batch again.
    store16(queue.inflight + SPLIT_USED_IDX, queue.next_used)
    queue.batched = 0


# Packed rings. A chain's descriptors are copied, because used descriptors overwrite them in the ring.


@compiled
def same_places(index, wrap):
    """The value of PLACES if old and present position are the same."""
    return index | index << 16 | wrap << 32 | wrap << 40


@compiled
def packed_state(queue, entry):
    return queue.inflight + PACKED_SIZE + entry * PACKED_STATE_SIZE


@compiled
def next_free(queue, entry):
    return load64(queue.links + 8 * entry)


@compiled
def copy_descriptor(queue, entry, addr, length, identifier, flags):
    """Copy into a free entry, which has no effect yet; returns the next free entry."""
    state = packed_state(queue, entry)
    store64(state + ADDR, addr)
    store32(state + LEN, length)
    store16(state + FLAGS, flags)
    store16(state + ID, identifier)
    return next_free(queue, entry)


@compiled
def read_copy(queue, entry):
    """(addr, len, id, flags) of a copied descriptor, each read once: the front end may have written there."""
    state = packed_state(queue, entry)
    return load64(state + ADDR), load32(state + LEN), load16(state + ID), load16(state + FLAGS)


@compiled
def fetch_packed(queue, count):
    """The chain that was copied to the first `count` free entries has been fetched; returns its entry."""
    entry = last = queue.free_head
    for _ in range(count - 1):
        last = next_free(queue, last)
    end = next_free(queue, last)
    store64(queue.lasts + 8 * entry, last)
    store64(queue.counts + 8 * entry, count)
    state = packed_state(queue, entry)
    store16(state + NUM, count)
    store16(state + LAST, last)
    store64(state + COUNTER, queue.counter)
    queue.counter += 1
    store8(state, 1)
    store16(queue.inflight + FREE_HEAD, end)
    # This store puts it in flight: an entry in the list that begins here is free, whatever its mark is.
    store16(queue.inflight + OLD_FREE_HEAD, end)
    queue.free_head = end
    return entry


@compiled
def before_publishing_packed(queue):
    """Put the batch at the front of the list of free entries, and store where its used descriptors end."""
    for index in range(queue.batched):
        entry = batch_entry(queue, index)
        last = load64(queue.lasts + 8 * entry)
        store16(packed_state(queue, last) + NEXT, queue.free_head)
        store64(queue.links + 8 * last, queue.free_head)
        # The link is stored before it can be reached.
        store16(queue.inflight + FREE_HEAD, entry)
        queue.free_head = entry
    store64(queue.inflight + PLACES, (queue.places & OLD_PLACE) | queue.next_used | queue.used_wrap << 32)


@compiled
def after_publishing_packed(queue):
    """The driver can see that the batch is used. Until the old values follow, the ring itself shows whether it can."""
    for index in range(queue.batched):
        store8(packed_state(queue, batch_entry(queue, index)), 0)
    store16(queue.inflight + OLD_FREE_HEAD, queue.free_head)
    queue.places = same_places(queue.next_used, queue.used_wrap)
    store64(queue.inflight + PLACES, queue.places)
    queue.batched = 0
