"""The figures of a disk for its metrics, read at once by compiled code: 1000 disks have 46 MB of counters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.dataplane.io_time import TICK_BITS, count_ticks, in_flight
from ringplane.dataplane.queue import Device
from ringplane.dataplane.state import (
    COUNTER_HISTOGRAM,
    COUNTER_SIZE,
    DEVICE_BUSY_TICKS,
    DEVICE_QUEUES,
    KINDS,
    QUEUE_COUNTERS,
)
from ringplane.metrics.histogram import add_below
from ringplane.native.access import load64, store64, view
from ringplane.native.syscalls import monotonic_ns
from ringplane.options.device_options import MAX_QUEUES

# The bounds of latencies are powers of two in nanoseconds: from 1.024 us to 17.2 s.
LOWEST_POWER, HIGHEST_POWER = 10, 34
POWERS = HIGHEST_POWER - LOWEST_POWER + 1

# Of one kind of requests, of all queues. It begins as COUNTER does.
KIND_FIGURES = np.dtype(
    [
        ("requests", "<i8"),
        ("errors", "<i8"),
        ("bytes", "<i8"),
        ("nanoseconds", "<i8"),
        ("below", "<i8", (POWERS + 1,)),  # how many requests took less than each bound, and how many there are
    ]
)
KIND_FIGURES_SIZE = KIND_FIGURES.itemsize
BELOW: int = KIND_FIGURES.fields["below"][1]  # type: ignore[index]

FIGURES = np.dtype([("in_flight", "<i8"), ("busy_ticks", "<i8"), ("kinds", KIND_FIGURES, (len(KINDS),))])
FIGURES_KINDS: int = FIGURES.fields["kinds"][1]  # type: ignore[index]
KIND_COUNT = len(KINDS)


def read_figures(devices: Sequence[Device]) -> npt.NDArray[np.void]:
    """The FIGURES of these disks now. Any thread may call."""
    figures = np.zeros(len(devices), FIGURES)
    address = figures.ctypes.data
    for device in devices:
        read_disk(device.address, address)
        address += FIGURES.itemsize
    return figures


@unit
def read_disk(device, place):
    """Read the figures of the DEVICE at the address `device` into FIGURES that are 0."""
    for number in range(MAX_QUEUES):
        queue = load64(device + DEVICE_QUEUES + 8 * number)
        if queue:
            add_counters(load64(queue + QUEUE_COUNTERS), place + FIGURES_KINDS)
    count_ticks(device, monotonic_ns() >> TICK_BITS, 0)
    figures = view(place, FIGURES)
    figures.in_flight = in_flight(device)
    figures.busy_ticks = load64(device + DEVICE_BUSY_TICKS)
    return 0


@compiled
def add_counters(counters, place):
    """Add those of one queue to the figures of all kinds."""
    for kind in range(KIND_COUNT):
        counter = counters + kind * COUNTER_SIZE
        figures = place + kind * KIND_FIGURES_SIZE
        # Most disks have but two or three kinds of requests.
        if load64(counter):
            for offset in range(0, BELOW, 8):
                store64(figures + offset, load64(figures + offset) + load64(counter + offset))
            add_below(counter + COUNTER_HISTOGRAM, LOWEST_POWER, POWERS, figures + BELOW)
