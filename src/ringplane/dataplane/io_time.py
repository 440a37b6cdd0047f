"""How long a disk had requests in flight, however many: the `%util` of iostat(1).

As in the kernel (`update_io_ticks` in block/blk-core.c), time is divided into ticks, and a tick is counted if requests
were in flight at its end. So the time is right on average, and a disk never counts more than a second per second,
whatever its queues on several I/O threads do. A thread compares one number each time that it looks at a queue. What it
does for the first of these times in a tick is a unit: whether there was anything in flight is the same at all ends of
ticks since the last time.
"""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.dataplane.state import (
    DEVICE_BUSY_TICKS,
    DEVICE_QUEUES,
    DEVICE_TICK,
    QUEUE,
    QUEUE_IN_FLIGHT,
    QUEUE_UNPUBLISHED,
)
from ringplane.native.access import atomic_add, compare_and_swap, load64, view
from ringplane.options.device_options import MAX_QUEUES

# A tick is 2^20 nanoseconds, some 1.05 ms.
TICK_BITS = 20
TICK_NS = 1 << TICK_BITS


@unit
def begin_tick(queue_address, tick, completed):
    """In this tick, requests of a queue are about to be fetched, or some were `completed`, for the first time."""
    queue = view(queue_address, QUEUE)
    queue.tick = tick
    count_ticks(queue.device, tick, completed or queue.in_flight)
    return 0


@compiled
def count_ticks(device_address, tick, busy):
    """Count what has passed before this tick. `busy`: requests were in flight, else it is found out."""
    # First: if anything begins or ends meanwhile, in a later tick than this, its thread counts.
    counted = load64(device_address + DEVICE_TICK)
    if tick <= counted:
        return
    if not busy:
        busy = is_busy(device_address)
    if compare_and_swap(device_address + DEVICE_TICK, counted, tick) == counted and busy:
        atomic_add(device_address + DEVICE_BUSY_TICKS, tick - counted)


@compiled
def is_busy(device_address):
    """Whether requests are in flight, or have ended since their thread has counted: it counts when it publishes them.

    In this order: a thread marks a queue as unpublished before it ends a request.
    """
    for number in range(MAX_QUEUES):
        queue = load64(device_address + DEVICE_QUEUES + 8 * number)
        if queue and (load64(queue + QUEUE_IN_FLIGHT) or load64(queue + QUEUE_UNPUBLISHED)):
            return 1
    return 0


@compiled
def in_flight(device_address):
    """The requests in flight of all queues of a disk."""
    count = 0
    for number in range(MAX_QUEUES):
        queue = load64(device_address + DEVICE_QUEUES + 8 * number)
        if queue:
            count += load64(queue + QUEUE_IN_FLIGHT)
    return count
