"""In-flight tracking: the process may end between any two stores, and no chain is lost or used twice."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringplane.block.sources.null import NullPart
from ringplane.block.stack import Stack
from ringplane.dataplane.queue import Device, Queue
from ringplane.guest_memory.address_space import BadMemory
from ringplane.guest_memory.regions import Mapping
from ringplane.inflight import tracking
from ringplane.inflight.area import InflightRegion
from ringplane.native import access
from ringplane.virtio import packed, ring, split

from .packed_ring import PackedRing
from .rig import Guest, Piece, Ring

MODULES = (tracking, packed, ring, split)
WIDTHS = {"8": ctypes.c_uint8, "16": ctypes.c_uint16, "32": ctypes.c_uint32, "64": ctypes.c_int64}


class Killed(Exception):
    """The process ends here."""


class Stores:
    """Counts stores, and ends the process before the first store above the limit."""

    left: int | None = None

    def count(self) -> None:
        if self.left is not None:
            if self.left == 0:
                raise Killed
            self.left -= 1


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Stores:
    """Run the functions of the rings and of the tracking as plain Python, and count each of their stores."""
    stores = Stores()

    def load(kind: Any) -> Callable[[int], int]:
        return lambda address: int(kind.from_address(int(address)).value)

    def store(kind: Any) -> Callable[[int, int], None]:
        def store_one(address: int, value: int) -> None:
            stores.count()
            kind.from_address(int(address)).value = int(value)

        return store_one

    plain: dict[str, object] = {"fence": lambda: None}
    for width, kind in WIDTHS.items():
        plain |= {f"load{width}": load(kind), f"load{width}_acquire": load(kind)}
        plain |= {f"store{width}": store(kind), f"store{width}_release": store(kind)}
    for module in MODULES:
        for name, value in list(vars(module).items()):
            if name in plain and value is getattr(access, name, None):
                monkeypatch.setattr(module, name, plain[name])
            elif hasattr(value, "__wrapped__"):
                monkeypatch.setattr(module, name, value.__wrapped__)
    return stores


@pytest.fixture
def device() -> Device:
    return Device(512, read_only=False, block_size=512, serial="")


class Memory:
    """A guest with one ring, and the region that outlives the processes that serve it."""

    def __init__(self, ring_class: Any, size: int) -> None:
        self.guest = Guest(4 << 20)
        self.size, self.packed = size, ring_class is PackedRing
        self.ring = ring_class(self.guest, size)
        length = tracking.region_bytes(size, packed=self.packed)
        self.fd = os.memfd_create("region")
        os.ftruncate(self.fd, length)
        mapping = Mapping(self.fd, length, 0)
        self.region = InflightRegion(mapping.address, mapping)
        self.numbers: dict[int, int] = {}
        self.offered = 0
        self.order: list[int] = []

    def offer(self, descriptors: int) -> None:
        """Make a chain available if there is room; chains are numbered in order."""
        if self.ring.has_room(descriptors):
            pending = self.ring.add([Piece(4096, 1, False)] * descriptors)
            self.ring.put_available(pending.head)
            self.ring.publish()
            self.numbers[pending.head] = self.offered
            self.offered += 1

    def collect(self) -> None:
        """Take back used chains; a chain that is used twice or was never offered is a KeyError."""
        for pending in self.ring.collect():
            del self.numbers[pending.head]

    def close(self) -> None:
        self.guest.close()
        os.close(self.fd)


class Fields:
    """The fields of a struct as attributes, for compiled functions that run as Python."""

    def __init__(self, record: np.void) -> None:
        object.__setattr__(self, "record", record)

    def __getattr__(self, name: str) -> int:
        return int(self.record[name])

    def __setattr__(self, name: str, value: int) -> None:
        self.record[name] = value


class Process:
    """One process that serves the device: it knows only what is in the memory."""

    def __init__(self, memory: Memory, device: Device) -> None:
        self.memory = memory
        self.queue = Queue(device, 0, Stack(NullPart()))
        record, start = self.queue.record, memory.guest.address
        record["size"], record["packed"] = memory.size, memory.packed
        for name in ("desc", "avail", "used"):
            record[name] = start + getattr(memory.ring, name)
        if memory.packed:
            # The base that a front end sends if it does not know the ring's state.
            self.queue.set_packed_base(0x8000_8000)
        else:
            used_idx = ctypes.c_uint16.from_address(int(record["used"]) + split.USED_IDX).value
            record["next_used"] = record["last_avail"] = record["seen_avail"] = used_idx
        self.queue.track(memory.region)
        self.state: Any = Fields(self.queue.record)
        self.in_flight: list[tuple[int, int, int]] = []  # the driver's id of the chain, entry, descriptors

    def recovered(self) -> list[int]:
        """The numbers of the chains that the last process had in flight, in the order of resubmission."""
        entries = ctypes.cast(int(self.state.resubmit or 1), ctypes.POINTER(ctypes.c_int64))
        numbers = []
        for index in range(int(self.state.resubmits)):
            entry = entries[index]
            name, count = (entry, 1) if not self.memory.packed else self._copied(entry)
            self.in_flight.append((name, entry, count))
            numbers.append(self.memory.numbers[name])
        self.state.resubmits = 0
        return numbers

    def _copied(self, entry: int) -> tuple[int, int]:
        """The id of a chain according to its copied descriptors, and their number."""
        count = ctypes.c_int64.from_address(int(self.state.counts) + 8 * entry).value
        for _ in range(count):
            _, _, name, _ = tracking.read_copy(self.state, entry)
            entry = tracking.next_free(self.state, entry)
        return name, count

    def fetch(self) -> bool:
        """Fetch the next chain like dataplane/fetch.py and loop.py; returns whether there was one."""
        state = self.state
        if not ring.available(state):
            return False
        if not self.memory.packed:
            head = split.take_head(state)
            tracking.fetch_split(state, head)
            self.in_flight.append((head, head, 1))
            self.memory.order.append(self.memory.numbers[head])
            return True
        index, entry, count, flags = int(state.last_avail), int(state.free_head), 0, split.VIRTQ_DESC_F_NEXT
        while flags & split.VIRTQ_DESC_F_NEXT:
            addr, length, name, flags = packed.read_desc(int(state.desc), index)
            entry = tracking.copy_descriptor(state, entry, addr, length, name, flags)
            index, count = (index + 1) % self.memory.size, count + 1
        packed.take(state, count)
        entry = tracking.fetch_packed(state, count)
        self.in_flight.append((name, entry, count))
        self.memory.order.append(self.memory.numbers[name])
        return True

    def complete(self, which: int) -> None:
        if self.in_flight:
            name, entry, count = self.in_flight.pop(which % len(self.in_flight))
            tracking.use(self.state, entry, name, count, 0)
            if self.memory.packed:
                self.publish()

    def publish(self) -> None:
        tracking.publish(self.state)


def check_recovery(memory: Memory, process: Process) -> None:
    """Check that exactly the fetched, unused chains are in flight, oldest first, and that the rest can be fetched."""
    recovered = process.recovered()
    assert recovered == sorted(recovered)
    assert set(recovered) <= set(memory.numbers.values())
    fetched = [number for number in memory.order if number in memory.numbers.values()]
    # The process may have ended before the chain that it was fetching was recorded.
    missing = set(fetched) - set(recovered)
    assert all(number > max(recovered, default=-1) for number in missing)


def live(memory: Memory, process: Process, draw: random.Random, steps: int) -> None:
    """Random work of driver and device, in the order of the loop."""
    for _ in range(steps):
        for _ in range(draw.randrange(4)):
            memory.offer(draw.choice([1, 1, 2, 3]) if memory.packed else 1)
        for _ in range(draw.randrange(4)):
            process.fetch()
        for _ in range(draw.randrange(4)):
            process.complete(draw.randrange(100))
        process.publish()
        memory.collect()


def finish(memory: Memory, device: Device) -> None:
    """A last process completes everything that is left: then nothing was lost."""
    process = Process(memory, device)
    check_recovery(memory, process)
    while process.fetch() or process.in_flight:
        process.complete(0)
        process.publish()
        memory.collect()
    assert memory.numbers == {}
    assert memory.ring.pending == {}


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([4, 8, 16]), ring_class=st.sampled_from([Ring, PackedRing]))
def test_killed_at_any_moment(stores: Stores, device: Device, seed: int, size: int, ring_class: Any) -> None:
    draw, memory = random.Random(seed), Memory(ring_class, size)
    for _ in range(20):
        process = Process(memory, device)
        check_recovery(memory, process)
        stores.left = draw.randrange(120)
        try:
            live(memory, process, draw, 40)
        except Killed:
            memory.collect()
        stores.left = None
    finish(memory, device)
    memory.close()


@pytest.mark.parametrize("ring_class", [Ring, PackedRing])
def test_killed_at_each_store(stores: Stores, device: Device, ring_class: Any) -> None:
    """The same work is repeated, killed before its first store, before its second, and so on."""
    at = 0
    while True:
        memory = Memory(ring_class, 8)
        process = Process(memory, device)
        stores.left = at
        try:
            live(memory, process, random.Random(7), 12)
            ended = True
        except Killed:
            ended = False
            memory.collect()
        stores.left = None
        finish(memory, device)
        memory.close()
        if ended:
            break
        at += 1
    assert at > 100


def test_requests_are_recorded_before_the_first_completion(stores: Stores, device: Device) -> None:
    for ring_class in (Ring, PackedRing):
        memory = Memory(ring_class, 8)
        process = Process(memory, device)
        for _ in range(3):
            memory.offer(1)
            assert process.fetch()
        assert Process(memory, device).recovered() == [0, 1, 2]
        memory.close()


# Invalid regions


def broken_region(memory: Memory, device: Device, harm: Callable[[Any, Any], None]) -> None:
    """Start a process with a region that had two chains in flight and was then changed by the front end."""
    process = Process(memory, device)
    for _ in range(4):
        memory.offer(1)
        process.fetch()
    process.complete(0)
    process.complete(0)
    process.publish()
    kinds = (
        (tracking.REGION_PACKED, tracking.STATE_PACKED)
        if memory.packed
        else (tracking.REGION_SPLIT, tracking.STATE_SPLIT)
    )
    content = (ctypes.c_uint8 * memory.region.mapping.size).from_address(memory.region.address)
    head = np.frombuffer(memoryview(content).cast("B"), kinds[0], 1)
    states = np.frombuffer(memoryview(content).cast("B"), kinds[1], memory.size, kinds[0].itemsize)
    harm(head[0], states)
    Process(memory, device)


def setting(field: str, value: int) -> Callable[[Any, Any], None]:
    return lambda head, states: head.__setitem__(field, value)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (setting("version", 2), "version 2 and 8 descriptors, not version 1 and 8 descriptors"),
        (setting("desc_num", 9), "version 1 and 9 descriptors"),
        (lambda head, states: (head.__setitem__("used_idx", 0), head.__setitem__("last_batch_head", 8)), "leads to"),
    ],
)
def test_invalid_split_regions(stores: Stores, device: Device, harm: Callable[[Any, Any], None], sentence: str) -> None:
    memory = Memory(Ring, 8)
    with pytest.raises(BadMemory, match=sentence):
        broken_region(memory, device, harm)
    memory.close()


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (setting("version", 2), "version 2 and 8 descriptors"),
        (setting("old_used_idx", 8), "has descriptor 8"),
        (setting("old_used_wrap_counter", 2), "wrap counter 2"),
        (setting("old_free_head", 9), "has no end"),
        (lambda head, states: states["next"].__setitem__(slice(None), 0), "has no end"),
        (lambda head, states: states["num"].__setitem__(slice(None), 0), "is not whole"),
        (lambda head, states: states["num"].__setitem__(slice(None), 9), "is not whole"),
        (lambda head, states: states["inflight"].__setitem__(slice(None), 0), "neither free nor in flight"),
    ],
)
def test_invalid_packed_regions(
    stores: Stores, device: Device, harm: Callable[[Any, Any], None], sentence: str
) -> None:
    memory = Memory(PackedRing, 8)
    with pytest.raises(BadMemory, match=sentence):
        broken_region(memory, device, harm)
    memory.close()


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32), ring_class=st.sampled_from([Ring, PackedRing]))
def test_random_bytes_in_a_region_are_accepted_or_rejected(
    stores: Stores, device: Device, seed: int, ring_class: Any
) -> None:
    draw, memory = random.Random(seed), Memory(ring_class, 8)

    def harm(head: Any, states: Any) -> None:
        for _ in range(draw.randrange(1, 5)):
            place = memory.region.address + draw.randrange(memory.region.mapping.size)
            ctypes.c_uint8.from_address(place).value = draw.choice([0, 1, 7, 8, 255, draw.randrange(256)])

    with suppress(BadMemory):
        broken_region(memory, device, harm)
    memory.close()


def test_layouts() -> None:
    """The layouts of the specification's C structs, which other back ends use."""
    assert (tracking.SPLIT_SIZE, tracking.SPLIT_STATE_SIZE) == (16, 16)
    assert (tracking.PACKED_SIZE, tracking.PACKED_STATE_SIZE) == (32, 32)
    assert tracking.region_bytes(128, packed=False) == 2112
