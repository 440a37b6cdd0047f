"""The zones of an emulated zoned disk, and where their write pointers are kept so that nothing acknowledged is lost.

Pointers are kept twice, in a file that is mapped. `reached` is where the writes that were answered end: it outlives the
process. `stable` is where the writes end that are on stable storage for sure: it is what counts after a power cut, when
nobody knows which of the pages in memory had been written. So data is synced first, then `stable` takes the pointers
from before that, and is synced itself. zonefile.py is about the file.
"""

from __future__ import annotations

import numpy as np

from ringplane.engines import ranges
from ringplane.engines.common import ZERO
from ringplane.engines.ranges import RANGE
from ringplane.native.access import address_of, load64, store64, view
from ringplane.native.jit import compiled
from ringplane.native.mutex import MUTEX_SIZE, lock, unlock
from ringplane.native.syscalls import IOVEC, fdatasync
from ringplane.virtio.blk import SECTOR

# All of a disk's zones. `size` of a zone, `capacity` (what can be written of it) and `max_append` are in sectors.
ZONES = np.dtype(
    [
        *(
            (name, "<i8")
            for name in (
                "size",
                "capacity",
                "count",
                "conventional",  # so many zones, the first ones, have no write pointer
                "max_open",  # 0: as many as there are
                "max_active",
                "max_append",
                "open",  # zones that are open, implicitly or explicitly
                "active",  # zones that are open or closed
                "next_closed",  # the zone to look at first when one is to be closed to make room
                "table",  # address of ZONE structs
                "reached",  # addresses of the pointers, `count` int64 each, in sectors from the zone's start
                "stable",
                "snapshot",  # room for as many
                "fd",  # of their file
                "failed",  # 0, or the -errno of the first fdatasync(2) that failed: none can be believed after that
            )
        ),
        ("mutex", "u1", (MUTEX_SIZE,)),
    ]
)
ZONES_MUTEX: int = ZONES.fields["mutex"][1]  # type: ignore[index]

# start: its first sector; state: one of VIRTIO_BLK_ZS; pointer: where the next write must begin, in sectors from the
# start; writing: how many writes are in flight; reset_by: 1 + the slot of the request that is resetting it, or 0.
ZONE = np.dtype([(name, "<i8") for name in ("start", "state", "pointer", "writing", "reset_by")])
ZONE_SIZE = ZONE.itemsize


@compiled
def zone_at(zones, index):
    return view(zones.table + index * ZONE_SIZE, ZONE)


# For helper threads, as they wait for storage.


@compiled
def sync(zones, fd):
    """Have all writes that were answered until now, and how far they reach, on stable storage; 0 or -errno."""
    lock(address_of(zones) + ZONES_MUTEX)
    for index in range(zones.count):
        store64(zones.snapshot + 8 * index, load64(zones.reached + 8 * index))
    result = sync_file(zones, fd)
    if result == 0:
        for index in range(zones.count):
            store64(zones.stable + 8 * index, load64(zones.snapshot + 8 * index))
        result = sync_file(zones, zones.fd)
    unlock(address_of(zones) + ZONES_MUTEX)
    return result


@compiled
def sync_file(zones, fd):
    """fdatasync(2) of one of the two files, with the mutex held, unless one has failed before (dataplane/flush.py)."""
    if zones.failed == 0:
        zones.failed = fdatasync(fd)
    return zones.failed


@compiled
def reset(zones, backing, reset_by, room, vector):
    """Empty the zones that are marked so, first their pointers, then their data; 0, or the first -errno.

    In that order, as a zone whose pointer is behind its data is still in order after a power cut, and the other way
    round it is not. `room` is for a RANGE, `vector` for an IOVEC.
    """
    lock(address_of(zones) + ZONES_MUTEX)
    for index in range(zones.count):
        if zone_at(zones, index).reset_by == reset_by:
            store64(zones.reached + 8 * index, 0)
            store64(zones.stable + 8 * index, 0)
    result = sync_file(zones, zones.fd)
    unlock(address_of(zones) + ZONES_MUTEX)
    for index in range(zones.count):
        zone = zone_at(zones, index)
        if result == 0 and zone.reset_by == reset_by:
            piece = view(room, RANGE)
            piece.start, piece.length, piece.unmap = zone.start * SECTOR, zones.size * SECTOR, 1
            result = ranges.apply_one(backing, ZERO, piece, view(vector, IOVEC))
    return result
