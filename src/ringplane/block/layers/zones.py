"""The zones of an emulated zoned disk, and how their write pointers are stored so that no completed write is lost.

Each pointer is stored twice, in a mapped file. `reached` is where the completed writes end: it outlives the process.
`stable` is where the writes end that are certainly on stable storage: it counts after a power cut, when it is unknown
which of the pages in memory had been written. So the data is synced first; then `stable` is set to the pointers from
before that, and is synced itself. block/zonefile.py is about the file.
"""

from __future__ import annotations

import numpy as np

from ringplane.block import ranges
from ringplane.block.io import ZERO, ZEROS_IOV
from ringplane.block.ranges import RANGE
from ringplane.compiler.jit import compiled
from ringplane.native.access import address_of, load64, store64, view
from ringplane.native.mutex import MUTEX_SIZE, lock, unlock
from ringplane.native.syscalls import fdatasync
from ringplane.native.uio import IOVEC
from ringplane.virtio.blk import SECTOR

# All zones of a disk. `size` and `capacity` (the writable part) of a zone, and `max_append`, are in sectors.
ZONES = np.dtype(
    [
        *(
            (name, "<i8")
            for name in (
                "size",
                "capacity",
                "count",
                "conventional",  # the number of zones without a write pointer; they are the first ones
                "max_open",  # 0: no limit
                "max_active",
                "max_append",
                "open",  # zones that are open, implicitly or explicitly
                "active",  # zones that are open or closed
                "next_closed",  # the zone to check first when one has to be closed
                "table",  # address of ZONE structs
                "reached",  # addresses of the pointers, `count` int64 each, in sectors from the zone's start
                "stable",
                "snapshot",  # room for as many
                "fd",  # of the zone file
                "backing",  # BACKING of the image (block/ranges.py)
                "block_mask",  # logical block size - 1, in bytes
                "notes",  # one int64 for each slot of the I/O thread (zoned.py)
                "scratch",  # room for a REPORT or a DESCRIPTOR
                "failed",  # 0, or the -errno of the first fdatasync(2) that failed: later results cannot be trusted
            )
        ),
        ("mutex", "u1", (MUTEX_SIZE,)),
    ]
)
ZONES_MUTEX: int = ZONES.fields["mutex"][1]  # type: ignore[index]

# start: the first sector; state: one of VIRTIO_BLK_ZS; pointer: where the next write must begin, in sectors from the
# start; writing: how many writes are in flight; reset_by: 1 + the slot of the request that is resetting the zone, or 0.
ZONE = np.dtype([(name, "<i8") for name in ("start", "state", "pointer", "writing", "reset_by")])
ZONE_SIZE = ZONE.itemsize


@compiled
def zone_at(zones, index):
    return view(zones.table + index * ZONE_SIZE, ZONE)


# For helper threads, because these functions block on storage.


@compiled
def sync(zones, backing):
    """Make all writes completed until now, and their write pointers, stable; returns 0 or -errno."""
    lock(address_of(zones) + ZONES_MUTEX)
    for index in range(zones.count):
        store64(zones.snapshot + 8 * index, load64(zones.reached + 8 * index))
    result = sync_data(zones, backing)
    if result == 0:
        for index in range(zones.count):
            store64(zones.stable + 8 * index, load64(zones.snapshot + 8 * index))
        result = sync_pointers(zones)
    unlock(address_of(zones) + ZONES_MUTEX)
    return result


# With the mutex held, and not after one of the two has failed (block/flush.py).


@compiled
def sync_data(zones, backing):
    if zones.failed == 0:
        zones.failed = ranges.sync(backing)
    return zones.failed


@compiled
def sync_pointers(zones):
    if zones.failed == 0:
        zones.failed = fdatasync(zones.fd)
    return zones.failed


@compiled
def reset(zones, backing, io):
    """Empty the zones that this I/O resets: first their pointers, then their data; 0 or the first -errno.

    In that order, because after a power cut a zone with data beyond its pointer is valid, but one with a pointer beyond
    its data is not.
    """
    reset_by = io.slot + 1
    lock(address_of(zones) + ZONES_MUTEX)
    for index in range(zones.count):
        if zone_at(zones, index).reset_by == reset_by:
            store64(zones.reached + 8 * index, 0)
            store64(zones.stable + 8 * index, 0)
    result = sync_pointers(zones)
    unlock(address_of(zones) + ZONES_MUTEX)
    for index in range(zones.count):
        zone = zone_at(zones, index)
        if result == 0 and zone.reset_by == reset_by:
            piece = view(io.ranges, RANGE)
            piece.start, piece.length, piece.unmap = zone.start * SECTOR, zones.size * SECTOR, 1
            result = ranges.apply_one(backing, ZERO, piece, view(address_of(io) + ZEROS_IOV, IOVEC))
    return result
