"""`Device` (a disk) and `Queue` (a virtqueue of it): the Python owners of the DEVICE, QUEUE and COUNTER structs."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import stat
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringplane.dataplane.failures import Failures
from ringplane.dataplane.state import COUNTER, DEVICE, FAILURE, FLUSHES, KINDS, QUEUE
from ringplane.engines.common import IN_MEMORY, THROUGH_WORKER
from ringplane.engines.memory import MappedImage
from ringplane.engines.ranges import ZEROS_SIZE, granule
from ringplane.guest_memory.address_space import BadMemory
from ringplane.guest_memory.regions import Mapping, MemoryTable
from ringplane.inflight.recover import PackedTracking, Place, SplitTracking
from ringplane.virtio.blk import SECTOR, VIRTIO_BLK_ID_BYTES
from ringplane.virtio.features import VIRTIO_F_RING_PACKED
from ringplane.virtio.packed import DESC_FLAGS, VIRTQ_DESC_F_USED
from ringplane.virtio.split import DESC_SIZE, INDEX_MASK


@functools.cache
def _zeros() -> npt.NDArray[np.uint8]:
    return np.frombuffer(
        mmap.mmap(-1, ZEROS_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ), np.uint8
    )


class Device:
    """What all queues of one disk share; `address` is the address of its DEVICE struct."""

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
        zones: int = 0,
    ) -> None:
        """`size` and `block_size` in bytes; `alignment`: (memory, segment length) in bytes, 1: not restricted.

        `name` is the name in log lines, `storage` one of engines.common, `lifetime` the reply to GET_LIFETIME (empty:
        unsupported), `zones` the address of a ZONES struct (0: not zoned). Raises OSError when an image IN_MEMORY
        cannot be mapped.
        """
        self.fd = fd
        self.name = name
        self.lost_reported = False
        self.failures = Failures(name)
        self.through_worker = storage == THROUGH_WORKER
        # Written data may stay in the kernel's page cache until a flush.
        self.uses_page_cache = self.through_worker and alignment == (1, 1)
        self.mapped = MappedImage(fd, size, read_only=read_only) if storage == IN_MEMORY else None
        self._record: npt.NDArray[np.void] = np.zeros(1, DEVICE)
        self.address = int(self._record.ctypes.data)
        memory, segment = alignment
        record = self._record[0]
        record["capacity"], record["read_only"] = size // SECTOR, read_only
        record["block_mask"], record["memory_mask"], record["segment_mask"] = block_size - 1, memory - 1, segment - 1
        record["storage"], record["fd"], record["block_device"] = storage, fd, stat.S_ISBLK(os.fstat(fd).st_mode)
        record["image"], record["zeros"] = self.mapped.address if self.mapped else 0, int(_zeros().ctypes.data)
        record["granule"] = granule(fd, page_cache=self.uses_page_cache)
        record["zones"] = zones
        record["lifetime"] = len(lifetime)
        record["lifetime_data"][: len(lifetime)] = np.frombuffer(lifetime, np.uint8)
        encoded = serial.encode()[:VIRTIO_BLK_ID_BYTES]
        record["serial"][: len(encoded)] = np.frombuffer(encoded, np.uint8)

    def close(self) -> None:
        """Unmap the image if it is mapped; no queue may be running. A second call does nothing."""
        if self.mapped is not None:
            self.mapped.close()

    def map(self, size: int) -> None:
        """Prepare for another size of the image, if it is mapped; raises OSError."""
        if self.mapped is not None:
            self.mapped.resize(size)

    @property
    def size(self) -> int:
        """How many bytes can be read and written. Before it grows, the larger image must have been mapped (`map`)."""
        return int(self._record["capacity"][0]) * SECTOR

    @size.setter
    def size(self, size: int) -> None:
        self._record["capacity"] = size // SECTOR

    @property
    def granule(self) -> int:
        """Ranges are discarded in whole multiples of this many bytes."""
        return int(self._record["granule"][0])

    @property
    def flush_failed(self) -> bool:
        """Whether earlier writes may be lost, so that every flush must fail."""
        return bool(self._record["flush_failed"][0])

    def set_flush_failed(self) -> None:
        """Make every flush fail from now on."""
        self._record["flush_failed"] = 1

    @property
    def lost_mapping(self) -> bool:
        """Whether pages of an image in memory were lost, so that it is served with system calls from now on."""
        return self.mapped is not None and self.mapped.lost


@dataclass(frozen=True, slots=True)
class InflightRegion:
    """The in-flight region of a ring (inflight/tracking.py): its address, in a mapping that this object keeps."""

    address: int
    mapping: Mapping


@dataclass(frozen=True, slots=True)
class DirtyLog:
    """The bitmap of the pages written during a migration (dirty.py), of `mapping.size` bytes."""

    mapping: Mapping


@dataclass(frozen=True, slots=True)
class RingLayout:
    """Where the driver has placed a ring, and how driver and device use it.

    Addresses are the front end's user addresses: of descriptors, driver area and device area. `base` is where to start,
    in the format of `Queue.base`; `features` are the negotiated feature bits.
    """

    size: int
    desc: int
    avail: int
    used: int
    base: int
    features: int
    write_through: bool
    inflight: InflightRegion | None = None
    log: DirtyLog | None = None

    @property
    def packed(self) -> bool:
        return bool(self.features & VIRTIO_F_RING_PACKED)


# The base of a new packed ring.
NEW_RING = 0x8000_8000


def _was_used(ring: int, size: int) -> bool:
    """Whether a packed ring at this address has completed a lap: then some descriptor in it was used.

    Not always the first one: if a chain began at the end of the previous lap, its descriptors at the start of the ring
    stay as the driver wrote them.
    """
    flags = (ctypes.c_uint16.from_address(ring + index * DESC_SIZE + DESC_FLAGS).value for index in range(size))
    return any(flag & VIRTQ_DESC_F_USED for flag in flags)


class OpenFile:
    """An open file of the image, and the flushes of the queues of one worker that share it (flush.py)."""

    def __init__(self, fd: int) -> None:
        """The caller keeps ownership of the fd. `address` is the address of a FLUSHES struct."""
        self.fd = fd
        self._flushes: npt.NDArray[np.void] = np.zeros(1, FLUSHES)
        self._flushes["flushing"] = self._flushes["first"] = -1
        self.address = int(self._flushes.ctypes.data)


# Shared by all queues that were never started, so that queues that a front end does not use cost nothing.
NO_COUNTERS: npt.NDArray[np.void] = np.zeros(len(KINDS), COUNTER)
NO_COUNTERS.flags.writeable = False
NO_MEMORY = MemoryTable()


class Queue:
    """A virtqueue. Its counters live as long as the disk; its ring as long as the driver has it configured."""

    def __init__(self, device: Device, number: int, file: OpenFile | None = None) -> None:
        """`file` is shared with other queues of the worker; None: the queue has its own flushes, on the device's fd."""
        self.number = number
        self.device = device
        self.file = file
        self.array: npt.NDArray[np.void] = np.zeros(1, QUEUE)
        self.address = int(self.array.ctypes.data)
        self.record = self.array[0]
        self.counters = NO_COUNTERS
        self.record["number"] = number
        self.record["device"] = device.address
        self.record["call_fd"] = -1
        # Keeps the mappings of the present table. The worker keeps a replaced table while requests still need it.
        self.memory = NO_MEMORY
        self.layout: RingLayout | None = None
        self.kick_fd = -1
        # The ring is broken and that was logged; the ring waits until memory that was removed is added again.
        self.broken_reported = self.suspended = False
        self.err_fd = -1

    @property
    def name(self) -> str:
        """The name in log lines."""
        return f"{self.device.name} queue {self.number}"

    @property
    def log_fields(self) -> dict[str, str]:
        """The `extra` of its log lines."""
        return {"disk": self.device.name}

    @property
    def fd(self) -> int:
        """The fd of the image that the queue uses for I/O."""
        return self.file.fd if self.file else self.device.fd

    def prepare(self) -> None:
        """Allocate the structs that only a started queue needs; a second call does nothing."""
        if self.counters is not NO_COUNTERS:
            return
        self.file = self.file or OpenFile(self.device.fd)
        self.failures: npt.NDArray[np.void] = np.zeros(len(KINDS), FAILURE)
        self.record["flushes"], self.record["failures"] = self.file.address, self.failures.ctypes.data
        counters: npt.NDArray[np.void] = np.zeros(len(KINDS), COUNTER)
        self.record["counters"] = counters.ctypes.data
        # Last, because other threads read them from now on.
        self.counters = counters

    @property
    def base(self) -> int:
        """Where the ring resumes: for a split ring the next available index.

        For a packed ring, from the lowest bit on, the positions of the next descriptor to take and of the next one to
        overwrite, 15 bits and a wrap counter each (vhost-user, "Vring descriptor indices for packed virtqueues").
        """
        record = self.record
        if not record["packed"]:
            return int(record["last_avail"])
        taken = int(record["last_avail"]) | int(record["avail_wrap"]) << 15
        return taken | int(record["next_used"]) << 16 | int(record["used_wrap"]) << 31

    def set_packed_base(self, base: int) -> None:
        """Start a packed ring at this base; raises BadMemory if that is outside the ring."""
        record = self.record
        if base == 0 and not _was_used(int(record["desc"]), int(record["size"])):
            # user-mode Linux sends 0 for a new ring, whose wrap counters are 1 (section 2.8.1).
            base = NEW_RING
        record["last_avail"], record["avail_wrap"] = base & 0x7FFF, base >> 15 & 1
        record["next_used"], record["used_wrap"] = base >> 16 & 0x7FFF, base >> 31 & 1
        record["batch"] = record["uncounted"] = 0
        if max(record["last_avail"], record["next_used"]) >= record["size"]:
            raise BadMemory(f"the base {base:#x} is outside the ring of {record['size']} descriptors")

    def set_log(self, log: DirtyLog | None) -> None:
        """Mark written pages in this log from now on, or in none. Nothing may be in flight; the layout keeps it."""
        self.record["log"], self.record["log_size"] = (log.mapping.address, log.mapping.size) if log else (0, 0)

    def track(self, region: InflightRegion | None) -> None:
        """Track the ring's chains in this in-flight region, and resume from its content; None: do not track.

        The ring must have been placed and its base set. Raises BadMemory.
        """
        record, size = self.record, int(self.record["size"])
        record["inflight"] = record["resubmits"] = record["batched"] = 0
        if region is None:
            return
        track = self._track_packed if record["packed"] else self._track_split
        tracking = track(region.address, size)
        self._resubmit = tracking.entries.astype(np.int64)
        # A driver that breaks the rules can have more chains used in one turn than the ring has descriptors.
        self._batch = np.zeros(2 * size, np.int64)
        record["counter"], record["batch_list"] = tracking.counter, self._batch.ctypes.data
        record["resubmit"], record["resubmits"] = self._resubmit.ctypes.data, len(self._resubmit)
        record["inflight"] = region.address

    def _track_split(self, region: int, size: int) -> SplitTracking:
        record = self.record
        tracking = SplitTracking(region, size, int(record["next_used"]))
        record["last_batch_head"] = tracking.last_batch_head
        if not tracking.is_new:
            # All chains up to there were fetched; those that are not used are in flight.
            record["last_avail"] = (int(record["next_used"]) + len(tracking.entries)) & INDEX_MASK
            record["seen_avail"] = record["last_avail"]
        return tracking

    def _track_packed(self, region: int, size: int) -> PackedTracking:
        record = self.record
        begin = Place(int(record["next_used"]), int(record["used_wrap"]))
        tracking = PackedTracking(region, size, int(record["desc"]), begin)
        self._lists = np.stack([tracking.links, tracking.lasts, tracking.counts])
        record["links"], record["lasts"], record["counts"] = (row.ctypes.data for row in self._lists)
        record["free_head"], record["places"] = tracking.free_head, tracking.places
        if not tracking.is_new:
            record["last_avail"], record["avail_wrap"] = tracking.avail.index, tracking.avail.wrap
            record["next_used"], record["used_wrap"] = tracking.used.index, tracking.used.wrap
        return tracking

    @property
    def in_flight(self) -> int:
        """Requests fetched and not yet completed."""
        return int(self.record["in_flight"])

    @property
    def broken(self) -> bool:
        """Whether the driver broke a rule of the ring and has not reset it since."""
        return bool(self.record["broken"])

    @property
    def running(self) -> bool:
        return bool(self.record["running"])
