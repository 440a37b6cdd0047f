"""Leaky buckets. Each is one number that several threads change with atomic operations.

The semantics are those of QEMU's throttling (docs/throttle.txt there), which libvirt's iotune is passed on to. A bucket
leaks at the rate of its limit, each request fills in its cost, and a request may begin while the bucket is not more
than full. So its size need not be known before it begins: what it costs too much is a debt, which later requests wait
for.

A bucket's level changes all the time, but the time at which it will be empty, if nothing is added, does not. That time
is all that is stored: a bucket that is full for another `room` is one that will be empty in `room`. A request of a
bucket that leaks 100 units per second makes it 10 ms later. All times are in ticks of CLOCK_MONOTONIC.

A limit with a burst longer than a second has two buckets: one leaks at the rate of the limit and is as large as the
burst, the other one leaks at the rate of the burst, so that the burst is not faster.
"""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.native.access import compare_and_swap, load64, view
from ringplane.native.structs import struct

# Per nanosecond. A 64-bit number of ticks is 18 years, and a request of 512 bytes at 5 GB/s costs 1638 of them.
TICKS = 16
TICKS_PER_SECOND = TICKS * 1_000_000_000

# What a meter counts.
READS, WRITES = 1, 2

METER = struct(
    "kinds",
    # What a request costs, in ticks: `size` times `cost`, shifted to the right, but at least `least`. Sizes above
    # `most` count as `most`, because the product must not overflow.
    "least",
    "cost",
    "shift",
    "most",
    "room",  # the time in which a full bucket is empty
    "empty_at",  # the address of the time at which it will be empty; all threads change that
)
METER_SIZE = METER.itemsize

# The bits of `cost`; the longest request, a discard of 256 ranges of 1 GiB; and the highest cost of a request (52 days)
# and size of a bucket.
COST_BITS, LONGEST, MOST_TICKS, MOST_ROOM = 24, 1 << 38, 1 << 56, 1 << 58


@compiled
def meter_at(meters, index):
    return view(meters + index * METER_SIZE, METER)


@compiled
def cost_of(meter, size):
    """The ticks that a request of `size` bytes costs."""
    return max(meter.least, (min(size, meter.most) * meter.cost) >> meter.shift)


@compiled
def push_back(address, base, ticks):
    """Make the time at `address`, or `base` if that is later, so much later."""
    while True:
        before = load64(address)
        if compare_and_swap(address, before, max(before, base) + ticks) == before:
            return


@compiled
def fill_in(meters, count, kind, size, now):
    """Count a request of this kind in all meters; returns the highest cost in ticks."""
    highest = 0
    for index in range(count):
        meter = meter_at(meters, index)
        if meter.kinds & kind:
            cost = cost_of(meter, size)
            push_back(meter.empty_at, now, cost)
            highest = max(highest, cost)
    return highest


@compiled
def full_until(meters, count, kind):
    """The time from which on a request of this kind may begin; it may be over. 0: no meter counts this kind."""
    until = 0
    for index in range(count):
        meter = meter_at(meters, index)
        if meter.kinds & kind:
            until = max(until, load64(meter.empty_at) - meter.room)
    return until


@unit
def move_level(empty_at, ticks):
    """Make a bucket fuller, or less full, while threads fill it: for Python."""
    push_back(empty_at, 0, ticks)
    return 0
