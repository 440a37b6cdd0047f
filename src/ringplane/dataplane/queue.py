"""`Device` (a disk) and `Queue` (a virtqueue of it): the Python owners of the DEVICE, QUEUE and COUNTER structs."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ringplane.block.stack import Stack
from ringplane.dataplane.failures import Failures
from ringplane.dataplane.io_time import TICK_BITS
from ringplane.dataplane.limit_gate import Gate
from ringplane.dataplane.ring_states import RingEvent, RingState, RingStateMachine
from ringplane.dataplane.state import COUNTER, DEVICE, FAILURE, KINDS, QUEUE, REQUEST_TYPE, REQUEST_TYPES, RequestTypes
from ringplane.guest_memory import regions
from ringplane.guest_memory.address_space import BadMemory
from ringplane.guest_memory.regions import MemoryTable
from ringplane.inflight.area import InflightRegion
from ringplane.inflight.recover import PackedTracking, Place, SplitTracking
from ringplane.limits.member import Member
from ringplane.log.event_bus import Emit, no_events
from ringplane.native.structs import new
from ringplane.virtio.blk import SECTOR, VIRTIO_BLK_ID_BYTES
from ringplane.virtio.features import VIRTIO_F_RING_PACKED
from ringplane.virtio.packed import DESC_FLAGS, VIRTQ_DESC_F_USED
from ringplane.virtio.split import DESC_SIZE, INDEX_MASK

if TYPE_CHECKING:
    from ringplane.limits.limiter import Limiter

NO_TYPES: RequestTypes = {}


class Device:
    """What all queues of one disk share, besides its storage; `address` is the address of its DEVICE struct."""

    def __init__(
        self,
        size: int,
        *,
        read_only: bool,
        block_size: int,
        serial: str,
        name: str = "disk",
        lifetime: bytes = b"",
        request_types: RequestTypes = NO_TYPES,
        emit: Emit = no_events,
    ) -> None:
        """`size` and `block_size` in bytes.

        `name` is the name in log lines, `lifetime` the reply to GET_LIFETIME (empty: unsupported), `request_types` the
        types that are not in requests.py, `emit` reports what happens to the disk.
        """
        self.name = name
        self.emit = emit
        self.failures = Failures(name, emit)
        # The queues that have ever been started. The others have nothing in flight and have counted nothing.
        self.started: list[Queue] = []
        self._record: npt.NDArray[np.void] = np.zeros(1, DEVICE)
        self.address = int(self._record.ctypes.data)
        record = self._record[0]
        record["capacity"], record["read_only"] = size // SECTOR, read_only
        record["block_mask"] = block_size - 1
        record["lifetime"] = len(lifetime)
        record["lifetime_data"][: len(lifetime)] = np.frombuffer(lifetime, np.uint8)
        record["tick"] = time.monotonic_ns() >> TICK_BITS
        encoded = serial.encode()[:VIRTIO_BLK_ID_BYTES]
        record["serial"][: len(encoded)] = np.frombuffer(encoded, np.uint8)
        if request_types:
            self._types = np.zeros(REQUEST_TYPES, REQUEST_TYPE)
            for number, (begin, end) in request_types.items():
                self._types[number] = (begin.address(), end.address() if end else 0)
            record["request_types"] = self._types.ctypes.data

    @property
    def size(self) -> int:
        """How many bytes can be read and written. The source must have been prepared for a larger one."""
        return int(self._record["capacity"][0]) * SECTOR

    @size.setter
    def size(self, size: int) -> None:
        self._record["capacity"] = size // SECTOR

    def start(self, queue: Queue) -> None:
        """This queue has counters from now on, which other threads read."""
        self._record["queues"][0, queue.number] = queue.address
        self.started.append(queue)

    @property
    def busy_ticks(self) -> int:
        """For how many ticks it had requests in flight (io_time.py), as far as that is counted."""
        return int(self._record["busy_ticks"][0])

    @busy_ticks.setter
    def busy_ticks(self, ticks: int) -> None:
        self._record["busy_ticks"] = ticks


@dataclass(frozen=True, slots=True)
class DirtyLog:
    """The bitmap of the pages written during a migration (dirty.py), of `mapping.size` bytes."""

    mapping: regions.Mapping


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


NO_MEMORY = MemoryTable()


class Queue:
    """A virtqueue. Its counters live as long as the disk; its ring as long as the driver has it configured."""

    def __init__(self, device: Device, number: int, stack: Stack) -> None:
        """`stack` is shared with other queues of the disk on the same worker."""
        self.number = number
        self.device = device
        self.stack = stack
        self.array: npt.NDArray[np.void] = new(QUEUE)
        self.address = int(self.array.ctypes.data)
        self.record = self.array[0]
        self.record["number"] = number
        self.record["device"], self.record["stack"] = device.address, stack.address
        # Keeps the mappings of the present table. The worker keeps a replaced table while requests still need it.
        self.memory = NO_MEMORY
        self.layout: RingLayout | None = None
        self.kick_fd = -1
        self._gate: Gate | None = None
        self.ring_state = RingStateMachine(self.record)
        self.err_fd = -1

    @property
    def name(self) -> str:
        """The name in log lines."""
        return f"{self.device.name} queue {self.number}"

    @property
    def log_fields(self) -> dict[str, str]:
        """The `extra` of its log lines."""
        return {"disk": self.device.name}

    def prepare(self) -> None:
        """Allocate the structs that only a started queue needs; a second call does nothing."""
        if self in self.device.started:
            return
        self.failures: npt.NDArray[np.void] = np.zeros(len(KINDS), FAILURE)
        self.record["failures"] = self.failures.ctypes.data
        self.counters: npt.NDArray[np.void] = np.zeros(len(KINDS), COUNTER)
        self.record["counters"] = self.counters.ctypes.data
        # Last, because other threads read them from now on.
        self.device.start(self)

    def resume_counters(self, counted: npt.NDArray[np.int64]) -> None:
        """Continue to count for another process. No worker may use the queue yet."""
        self.prepare()
        self.counters.view(np.int64)[:] = counted

    def make_gate(self, member: Member) -> None:
        """Load and allocate what limits need; a second call does nothing."""
        if self._gate is None:
            self._gate = Gate(self.address, member)

    def limit(self, limiter: Limiter | None) -> None:
        """Called on the worker's thread, after `make_gate`: these limits hold for what is fetched from now on."""
        assert self._gate is not None
        if limiter is not None:
            self._gate.use(limiter)
        self.record["gate"] = self._gate.address if limiter is not None else 0

    def drop_memory(self) -> None:
        """A ring that is not served keeps no mapping."""
        self.memory, self.layout = NO_MEMORY, None

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
    def state(self) -> RingState:
        return self.ring_state.state

    def reset(self) -> None:
        """Forget that the driver broke a rule, or that the worker failed; the ring must not be served by a live one."""
        self.ring_state.apply(RingEvent.RESET)

    def take_over_broken(self, rule: int) -> None:
        """Resume from a process in which the driver broke this rule. No worker may use the queue yet."""
        self.prepare()
        self.ring_state.apply(RingEvent.TAKE_OVER_BROKEN)
        self.record["broken"] = rule
