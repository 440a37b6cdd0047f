"""The in-flight area: memory with a region per ring that the front end keeps, so that it outlives this process.

Source: QEMU's docs/interop/vhost-user.rst, section "Inflight I/O tracking". The layout of a region is in tracking.py.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from dataclasses import dataclass
from typing import NamedTuple

from ringplane.guest_memory.address_space import BadMemory, Quota
from ringplane.guest_memory.regions import Alarm, Mapping
from ringplane.inflight.tracking import ALIGNMENT, REGION_SPLIT, region_bytes
from ringplane.virtio.split import MAX_QUEUE_SIZE

VERSION_OFFSET: int = REGION_SPLIT.fields["version"][1]  # type: ignore[index]


class AreaSizes(NamedTuple):
    """The sizes that a front end describes: bytes and offset in the file, number of queues, descriptors of each."""

    size: int
    offset: int
    queues: int
    queue_size: int


@dataclass(frozen=True, slots=True)
class InflightRegion:
    """The in-flight region of a ring (tracking.py): its address, in a mapping that this object keeps."""

    address: int
    mapping: Mapping


class InflightArea:
    """An area, mapped."""

    def __init__(self, sizes: AreaSizes, fd: int, alarm: Alarm, quota: Quota) -> None:
        """The fd stays the caller's; for `alarm` and `quota` see Mapping.

        Raises BadMemory for impossible sizes, OSError if it cannot be mapped.
        """
        size, offset, queues, queue_size = sizes
        if size == 0 or size + offset >= 1 << 62 or not 0 < queue_size <= MAX_QUEUE_SIZE or queues == 0:
            raise BadMemory(
                f"impossible in-flight area: {size} bytes at {offset} for {queues} queues of {queue_size} descriptors"
            )
        self.sizes = sizes
        self._mapping = Mapping(fd, size, offset, alarm, quota)
        self._queues = queues
        # All regions have the same size, no matter which back end has created them.
        self._stride = size // queues // ALIGNMENT * ALIGNMENT

    @property
    def fd(self) -> int:
        """The file descriptor with which another process can map it."""
        return self._mapping.fd

    def region(self, index: int, size: int, *, packed: bool) -> InflightRegion:
        """The region of ring `index` with `size` descriptors; raises BadMemory if there is no room for it."""
        if index >= self._queues or region_bytes(size, packed=packed) > self._stride:
            raise BadMemory(f"the in-flight area has no room for ring {index} of {size} descriptors")
        address = self._mapping.address + index * self._stride
        if address % 8:
            raise BadMemory("the in-flight area is not aligned to 8 bytes")
        return InflightRegion(address, self._mapping)

    def forget(self, index: int) -> None:
        """Reset the region of a drained ring: the next ring starts empty, at the index that the front end sets."""
        if index < self._queues and self._stride >= REGION_SPLIT.itemsize:
            ctypes.c_uint16.from_address(self._mapping.address + index * self._stride + VERSION_OFFSET).value = 0


def create_area(num_queues: int, queue_size: int) -> tuple[AreaSizes, int]:
    """A new area and its fd, which is the caller's; large enough for either format. Raises OSError and BadMemory."""
    if not 0 < queue_size <= MAX_QUEUE_SIZE or num_queues == 0:
        raise BadMemory(f"an in-flight area for {num_queues} queues of {queue_size} descriptors is impossible")
    size = num_queues * region_bytes(queue_size, packed=True)
    fd = os.memfd_create("ringplane-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        # The front end cannot shrink it.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except BaseException:
        os.close(fd)
        raise
    return AreaSizes(size, 0, num_queues, queue_size), fd
