"""Guest memory: invalid regions, translation at every edge, and the lifetime of mappings."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringplane.guest_memory.address_space import BadMemory
from ringplane.guest_memory.regions import REGION, MemoryTable, Region, find_region

from .rig import is_mapped

PAGE = mmap.PAGESIZE
SIZE = 16 * PAGE


@pytest.fixture
def fd() -> Iterator[int]:
    """A memfd in which each byte is the number of its page."""
    fd = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.write(fd, b"".join(bytes([page]) * PAGE for page in range(SIZE // PAGE)))
    yield fd
    os.close(fd)


def byte_at(address: int) -> int:
    return ctypes.c_ubyte.from_address(address).value


def signed(address: int) -> int:
    """The same 64 bits as a signed integer, like in compiled code."""
    return address - 2**64 if address >= 2**63 else address


# Describing regions.


def test_a_region_shows_the_file_from_its_offset(fd: int) -> None:
    region = Region.map(0, 0, 2 * PAGE, 3 * PAGE, fd)
    assert byte_at(region.mapping.address) == 3
    assert byte_at(region.mapping.address + PAGE) == 4


def test_an_offset_inside_a_page_is_kept(fd: int) -> None:
    region = Region.map(0, 0, PAGE, PAGE + 512, fd)
    assert byte_at(region.mapping.address) == 1
    assert byte_at(region.mapping.address + PAGE - 512) == 2


def test_a_region_is_shared_with_the_file(fd: int) -> None:
    region = Region.map(0, 0, PAGE, 0, fd)
    ctypes.c_ubyte.from_address(region.mapping.address + 5).value = 99
    assert os.pread(fd, 1, 5) == b"\x63"


def test_the_fd_still_belongs_to_the_caller(fd: int) -> None:
    Region.map(0, 0, PAGE, 0, fd)
    assert os.fstat(fd).st_size == SIZE


def test_a_region_of_zero_bytes_is_refused(fd: int) -> None:
    with pytest.raises(BadMemory, match="zero bytes"):
        Region.map(0, 0, 0, 0, fd)


@pytest.mark.parametrize(("size", "offset"), [(SIZE + 1, 0), (SIZE, PAGE), (1, SIZE), (2**62, 0), (1, 2**62)])
def test_a_file_that_is_too_short_is_refused(fd: int, size: int, offset: int) -> None:
    with pytest.raises(BadMemory, match="of a file of only"):
        Region.map(0, 0, size, offset, fd)


@pytest.mark.parametrize(
    ("guest", "user", "size", "offset"),
    [
        (2**63, 0, 1, 0),
        (2**64 - 1, 0, PAGE, 0),
        (2**63 - PAGE, 0, PAGE, 0),
        (0, 2**63 - PAGE, PAGE, 0),
        (0, 2**63, 1, 0),
        (0, 2**64 - 1, 1, 0),
        (0, 0, PAGE, 2**63),
        (0, 0, PAGE, 2**64 - 1),
        (0, 0, 2**64 - 1, 0),
        (0, 0, 2**63, 2**63),
    ],
)
def test_regions_that_do_not_end_below_2_to_the_63_are_rejected(
    fd: int, guest: int, user: int, size: int, offset: int
) -> None:
    with pytest.raises(BadMemory):
        Region.map(guest, user, size, offset, fd)


def test_a_region_may_end_just_below_2_to_the_63(fd: int) -> None:
    start = 2**63 - 1 - PAGE
    table = MemoryTable([Region.map(start, start, PAGE, 0, fd)])
    assert find_region(table.address, table.count, 2**63 - 2, 0) == 0
    assert table.user_to_host(2**63 - 2, 1) == table.regions[0].mapping.address + PAGE - 1


def test_a_file_that_cannot_be_mapped_is_an_os_error() -> None:
    eventfd = os.eventfd(0)
    try:
        with pytest.raises(OSError, match="No such device"):
            Region.map(0, 0, PAGE, 0, eventfd)
    finally:
        os.close(eventfd)


# Tables.


@pytest.mark.parametrize("start", [0x10000 - PAGE + 1, 0x10000, 0x10000 + PAGE - 1])
def test_overlapping_regions_are_refused(fd: int, start: int) -> None:
    regions = [Region.map(0x10000, 0, PAGE, 0, fd), Region.map(start, PAGE, PAGE, 0, fd)]
    with pytest.raises(BadMemory, match="overlap"):
        MemoryTable(regions)
    with pytest.raises(BadMemory, match="overlap"):
        MemoryTable(regions[:1]).adding(regions[1])


def test_a_small_region_inside_a_large_one_is_refused(fd: int) -> None:
    with pytest.raises(BadMemory, match="overlap"):
        MemoryTable([Region.map(0x10000, 0, SIZE, 0, fd), Region.map(0x12000, SIZE, PAGE, 0, fd)])


@pytest.mark.parametrize("start", [0x10000 - PAGE, 0x10000 + PAGE])
def test_adjacent_regions_are_accepted(fd: int, start: int) -> None:
    regions = [Region.map(0x10000, 0, PAGE, 0, fd), Region.map(start, PAGE, PAGE, 0, fd)]
    assert MemoryTable(regions).count == 2


def test_the_compiled_form_matches_the_regions(fd: int) -> None:
    regions = [Region.map(0x20000, 0, PAGE, 0, fd), Region.map(0x10000, PAGE, 2 * PAGE, PAGE, fd)]
    table = MemoryTable(regions)
    entries = np.frombuffer((ctypes.c_ubyte * (table.count * REGION.itemsize)).from_address(table.address), REGION)
    assert entries.tolist() == [
        (0x10000, 2 * PAGE, regions[1].mapping.address),
        (0x20000, PAGE, regions[0].mapping.address),
    ]


def test_adding_and_removing_do_not_change_the_old_table(fd: int) -> None:
    one, other = Region.map(0, 0, PAGE, 0, fd), Region.map(PAGE, PAGE, PAGE, PAGE, fd)
    first = MemoryTable([one])
    both = first.adding(other)
    assert (first.regions, both.regions) == ((one,), (one, other))
    assert both.removing(0, 0, PAGE).regions == (other,)
    assert both.regions == (one, other)


@pytest.mark.parametrize("wrong", [(1, 0, PAGE), (0, 1, PAGE), (0, 0, PAGE + 1), (PAGE, PAGE, PAGE)])
def test_removing_an_unknown_region_is_rejected(fd: int, wrong: tuple[int, int, int]) -> None:
    with pytest.raises(BadMemory, match="to remove"):
        MemoryTable([Region.map(0, 0, PAGE, 0, fd)]).removing(*wrong)


# Mappings.


def test_a_mapping_ends_with_the_last_table_that_uses_it(fd: int) -> None:
    one, other = Region.map(0, 0, PAGE, 0, fd), Region.map(PAGE, PAGE, PAGE, PAGE, fd)
    kept, gone = one.mapping.address, other.mapping.address
    both = MemoryTable([one, other])
    first = both.removing(PAGE, PAGE, PAGE)
    del one, other
    gc.collect()
    assert is_mapped(kept, fd)
    assert is_mapped(gone, fd)
    del both
    gc.collect()
    assert is_mapped(kept, fd)
    assert not is_mapped(gone, fd)
    del first
    gc.collect()
    assert not is_mapped(kept, fd)


def test_refused_regions_leave_no_mapping(fd: int) -> None:
    def count() -> int:
        with open("/proc/self/maps") as maps:
            return sum(f" {os.fstat(fd).st_ino} " in line for line in maps)

    for size, offset in ((SIZE + 1, 0), (0, 0), (2**63, 1)):
        with pytest.raises(BadMemory):
            Region.map(0, 0, size, offset, fd)
    assert count() == 0


def test_a_mapping_with_an_offset_inside_a_page_is_unmapped_completely(fd: int) -> None:
    region = Region.map(0, 0, 2 * PAGE, 512, fd)
    address = region.mapping.address
    assert is_mapped(address + 2 * PAGE - 1, fd)
    del region
    gc.collect()
    assert not is_mapped(address - 512, fd)
    assert not is_mapped(address + 2 * PAGE - 1, fd)


# Translation, compared with a search through all regions.

layouts = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 8)), min_size=1, max_size=6)
BASES = st.sampled_from([0, 0x1000, 2**32 - 5, 2**62, 2**63 - 60])


@given(BASES, layouts, st.data())
def test_find_region_agrees_with_a_naive_search(base: int, layout: list[tuple[int, int]], data: st.DataObject) -> None:
    entries = []
    start = base
    for gap, size in layout:
        start += gap
        if start + size < 2**63:
            entries.append((start, size, 0))
        start += size
    regions = np.array(entries or [(0, 1, 0)], REGION)
    edges = [edge for start, size, _ in entries for edge in (start - 1, start, start + size - 1, start + size)]
    far = [0, 2**63 - 1, 2**63, 2**64 - 1, (base + 2**63) % 2**64]
    addr = data.draw(st.sampled_from([edge for edge in edges if edge >= 0] + far))
    wanted = [number for number, (start, size, _) in enumerate(regions.tolist()) if start <= addr < start + size]
    last = data.draw(st.integers(0, len(regions)))
    found = find_region(regions.ctypes.data, len(regions), signed(addr), last)
    assert [found] == (wanted or [-1])


def test_an_empty_table_finds_nothing() -> None:
    table = MemoryTable()
    assert find_region(table.address, table.count, 0, 0) == -1


@pytest.fixture
def two_regions(fd: int) -> MemoryTable:
    return MemoryTable([Region.map(0, 0x10000, PAGE, 0, fd), Region.map(PAGE, 0x10000 + PAGE, PAGE, PAGE, fd)])


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, PAGE), (PAGE - 1, 1), (PAGE, PAGE), (5, 100)])
def test_user_addresses_inside_a_region(two_regions: MemoryTable, offset: int, size: int) -> None:
    region = two_regions.regions[offset // PAGE]
    assert two_regions.user_to_host(0x10000 + offset, size) == region.mapping.address + offset % PAGE


@pytest.mark.parametrize(
    ("user", "size"),
    [
        (0xFFFF, 1),
        (0xFFFF, 2),
        (0x10000, PAGE + 1),
        (0x10000 + PAGE - 1, 2),
        (0x10000 + 2 * PAGE, 1),
        (0x10000, 2**64),
        (0, 1),
        (2**63, 1),
        (2**64 - 1, 1),
        (2**64 - 1, 2),
    ],
)
def test_user_addresses_outside_or_across_a_border(two_regions: MemoryTable, user: int, size: int) -> None:
    with pytest.raises(BadMemory, match="not inside one region"):
        two_regions.user_to_host(user, size)
