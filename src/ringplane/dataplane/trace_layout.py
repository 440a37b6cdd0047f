"""How a trace event is stored and sent: in 32 bytes, two to a cache line.

Per event, the I/O thread needs 5 ns, half of them for what is noted at the fetch, the thread that sends 4 to 6 ns, and
the client 6 ns, which it takes from a guest or from an I/O thread if there is no other CPU. All but the first depend on
its size: with 48 bytes the thread that sends needed 9 ns. So rare values have fewer digits, and what is known otherwise
is not there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FETCH, LEAVE, RETURN, COMPLETE, START, STOP, HOLD, RELEASE, IN_FLIGHT = range(1, 10)

# FETCH and IN_FLIGHT have the time of the fetch: IN_FLIGHT is that of a request which is in flight when a recording
# ends. Of START and STOP, `sector` is the queue's available index and `length` its size.
EVENT = np.dtype(
    [
        ("time", "<i8"),  # nanoseconds, CLOCK_MONOTONIC
        ("sector", "<u4"),  # the lower half
        ("sector_high", "<u2"),  # LAST_SECTOR: that one, or one behind it
        ("head", "<u2"),  # no two requests of a queue that are in flight have the same
        ("length", "<u4"),  # in bytes; rounded with LENGTH_SHIFT
        ("lasted", "<u4"),  # of COMPLETE: nanoseconds since the fetch; rounded with TIME_SHIFT
        # From when the chain was seen in the ring to the fetch: at most LONGEST_WAIT times 2^WAIT_SHIFT nanoseconds
        ("waited", "<u4"),
        ("queue", "<u2"),  # QUEUE's `traced`
        ("type", "u1"),  # LAST_TYPE: that one, or a higher one
        ("event", "u1"),  # and above EVENT_BITS the status
    ]
)
EVENT_SIZE = EVENT.itemsize

LAST_SECTOR, LAST_TYPE = (1 << 48) - 1, (1 << 8) - 1
EVENT_BITS = 4
WAIT_SHIFT, LONGEST_WAIT = 6, (1 << 32) - 1

# A number that is rounded with a shift is exact below this. With this bit set, the others are the number shifted right.
ROUNDED = 1 << 31
# Up to a TiB, and up to 2.4 hours.
LENGTH_SHIFT, TIME_SHIFT = 9, 12

Events = npt.NDArray[np.void]
Numbers = npt.NDArray[np.int64]


def kinds(events: Events) -> npt.NDArray[np.uint8]:
    """FETCH, LEAVE, ..."""
    kinds: npt.NDArray[np.uint8] = events["event"] & np.uint8((1 << EVENT_BITS) - 1)
    return kinds


def values(events: Events) -> dict[str, Numbers]:
    """The columns of events: as above, but complete; `lasted` and `waited` are nanoseconds, and `status` is apart."""
    wide = {name: events[name].astype(np.int64) for name in EVENT.names or ()}
    wide["sector"] |= wide.pop("sector_high") << 32
    wide["length"] = _exact(wide["length"], LENGTH_SHIFT)
    wide["lasted"] = _exact(wide["lasted"], TIME_SHIFT)
    wide["waited"] <<= WAIT_SHIFT
    wide["status"] = wide["event"] >> EVENT_BITS
    wide["event"] = kinds(events).astype(np.int64)
    return wide


def fill(events: Events, status: int = 0, **numbers: Any) -> None:
    """Store these columns as compiled code does (tracer.py); those that are not named are 0."""
    wide: dict[str, Any] = dict.fromkeys(EVENT.names or (), 0) | numbers
    # A negative sector is one of 2^63 or more.
    sector = np.where(np.asarray(wide["sector"], np.int64) & ~LAST_SECTOR, LAST_SECTOR, wide["sector"])
    wide["sector"], wide["sector_high"] = sector & 0xFFFF_FFFF, sector >> 32
    wide["length"] = _rounded(np.asarray(wide["length"], np.int64), LENGTH_SHIFT)
    wide["lasted"] = _rounded(np.asarray(wide["lasted"], np.int64), TIME_SHIFT)
    wide["type"] = np.minimum(wide["type"], LAST_TYPE)
    wide["event"] |= status << EVENT_BITS
    for name, column in wide.items():
        events[name] = column


def _exact(stored: Numbers, shift: int) -> Numbers:
    return np.where(stored & ROUNDED, (stored & ROUNDED - 1) << shift, stored)


def _rounded(numbers: Numbers, shift: int) -> Numbers:
    return np.where(numbers < ROUNDED, numbers, ROUNDED | np.minimum(numbers >> shift, ROUNDED - 1))
