"""Guest memory: shared regions, translation of guest-physical and user addresses to addresses of this process."""

from __future__ import annotations

import contextlib
import os
import stat
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringplane.compiler.jit import compiled
from ringplane.guest_memory.address_space import BadMemory, Quota
from ringplane.native import sigbus
from ringplane.native.access import view
from ringplane.system import libc

# A region for the data plane; a table is an array of these. Addresses and sizes are in bytes.
REGION = np.dtype([("guest", "<i8"), ("size", "<i8"), ("host", "<i8")])
REGION_SIZE = REGION.itemsize

# Compiled code adds offsets to int64 addresses, and an overflow is undefined: the end of a region must fit as well.
MAX_ADDRESS = (1 << 63) - 1


class Alarm:
    """An eventfd that is signalled when shared memory has gone; closed with the last reference."""

    fd = -1

    def __init__(self) -> None:
        """Raises OSError if this process may not open more files."""
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class Mapping:
    """A shared mapping of `size` bytes of `fd` from `offset`; unmapped when the last table that uses it is gone.

    References keep a mapping alive: a worker keeps a replaced table, and with it the mapping, as long as requests that
    were translated with it are in flight. If the file is truncated, pages of zeros take the place of missing pages when
    they are accessed, and `alarm` is signalled (native/sigbus.py). `fd` is a duplicate, with which another process can
    map the same memory (control/handover.py). The mapping counts against `quota`.
    """

    def __init__(self, fd: int, size: int, offset: int, alarm: Alarm | None = None, quota: Quota | None = None) -> None:
        """Map; raises BadMemory if the file is too short or the quota is used up, OSError if the kernel refuses."""
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and offset + size > status.st_size:
            raise BadMemory(f"region of {size} bytes at {offset} of a file of only {status.st_size} bytes")
        # hugetlbfs maps whole huge pages only, and reports their size as the file's block size.
        page = max(os.sysconf("SC_PAGE_SIZE"), status.st_blksize)
        lead = offset % page
        length = -(-(size + lead) // page) * page
        with contextlib.ExitStack() as undo:
            if quota is not None:
                quota.reserve(length)
                undo.callback(quota.release, length)
            start = libc.mmap_shared(fd, length, offset - lead)
            undo.callback(libc.munmap, start, length)
            self.fd = os.dup(fd)
            undo.callback(os.close, self.fd)
            # Kept until the guard has been released: its eventfd, and the word in which it records the loss, which
            # nobody reads.
            kept = (alarm, np.zeros(1, np.int64))
            alarm_fd = alarm.fd if alarm is not None else -1
            guard = sigbus.guard(start, length, page, int(kept[1].ctypes.data), alarm_fd)
            undo.pop_all()
        # Not at the interpreter's exit, where a worker's thread may still be running.
        weakref.finalize(self, _unmap, guard, start, length, self.fd, kept, quota).atexit = False
        self.address, self.size, self.offset = start + lead, size, offset


def _unmap(guard: int, start: int, length: int, fd: int, kept: object, quota: Quota | None) -> None:
    sigbus.release(guard)
    libc.munmap(start, length)
    os.close(fd)
    if quota is not None:
        quota.release(length)


@dataclass(frozen=True, slots=True)
class Region:
    """The addresses of one piece of guest memory in the guest, in the front end and in this process."""

    guest_address: int
    user_address: int
    size: int
    mapping: Mapping

    @classmethod
    def map(
        cls,
        guest_address: int,
        user_address: int,
        size: int,
        mmap_offset: int,
        fd: int,
        alarm: Alarm | None = None,
        quota: Quota | None = None,
    ) -> Region:
        """Check the front end's description and map it; raises BadMemory or OSError. The fd stays the caller's."""
        if size == 0:
            raise BadMemory("a region of zero bytes")
        for name, value in (("guest address", guest_address), ("user address", user_address), ("offset", mmap_offset)):
            if value + size > MAX_ADDRESS:
                raise BadMemory(f"{name} {value:#x} + size {size:#x} is not below 2^63")
        return cls(guest_address, user_address, size, Mapping(fd, size, mmap_offset, alarm, quota))

    def overlaps(self, other: Region) -> bool:
        return (
            self.guest_address < other.guest_address + other.size
            and other.guest_address < self.guest_address + self.size
        )


class MemoryTable:
    """An immutable set of regions, and its compiled form: `address` of `count` REGION structs."""

    def __init__(self, regions: Iterable[Region] = ()) -> None:
        """Raises BadMemory when two regions overlap in guest-physical space."""
        self.regions = tuple(sorted(regions, key=lambda region: region.guest_address))
        for lower, upper in zip(self.regions, self.regions[1:], strict=False):
            if lower.overlaps(upper):
                raise BadMemory(f"regions at {lower.guest_address:#x} and {upper.guest_address:#x} overlap")
        self._array: npt.NDArray[np.void] = np.zeros(max(1, len(self.regions)), REGION)
        for entry, region in zip(self._array, self.regions, strict=False):
            entry["guest"], entry["size"] = region.guest_address, region.size
            entry["host"] = region.mapping.address
        self.address = int(self._array.ctypes.data)
        self.count = len(self.regions)

    def user_to_host(self, user_address: int, size: int) -> int:
        """Our address of `size` bytes at the front end's `user_address` (used for rings); raises BadMemory."""
        for region in self.regions:
            offset = user_address - region.user_address
            if offset >= 0 and offset + size <= region.size:
                return region.mapping.address + offset
        raise BadMemory(f"{size} bytes at user address {user_address:#x} are not inside one region")

    def adding(self, region: Region) -> MemoryTable:
        """This table plus one region; raises BadMemory when they overlap."""
        return MemoryTable((*self.regions, region))

    def removing(self, guest_address: int, user_address: int, size: int) -> MemoryTable:
        """This table without that region; raises BadMemory when it has no such region."""
        wanted = (guest_address, user_address, size)
        kept = [r for r in self.regions if (r.guest_address, r.user_address, r.size) != wanted]
        if len(kept) == len(self.regions):
            raise BadMemory(f"no region of {size} bytes at guest address {guest_address:#x} to remove")
        return MemoryTable(kept)


@compiled
def find_region(regions, count, guest, last):
    """The index of the region that holds guest-physical address `guest`, trying the region `last` first; -1 if none."""
    if last < count:
        region = view(regions + last * REGION_SIZE, REGION)
        if region.guest <= guest and guest - region.guest < region.size:
            return last
    for index in range(count):
        region = view(regions + index * REGION_SIZE, REGION)
        if region.guest <= guest and guest - region.guest < region.size:
            return index
    return -1
