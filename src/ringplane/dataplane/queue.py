"""A virtqueue and its device as Python sees them: the owners of the QUEUE, COUNTER and DEVICE structs."""

from __future__ import annotations

import functools
import mmap
import os
import stat
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringplane.dataplane.state import COUNTER, DEVICE, KINDS, QUEUE
from ringplane.engines.common import IN_MEMORY, THROUGH_WORKER
from ringplane.engines.memory import MappedImage
from ringplane.engines.ranges import ZEROS_SIZE
from ringplane.memory import MemoryTable
from ringplane.virtio.blk import SECTOR, VIRTIO_BLK_ID_BYTES


@functools.cache
def _zeros() -> npt.NDArray[np.uint8]:
    return np.frombuffer(
        mmap.mmap(-1, ZEROS_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ), np.uint8
    )


class Device:
    """What all queues of one disk share; `address` is that of its DEVICE struct."""

    def __init__(
        self,
        fd: int,
        size: int,
        *,
        read_only: bool,
        block_size: int,
        alignment: tuple[int, int],
        serial: str,
        name: str = "disk",
        storage: int = THROUGH_WORKER,
        lifetime: bytes = b"",
    ) -> None:
        """`size` and `block_size` in bytes; `alignment`: (memory, segment length) in bytes, 1 where any will do.

        `name` is what log lines call it, `storage` one of engines.common, `lifetime` what GET_LIFETIME is answered, if
        it is. Raises OSError when an image IN_MEMORY cannot be mapped.
        """
        self.fd = fd
        self.name = name
        self.told_lost = False
        self.through_worker = storage == THROUGH_WORKER
        self.mapped = MappedImage(fd, size, read_only=read_only) if storage == IN_MEMORY else None
        self._record: npt.NDArray[np.void] = np.zeros(1, DEVICE)
        self.address = int(self._record.ctypes.data)
        memory, segment = alignment
        record = self._record[0]
        record["capacity"], record["read_only"] = size // SECTOR, read_only
        record["block_mask"], record["memory_mask"], record["segment_mask"] = block_size - 1, memory - 1, segment - 1
        record["buffered"] = alignment == (1, 1)
        record["storage"], record["fd"], record["block_device"] = storage, fd, stat.S_ISBLK(os.fstat(fd).st_mode)
        record["image"], record["zeros"] = self.mapped.address if self.mapped else 0, int(_zeros().ctypes.data)
        record["lifetime"] = len(lifetime)
        record["lifetime_data"][: len(lifetime)] = np.frombuffer(lifetime, np.uint8)
        encoded = serial.encode()[:VIRTIO_BLK_ID_BYTES]
        record["serial"][: len(encoded)] = np.frombuffer(encoded, np.uint8)

    def close(self) -> None:
        """Unmap what is mapped; no queue may be running. A second call does nothing."""
        if self.mapped is not None:
            self.mapped.close()

    def map(self, size: int) -> None:
        """Prepare for an image of another size, where it is mapped: to be done before `capacity` says so."""
        if self.mapped is not None:
            self.mapped.map(size)

    def set_capacity(self, size: int) -> None:
        """So many bytes can be read and written from now on."""
        self._record["capacity"] = size // SECTOR

    @property
    def flush_failed(self) -> bool:
        """Whether the page cache may have lost what was written."""
        return bool(self._record["flush_failed"][0])

    @property
    def lost_mapping(self) -> bool:
        """Whether pages of an image in memory have gone, so that it is served by system calls from now on."""
        return self.mapped is not None and self.mapped.lost


@dataclass(frozen=True, slots=True)
class RingLayout:
    """Where the driver has put a split ring, and how the two of them use it.

    Addresses are the front end's user addresses; `base` is the available index to start from, `features` are the bits
    that were agreed on.
    """

    size: int
    desc: int
    avail: int
    used: int
    base: int
    features: int
    write_through: bool


class Queue:
    """A virtqueue. Its counters live as long as the disk; its ring as long as the driver has it configured."""

    def __init__(self, device: Device, number: int, name: str) -> None:
        """`name` is what log lines call it."""
        self.name = name
        self.number = number
        self.device = device
        self.array: npt.NDArray[np.void] = np.zeros(1, QUEUE)
        self.address = int(self.array.ctypes.data)
        self.record = self.array[0]
        self.counters: npt.NDArray[np.void] = np.zeros(len(KINDS), COUNTER)
        self.record["number"] = number
        self.record["device"] = device.address
        self.record["counters"] = self.counters.ctypes.data
        self.record["call_fd"] = -1
        # Kept for their mappings; which requests still need a table that was replaced is the worker's business.
        self.memory = MemoryTable()
        self.layout: RingLayout | None = None
        self.kick_fd = -1
        # The ring was broken and the log says so; it waits for memory that was removed to be added again.
        self.told_broken = self.suspended = False
        self.err_fd = -1

    @property
    def in_flight(self) -> int:
        """Requests fetched and not yet answered."""
        return int(self.record["in_flight"])

    @property
    def broken(self) -> bool:
        """Whether the driver broke a rule of the ring and has not reset it since."""
        return bool(self.record["broken"])

    @property
    def running(self) -> bool:
        return bool(self.record["running"])
