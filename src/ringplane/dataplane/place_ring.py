"""A ring's place in memory: its addresses are checked and translated, and the QUEUE struct is filled for its start."""

from __future__ import annotations

import ctypes

from ringplane.dataplane.loop import FIRST_TURN
from ringplane.dataplane.queue import Queue, RingLayout
from ringplane.guest_memory.address_space import BadMemory
from ringplane.guest_memory.regions import MemoryTable
from ringplane.virtio.features import VIRTIO_F_EVENT_IDX, VIRTIO_F_IN_ORDER, VIRTIO_F_INDIRECT_DESC
from ringplane.virtio.packed import EVENT_SIZE
from ringplane.virtio.split import (
    AVAIL_ALIGNMENT,
    DESC_ALIGNMENT,
    USED_ALIGNMENT,
    USED_IDX,
    avail_bytes,
    desc_bytes,
    used_bytes,
)


def prepare_ring(queue: Queue, layout: RingLayout, memory: MemoryTable) -> None:
    """Fill the queue's struct for a start at `layout.base`. Raises BadMemory if the ring cannot be there."""
    record = queue.record
    record["size"] = layout.size
    place_ring(queue, layout, memory)
    _set_features(queue, layout)
    _set_base(queue, layout)
    queue.track(layout.inflight)
    queue.set_log(layout.log)
    record["oldest"] = -1
    record["turn"] = FIRST_TURN


def find_ring(layout: RingLayout, memory: MemoryTable) -> tuple[int, int, int]:
    """The addresses of the three areas in this process; raises BadMemory if the ring is not in this memory table."""
    desc = memory.user_to_host(layout.desc, desc_bytes(layout.size))
    avail = memory.user_to_host(layout.avail, EVENT_SIZE if layout.packed else avail_bytes(layout.size))
    used = memory.user_to_host(layout.used, EVENT_SIZE if layout.packed else used_bytes(layout.size))
    if not layout.packed and layout.size & (layout.size - 1):
        raise BadMemory(f"the size of a split ring is a power of two, not {layout.size}")
    if desc % DESC_ALIGNMENT or avail % AVAIL_ALIGNMENT or used % USED_ALIGNMENT:
        # A region may be mapped at any address, but the atomic loads and stores of the ring need alignment.
        raise BadMemory("the ring is not aligned in memory")
    return desc, avail, used


def place_ring(queue: Queue, layout: RingLayout, memory: MemoryTable) -> None:
    """Use the ring through this memory table from now on; raises BadMemory, without an effect, if it is not in it."""
    desc, avail, used = find_ring(layout, memory)
    record = queue.record
    record["desc"], record["avail"], record["used"] = desc, avail, used
    record["regions"], record["region_count"], record["last_region"] = memory.address, memory.count, 0
    queue.memory, queue.layout = memory, layout


def _set_features(queue: Queue, layout: RingLayout) -> None:
    record = queue.record
    record["features"], record["packed"] = layout.features, layout.packed
    record["event_idx"] = bool(layout.features & VIRTIO_F_EVENT_IDX)
    record["indirect"] = bool(layout.features & VIRTIO_F_INDIRECT_DESC)
    record["in_order"] = bool(layout.features & VIRTIO_F_IN_ORDER)
    record["write_through"] = layout.write_through


def _set_base(queue: Queue, layout: RingLayout) -> None:
    record = queue.record
    if layout.packed:
        queue.set_packed_base(layout.base)
    else:
        record["last_avail"] = record["seen_avail"] = layout.base
        # Requests in flight, if any, are not used yet, so the used ring resumes at its own index.
        record["next_used"] = record["signalled_used"] = _load_u16(int(record["used"]) + USED_IDX)


def _load_u16(address: int) -> int:
    return int(ctypes.c_uint16.from_address(address).value)
