"""From chains to requests: `gather` with random rings and memories has the same results as the model."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringplane.block.io import BLOCK_IO
from ringplane.dataplane import ring_rules
from ringplane.dataplane.fetch import gather
from ringplane.dataplane.state import MAX_IOVECS, QUEUE, REQUEST
from ringplane.guest_memory.regions import REGION
from ringplane.native.uio import IOVEC

from . import model
from .model import INDIRECT, NEXT, WRITE, Area, Broken, Buffer, Descriptor
from .on_structs import on_structs

RULE_OF_NAME = {name: value for name, value in vars(ring_rules).items() if type(value) is int and name != "MAX_IOVECS"}
NAME_OF_RULE = {value: name for name, value in RULE_OF_NAME.items()}
GUARD = 64


class Fetcher:
    """A QUEUE and a REQUEST with separate memory, in which the areas of the model are at other addresses."""

    def __init__(self, areas: list[Area], table: list[Descriptor], *, indirect: bool = True) -> None:
        self.areas = areas
        # With gaps: areas that are adjacent in the guest are not adjacent here.
        self.hosts = [np.frombuffer(bytearray(bytes(GUARD) + area.content), np.uint8) for area in areas]
        self.regions = np.zeros(max(1, len(areas)), REGION)
        for region, area, host in zip(self.regions, areas, self.hosts, strict=True):
            region["guest"], region["size"] = area.start, len(area.content)
            region["host"] = host.ctypes.data + GUARD
        self.table = np.frombuffer(b"".join(descriptor.pack() for descriptor in table), np.uint8)
        self.iovecs = np.zeros(MAX_IOVECS + 1, IOVEC)
        self.queue, self.request, self.io = np.zeros(1, QUEUE), np.zeros(1, REQUEST), np.zeros(1, BLOCK_IO)
        self.queue["desc"], self.queue["size"] = self.table.ctypes.data, len(table)
        self.queue["regions"], self.queue["region_count"] = self.regions.ctypes.data, len(areas)
        self.queue["indirect"] = indirect
        self.request["iovecs"] = self.iovecs.ctypes.data

    def gather(self, head: int) -> int:
        self.request["head"] = head
        rule = on_structs(gather)(self.queue[0], self.request[0], self.io[0])
        assert self.iovecs[MAX_IOVECS]["base"] == 0, "written beyond the iovecs"
        return int(rule)

    def locate(self, host: int, length: int) -> Buffer:
        """The place in the model for an address in this process."""
        for number, region in enumerate(self.regions):
            offset = host - int(region["host"])
            if offset >= 0 and offset + length <= int(region["size"]):
                return Buffer(number, offset, length)
        raise AssertionError(f"{length} bytes at {host:#x} are in no region")

    def buffers(self, address: int, count: int) -> list[Buffer]:
        first = (address - self.iovecs.ctypes.data) // IOVEC.itemsize
        return [self.locate(int(iovec["base"]), int(iovec["len"])) for iovec in self.iovecs[first : first + count]]

    def fetched(self) -> model.Request:
        """The request as the data plane uses it: the same fields as in `execute`."""
        request, io = self.request[0], self.io[0]
        writable = int(request["iovecs"]) + int(request["readable_count"]) * IOVEC.itemsize
        result = model.Request(
            struct.pack("<QQ", int(request["header_type"]) % 2**64, int(request["header_sector"]) % 2**64),
            self.buffers(int(io["iov"]), int(io["iov_count"])),
            self.buffers(writable, int(request["writable_count"])),
            self.locate(int(request["status_address"]), 1),
        )
        assert request["readable_bytes"] == sum(buffer.length for buffer in result.readable)
        assert request["writable_bytes"] == sum(buffer.length for buffer in result.writable)
        return result


def by_the_model(areas: list[Area], table: list[Descriptor], head: int, indirect: bool) -> model.Request | str:
    """The request according to the model, or the name of the rule that the chain breaks."""
    memory = model.Memory(areas)
    try:
        return model.parse_request(memory, model.read_chain(memory, table, head, indirect))
    except Broken as broken:
        return str(broken.args[0])


def by_gather(areas: list[Area], table: list[Descriptor], head: int, indirect: bool) -> model.Request | str:
    fetcher = Fetcher(areas, table, indirect=indirect)
    rule = fetcher.gather(head)
    return fetcher.fetched() if rule == ring_rules.OK else NAME_OF_RULE[rule]


def assert_like_the_model(areas: list[Area], table: list[Descriptor], head: int, indirect: bool) -> None:
    assert by_gather(areas, table, head, indirect) == by_the_model(areas, table, head, indirect)


# Memory: some regions with or without holes between them, with random contents.


@st.composite
def memories(draw: st.DrawFn) -> list[Area]:
    areas = []
    start = draw(st.sampled_from([0, 0x1000, 2**32 - 700, 2**62]))
    for number in range(draw(st.integers(1, 5))):
        start += draw(st.sampled_from([0, 0, 0, 1, 5000]))
        size = draw(st.integers(1, 60)) if draw(st.booleans()) else draw(st.integers(600, 1500))
        pattern = bytes((number * 31 + position * 7) % 256 for position in range(256))
        areas.append(Area(start, bytearray((pattern * 6)[:size])))
        start += size
    if draw(st.booleans()):
        # A region that ends at the last possible address.
        areas.append(Area(2**63 - 301, bytearray(300)))
    return areas


@st.composite
def ranges(draw: st.DrawFn, areas: list[Area]) -> tuple[int, int]:
    """(address, length) inside the memory, sometimes across adjacent regions."""
    area = draw(st.sampled_from(areas))
    addr = area.start + draw(st.integers(0, len(area.content) - 1))
    end = area.start + len(area.content)
    for other in areas:
        if other.start == end:
            end += len(other.content)
    at_most = end - addr
    return addr, draw(st.one_of(st.integers(1, at_most), st.integers(1, min(at_most, 20))))


@st.composite
def requests(draw: st.DrawFn, areas: list[Area]) -> list[Descriptor]:
    """The buffers of a request in order, without `next`: enough to read for a header, at least one to write."""
    readable = draw(st.lists(ranges(areas), min_size=1, max_size=6))
    writable = draw(st.lists(ranges(areas), min_size=1, max_size=6))
    return [Descriptor(*buffer, 0, 0) for buffer in readable] + [Descriptor(*buffer, WRITE, 0) for buffer in writable]


def scatter(descriptors: list[Descriptor], places: list[int], table: list[Descriptor]) -> None:
    """Put a chain into these entries of a table."""
    followers = [*places[1:], 0]
    for place, following, descriptor in zip(places, followers, descriptors, strict=True):
        more = NEXT if place != places[-1] else 0
        table[place] = descriptor._replace(flags=descriptor.flags | more, next=following)


@st.composite
def direct_chains(draw: st.DrawFn) -> tuple[list[Area], list[Descriptor], int]:
    areas = draw(memories())
    descriptors = draw(requests(areas))
    table = [Descriptor(0, 0, 0, 0)] * 16
    places = draw(st.permutations(range(16)))[: len(descriptors)]
    scatter(descriptors, places, table)
    return areas, table, places[0]


@st.composite
def indirect_chains(draw: st.DrawFn) -> tuple[list[Area], list[Descriptor], int]:
    """Some descriptors in the ring's table, maybe only one; the last one refers to a table with the others."""
    areas = draw(memories())
    start = areas[-1].start + len(areas[-1].content)
    descriptors = draw(requests(areas))
    direct = draw(st.integers(0, len(descriptors) - 1))
    entries = draw(st.integers(len(descriptors) - direct, 20))
    # In a table in memory the chain continues at the first entry; the others are anywhere.
    places = [0, *draw(st.permutations(range(1, entries)))][: len(descriptors) - direct]
    table = [Descriptor(0, 0, 0, 0)] * entries
    scatter(descriptors[direct:], places, table)
    content = b"".join(descriptor.pack() for descriptor in table)
    lead = draw(st.integers(0, 40))
    if start < 2**62:
        areas.append(Area(start, bytearray(lead) + content))
    else:
        start = 2**61
        areas.insert(0, Area(start, bytearray(lead) + content))
    ignored_write = draw(st.sampled_from([0, WRITE]))
    referring = Descriptor(start + lead, len(content), INDIRECT | ignored_write, 0)
    ring = [Descriptor(0, 0, 0, 0)] * 16
    ring_places = draw(st.permutations(range(16)))[: direct + 1]
    scatter([*descriptors[:direct], referring], ring_places, ring)
    return areas, ring, ring_places[0]


@given(direct_chains(), st.booleans())
def test_direct_chains(chain: tuple[list[Area], list[Descriptor], int], indirect: bool) -> None:
    assert_like_the_model(*chain, indirect)


@given(indirect_chains())
def test_indirect_chains(chain: tuple[list[Area], list[Descriptor], int]) -> None:
    assert_like_the_model(*chain, indirect=True)


# Damage: one field of one descriptor of a valid chain, in the ring or in an indirect table.

odd_addresses = st.sampled_from([0, 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 16])
odd_lengths = st.sampled_from([0, 1, 15, 17, 2**31, 2**32 - 1])


@given(direct_chains() | indirect_chains(), st.data())
@settings(max_examples=300)
def test_damaged_chains(chain: tuple[list[Area], list[Descriptor], int], data: st.DataObject) -> None:
    areas, table, head = chain
    damages = st.fixed_dictionaries(
        {},
        optional={
            "addr": odd_addresses,
            "length": odd_lengths,
            "flags": st.integers(0, 7),
            "next": st.integers(0, 17) | st.just(65535),
        },
    )
    damage: Callable[[Descriptor], Descriptor] = lambda entry: entry._replace(**data.draw(damages))  # noqa: E731
    referring = [entry for entry in table if entry.flags & INDIRECT]
    if referring and data.draw(st.booleans()):
        (area,) = (area for area in areas if area.start <= referring[0].addr < area.start + len(area.content))
        offset = referring[0].addr - area.start
        place = offset + 16 * data.draw(st.integers(0, referring[0].length // 16 - 1))
        entry = Descriptor(*model.DESCRIPTOR.unpack_from(area.content, place))
        model.DESCRIPTOR.pack_into(area.content, place, *damage(entry))
    else:
        used = [place for place, entry in enumerate(table) if entry.length]
        place = data.draw(st.sampled_from(used))
        table[place] = damage(table[place])
    assert_like_the_model(areas, table, head, indirect=data.draw(st.booleans()))


@given(memories(), st.data())
@settings(max_examples=200)
def test_garbage(areas: list[Area], data: st.DataObject) -> None:
    edges = [edge for area in areas for edge in (area.start - 1, area.start, area.start + len(area.content) - 1)]
    addresses = st.sampled_from([edge for edge in edges if edge >= 0]) | odd_addresses
    descriptors = st.builds(
        Descriptor, addresses, st.sampled_from([16, 1, 32]) | odd_lengths, st.integers(0, 65535), st.integers(0, 5)
    )
    table = data.draw(st.lists(descriptors, min_size=4, max_size=4))
    assert_like_the_model(areas, table, data.draw(st.integers(0, 4)), data.draw(st.booleans()))


# One example of each rule, in a memory of two adjoining regions, a hole, and a third.


def plain_memory() -> list[Area]:
    return [Area(0x1000, bytearray(0x1000)), Area(0x2000, bytearray(0x1000)), Area(0x8000, bytearray(0x10000))]


def ring_of(*entries: Descriptor, size: int = 8) -> list[Descriptor]:
    return [*entries, *[Descriptor(0, 0, 0, 0)] * (size - len(entries))]


HEADER = Descriptor(0x1000, 16, NEXT, 1)
STATUS = Descriptor(0x1800, 1, WRITE, 0)
TABLE = 0x8000
BROKEN: dict[str, tuple[int, list[Descriptor], list[Descriptor]]] = {
    # rule: (head, ring, indirect table)
    "HEAD_RANGE": (8, ring_of(HEADER, STATUS), []),
    "NEXT_RANGE": (0, ring_of(HEADER._replace(next=8), STATUS), []),
    "LOOP": (0, ring_of(HEADER, Descriptor(0x1100, 4, NEXT, 0)), []),
    "ZERO_LENGTH": (0, ring_of(HEADER, STATUS._replace(length=0)), []),
    "ADDRESS": (0, ring_of(HEADER, STATUS._replace(addr=0x3000)), []),
    "ORDER": (0, ring_of(HEADER, STATUS._replace(flags=WRITE | NEXT, next=2), Descriptor(0x1000, 4, 0, 0)), []),
    "TOO_MANY_BYTES": (0, ring_of(HEADER, STATUS._replace(length=2**32 - 15)), []),
    "TOO_MANY_SEGMENTS": (
        0,
        ring_of(HEADER, Descriptor(TABLE, 16 * 1028, INDIRECT, 0)),
        [Descriptor(0x1800, 1, WRITE | NEXT, number + 1) for number in range(1028)],
    ),
    "INDIRECT_NESTED": (0, ring_of(Descriptor(TABLE, 16, INDIRECT, 0)), [Descriptor(TABLE, 16, INDIRECT, 0)]),
    "INDIRECT_NEXT": (0, ring_of(Descriptor(TABLE, 16, INDIRECT | NEXT, 1), STATUS), [HEADER]),
    "INDIRECT_LENGTH": (0, ring_of(Descriptor(TABLE, 24, INDIRECT, 0)), [HEADER, STATUS]),
    "INDIRECT_ADDRESS": (0, ring_of(Descriptor(0x2FF0, 32, INDIRECT, 0)), []),
    "NO_HEADER": (0, ring_of(HEADER._replace(length=15), STATUS), []),
    "NO_STATUS": (0, ring_of(HEADER, Descriptor(0x1800, 1, 0, 0)), []),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule(rule: str) -> None:
    head, ring, table = BROKEN[rule]
    areas = plain_memory()
    content = b"".join(entry.pack() for entry in table)
    areas[2].content[: len(content)] = content
    assert Fetcher(areas, ring).gather(head) == RULE_OF_NAME[rule]
    assert_like_the_model(areas, ring, head, indirect=True)


def test_an_indirect_descriptor_needs_the_feature() -> None:
    areas = plain_memory()
    areas[2].content[:32] = HEADER.pack() + STATUS.pack()
    ring = ring_of(Descriptor(TABLE, 32, INDIRECT, 0))
    assert Fetcher(areas, ring, indirect=True).gather(0) == ring_rules.OK
    assert Fetcher(areas, ring, indirect=False).gather(0) == ring_rules.INDIRECT_NOT_NEGOTIATED


def test_every_rule_has_an_example() -> None:
    elsewhere = {"OK", "INDIRECT_NOT_NEGOTIATED", "AVAIL_INDEX", "TOO_MANY_IN_FLIGHT"}
    assert set(BROKEN) == set(RULE_OF_NAME) - elsewhere
    assert set(ring_rules.MESSAGES) == set(NAME_OF_RULE) - {ring_rules.OK}


# Edge cases that random choice would rarely hit.


@pytest.mark.parametrize("length", [0, 8, 15, 17, 2**32 - 16])
def test_a_bad_length_of_an_indirect_table(length: int) -> None:
    rule = Fetcher(plain_memory(), ring_of(Descriptor(TABLE, length, INDIRECT, 0))).gather(0)
    assert rule == (ring_rules.INDIRECT_ADDRESS if length == 2**32 - 16 else ring_rules.INDIRECT_LENGTH)


@pytest.mark.parametrize(
    "addr", [0xFFF, 0x3000, 0x7FFF, 0x18000, 2**63 - 1, 2**63, 2**63 + 0x1000, 2**64 - 1, 2**64 - 0x1000]
)
def test_an_address_outside_breaks_the_ring(addr: int) -> None:
    ring = ring_of(HEADER, STATUS._replace(addr=addr))
    assert Fetcher(plain_memory(), ring).gather(0) == ring_rules.ADDRESS


@pytest.mark.parametrize(("addr", "length"), [(0x2FFF, 2), (0x1000, 0x2001), (0x17FFF, 2), (0x8000, 2**32 - 16)])
def test_a_range_that_runs_out_of_memory_breaks_the_ring(addr: int, length: int) -> None:
    ring = ring_of(HEADER, STATUS._replace(addr=addr, length=length))
    assert Fetcher(plain_memory(), ring).gather(0) == ring_rules.ADDRESS


def test_a_range_may_end_at_the_last_address_but_not_one_byte_later() -> None:
    areas = [*plain_memory(), Area(2**63 - 17, bytearray(16))]
    good = ring_of(HEADER, STATUS._replace(addr=2**63 - 17, length=16))
    assert Fetcher(areas, good).gather(0) == ring_rules.OK
    bad = ring_of(HEADER, STATUS._replace(addr=2**63 - 17, length=17))
    assert Fetcher(areas, bad).gather(0) == ring_rules.ADDRESS


def test_without_memory_every_address_is_outside() -> None:
    fetcher = Fetcher(plain_memory(), ring_of(HEADER, STATUS))
    fetcher.queue["region_count"] = 0
    assert fetcher.gather(0) == ring_rules.ADDRESS


@pytest.mark.parametrize(
    ("cuts", "rule"), [(1024, ring_rules.OK), (1027, ring_rules.OK), (1028, ring_rules.TOO_MANY_SEGMENTS)]
)
def test_the_largest_number_of_segments(cuts: int, rule: int) -> None:
    """A header and `cuts` more descriptors in an indirect table that is longer than the ring."""
    areas = plain_memory()
    entries = [HEADER] + [Descriptor(0x1800, 1, WRITE | NEXT, number + 2) for number in range(cuts)]
    entries[-1] = entries[-1]._replace(flags=WRITE)
    areas[2].content[: 16 * len(entries)] = b"".join(entry.pack() for entry in entries)
    fetcher = Fetcher(areas, ring_of(Descriptor(TABLE, 16 * len(entries), INDIRECT, 0)))
    assert fetcher.gather(0) == rule
    if rule == ring_rules.OK:
        assert fetcher.request["writable_count"] == cuts - 1


def test_a_chain_of_the_whole_ring_is_not_a_loop() -> None:
    ring = [Descriptor(0x1000, 16, NEXT, number + 1) for number in range(7)] + [STATUS]
    assert Fetcher(plain_memory(), ring).gather(0) == ring_rules.OK


def test_a_loop_of_the_whole_ring_is_detected_before_a_descriptor_is_read_again() -> None:
    ring = [HEADER, STATUS._replace(flags=WRITE | NEXT, next=0)]
    assert Fetcher(plain_memory(), ring).gather(0) == ring_rules.LOOP


def test_nothing_is_left_of_the_previous_chain() -> None:
    fetcher = Fetcher(plain_memory(), ring_of(HEADER, STATUS._replace(length=100)))
    assert fetcher.gather(0) == ring_rules.OK
    first = fetcher.fetched()
    assert fetcher.gather(0) == ring_rules.OK
    assert fetcher.fetched() == first


class Huge:
    """A small region with a header, and one of 2^33 bytes without memory, because nothing accesses it."""

    def __init__(self) -> None:
        self.fetcher = Fetcher([Area(0, bytearray(0x1000))], ring_of(HEADER, STATUS))
        self.regions = np.zeros(2, REGION)
        self.regions[0] = self.fetcher.regions[0]
        self.regions[1] = (0x1000, 2**33, 2**40)
        self.fetcher.queue["regions"], self.fetcher.queue["region_count"] = self.regions.ctypes.data, 2

    def gather(self, *lengths: int) -> int:
        """Gather a chain of the header and buffers of these lengths."""
        entries = [Descriptor(0, 16, NEXT, 1)]
        entries += [Descriptor(0x1000, length, WRITE | NEXT, number + 2) for number, length in enumerate(lengths)]
        entries[-1] = entries[-1]._replace(flags=WRITE)
        table = ring_of(*entries)
        self.fetcher.table = np.frombuffer(b"".join(entry.pack() for entry in table), np.uint8)
        self.fetcher.queue["desc"] = self.fetcher.table.ctypes.data
        return self.fetcher.gather(0)


@pytest.mark.parametrize(
    ("lengths", "rule"),
    [
        ((2**32 - 16,), ring_rules.OK),
        ((2**32 - 15,), ring_rules.TOO_MANY_BYTES),
        ((2**31, 2**31 - 16), ring_rules.OK),
        ((2**31, 2**31 - 15), ring_rules.TOO_MANY_BYTES),
        ((2**32 - 1, 2**32 - 1), ring_rules.TOO_MANY_BYTES),
    ],
)
def test_a_chain_has_at_most_2_to_the_32_bytes(lengths: tuple[int, ...], rule: int) -> None:
    huge = Huge()
    assert huge.gather(*lengths) == rule
    if rule == ring_rules.OK:
        assert huge.fetcher.request["writable_bytes"] == sum(lengths) - 1
