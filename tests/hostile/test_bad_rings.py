"""What a malicious driver does to its ring and chains: each breaks only that ring, and the log names the rule."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Sequence
from typing import Any

import pytest

from ringplane.dataplane import ring_rules
from ringplane.driver.frontend import Refused
from ringplane.vhost_user.payloads import MemoryRegion
from unit.packed_ring import PackedRing
from unit.rig import (
    FLUSH,
    GET_ID,
    GUEST_BASE,
    IN,
    INDIRECT,
    IOERR,
    NEXT,
    OK,
    OUT,
    USER_BASE,
    WRITE,
    Answer,
    Descriptor,
    Ring,
    eventually,
    header,
    take_events,
    wait_for_event,
)

from .attacker import HOLE, PAGE, Attacker, RemoteLine
from .conftest import DISK, Target, sector

FRAMINGS = pytest.mark.parametrize("direct", [None, 0, 1], ids=["direct", "indirect", "header-before-a-table"])
FIRST = GUEST_BASE
END = GUEST_BASE + (1 << 20)
NOWHERE = 0xDEAD_0000_0000


class Buffers:
    """Valid buffers for the chain of a request: a header, two data buffers, a status."""

    def __init__(self, attacker: Attacker, kind: int = IN, number: int = 3) -> None:
        guest = attacker.guest
        places = [guest.allocate(size, 16) for size in (16, 512, 512, 1)]
        guest.write(places[0], header(kind, number))
        self.header: Descriptor = (GUEST_BASE + places[0], 16, 0)
        self.read, self.write = ((GUEST_BASE + places[1], 512, flags) for flags in (0, WRITE))
        self.more: Descriptor = (GUEST_BASE + places[2], 512, WRITE)
        self.status: Descriptor = (GUEST_BASE + places[3], 1, WRITE)

    @property
    def good(self) -> list[Descriptor]:
        return [self.header, self.write, self.more, self.status]


def offer(line: RemoteLine, chain: Sequence[Descriptor], direct: int | None = None) -> None:
    """Make a chain available. All descriptors after the first `direct` are in an indirect table (None: no table)."""
    chain = list(chain)
    if direct is not None and direct < len(chain):
        table = line.ring.table(chain[direct:])
        chain[direct:] = [(GUEST_BASE + place(line, table), len(table), INDIRECT)]
    line.ring.put_available(line.ring.add_chain(chain).head)


def place(line: RemoteLine, content: bytes) -> int:
    offset = line.rig.guest.allocate(len(content), 16)
    line.rig.guest.write(offset, content)
    return int(offset)


def descriptors(chain: Sequence[tuple[int, int, int, int]]) -> bytes:
    """The bytes of descriptors in a split ring or table, with any `next`."""
    return b"".join(struct.pack("<QIHH", *each) for each in chain)


@pytest.mark.row("descriptor loop")
def test_loops_in_a_split_ring_and_an_indirect_table(target: Target) -> None:
    """Loops of one, two and all descriptors, readable and writable ones, in the ring and in a table."""
    attacker = target.attacker()
    line = attacker.lines[0]
    for in_table in (False, True):
        for length, flags in [(1, 0), (2, 0), (16, 0), (2, WRITE), (16, WRITE)]:
            buffers = Buffers(attacker)
            first = [(*buffers.header[:2], NEXT, 1)]
            buffer = buffers.read if flags == 0 else buffers.write
            # The loop begins with the first descriptor if all are readable, otherwise behind the header.
            start = 0 if flags == 0 else 1
            count = min(length + start, 16)
            chain = first + [(*buffer[:2], NEXT | flags, number + 1) for number in range(1, count)]
            chain[-1] = (*chain[-1][:3], start)
            if in_table:
                table = place(line, descriptors(chain))
                offer(line, [(GUEST_BASE + table, 16 * len(chain), INDIRECT)])
            else:
                attacker.guest.write(line.ring.desc, descriptors(chain))
                line.ring.put_available(0)
            target.assert_breaks(line, ring_rules.LOOP)


@pytest.mark.row("descriptor loop")
def test_a_packed_chain_without_an_end(target: Target) -> None:
    """Packed descriptors have no `next`: the flags of each one say that another follows."""
    attacker = target.attacker(ring_class=PackedRing)
    line = attacker.lines[0]
    for flags in (0, WRITE):
        buffers = Buffers(attacker)
        buffer = (*buffers.read[:2], flags)
        offer(line, [buffers.header, *[buffer] * 14, (*buffer[:2], flags | NEXT)])
        target.assert_breaks(line, ring_rules.LOOP)


@pytest.mark.row("zero-length descriptor")
@FRAMINGS
def test_a_length_of_zero_at_each_position(target: Target, ring_class: Any, direct: int | None) -> None:
    attacker = target.attacker(ring_class=ring_class)
    line = attacker.lines[0]
    for position in range(4):
        chain = Buffers(attacker).good
        address, _, flags = chain[position]
        chain[position] = (address, 0, flags)
        offer(line, chain, direct)
        target.assert_breaks(line, ring_rules.ZERO_LENGTH)


@pytest.mark.row("malformed chain parsed repeatedly")
def test_a_bad_head_is_parsed_once(target: Target, ring_class: Any) -> None:
    """Kicks and more chains change nothing; a ring that is restarted at the same place breaks at most once more."""
    attacker = target.attacker(ring_class=ring_class)
    line = attacker.lines[0]
    line.ring.put_bad_head()
    line.kick()
    wait_for_event(line.err_fd, "the error")
    for _ in range(100):
        if line.ring.has_room(4):
            offer(line, Buffers(attacker).good)
        line.kick()
    attacker.front_end.set_vring_enable(0, False)
    attacker.front_end.set_vring_enable(0, True)
    attacker.check_honest_ring(DISK)
    assert eventually(target.victim.is_idle)
    assert take_events(line.err_fd) == 0
    assert target.logged().count("ring broken") == 1
    base = line.stop()
    line.resume(base=base)
    attacker.check_honest_ring(DISK)
    assert eventually(target.victim.is_idle)
    assert target.logged().count("ring broken") <= 2
    line.reset()
    assert line.do(IN, 5, room=512) == Answer(OK, 513, sector(5))


@pytest.mark.row("malformed chain whose head is lost")
def test_a_chain_of_only_a_head(target: Target, ring_class: Any) -> None:
    """The requests before it are completed, then the ring breaks: no chain is lost silently."""
    attacker = target.attacker(ring_class=ring_class)
    line = attacker.lines[0]
    for direct in (None, 0):
        for which, rule in [
            ("header", ring_rules.NO_STATUS),
            ("read", ring_rules.NO_STATUS),
            ("status", ring_rules.NO_HEADER),
        ]:
            buffers = Buffers(attacker)
            before = line.put(IN, 4, room=512)
            offer(line, [getattr(buffers, which)], direct)
            line.kick()
            wait_for_event(line.err_fd, "the error")
            assert ring_rules.MESSAGES[rule] in target.logged().splitlines()[-1]
            done: list[Any] = []
            assert eventually(lambda done=done: done.extend(line.ring.collect()) or len(done) > 0)
            assert done == [before]
            assert line.answer(before) == Answer(OK, 513, sector(4))
            line.reset()


@pytest.mark.row("chain longer than 2^32 bytes")
def test_lengths_whose_sum_wraps(target: Target, ring_class: Any) -> None:
    """Modulo 2^32 each request is valid. A chain of exactly 2^32 bytes is allowed, but longer than the disk."""
    gib = 1 << 30
    attacker = target.attacker(ring_class=ring_class, guest_size=gib)
    line = attacker.lines[0]
    for flags, kind in [(WRITE, IN), (0, OUT)]:
        for direct in (None, 0):
            buffers = Buffers(attacker, kind)
            # Several buffers of 1 GiB, all at the same address.
            whole = (GUEST_BASE, gib, flags)
            data = buffers.write if kind == IN else buffers.read
            offer(line, [buffers.header, data, *[whole] * 4, buffers.status], direct)
            target.assert_breaks(line, ring_rules.TOO_MANY_BYTES)
            offer(line, [buffers.header, *[whole] * 3, (GUEST_BASE, gib - 17, flags), buffers.status], direct)
            line.kick()
            assert eventually(lambda place=buffers.status[0] - GUEST_BASE: attacker.guest.memory[place] == IOERR)
            line.reset()


@pytest.mark.row("avail.idx jumps by more than the ring size")
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
@pytest.mark.parametrize("jump", [17, 32, 0x7FFF, 0x8000, 0xFFFF - 16, 0xFFFF])
def test_the_avail_index_jumps(target: Target, event_idx: bool, jump: int) -> None:
    """Forward, and backward by up to 17, in a new ring and after a whole lap; packed rings have no index."""
    line = target.attacker(event_idx=event_idx).lines[0]
    for laps in (0, 16):
        for number in range(laps):
            assert line.do(IN, number, room=512) == Answer(OK, 513, sector(number))
        line.ring.avail_idx = (line.ring.avail_idx + jump) % 65536
        target.assert_breaks(line, ring_rules.AVAIL_INDEX)


TABLES = {
    "nested": ring_rules.INDIRECT_NESTED,
    "next": ring_rules.INDIRECT_NEXT,
    "length-0": ring_rules.INDIRECT_LENGTH,
    "length-1": ring_rules.INDIRECT_LENGTH,
    "length-15": ring_rules.INDIRECT_LENGTH,
    "length-65": ring_rules.INDIRECT_LENGTH,
    "unmapped": ring_rules.INDIRECT_ADDRESS,
    "half-unmapped": ring_rules.INDIRECT_ADDRESS,
    "over-two-regions": ring_rules.INDIRECT_ADDRESS,
    "longer-than-memory": ring_rules.INDIRECT_ADDRESS,
    "longer-than-allowed": ring_rules.TOO_MANY_SEGMENTS,
}


@pytest.mark.row("malformed indirect table")
@pytest.mark.parametrize("fault", TABLES)
def test_malformed_indirect_tables(target: Target, ring_class: Any, fault: str) -> None:
    """One fault at a time in a request that is otherwise valid; also in a table behind a direct header."""
    attacker = target.attacker(ring_class=ring_class)
    line = attacker.lines[0]
    for direct in (0, 1):
        buffers = Buffers(attacker)
        chain = buffers.good[direct:]
        table = line.ring.table(chain)
        start = GUEST_BASE + place(line, table)
        referring, behind = (start, len(table), INDIRECT), []
        if fault == "nested":
            outer = line.ring.table([referring])
            referring = (GUEST_BASE + place(line, outer), 16, INDIRECT)
        elif fault == "next":
            behind = [buffers.status]
        elif fault.startswith("length"):
            referring = (start, int(fault.split("-")[1]), INDIRECT)
        elif fault == "unmapped":
            referring = (NOWHERE, len(table), INDIRECT)
        elif fault == "half-unmapped":
            attacker.guest.write(attacker.guest.size - 16, table[:16])
            referring = (END - 16, len(table), INDIRECT)
        elif fault == "over-two-regions":
            half = attacker.guest.size // 2
            attacker.guest.write(half - 16, table)
            referring = (GUEST_BASE + half - 16, len(table), INDIRECT)
        elif fault == "longer-than-memory":
            referring = (start, 0xFFFF_FFF0, INDIRECT)
        else:
            table = line.ring.table([*chain[:-1], *[buffers.more] * 1028, buffers.status])
            referring = (GUEST_BASE + place(line, table), len(table), INDIRECT)
        offer(line, [*buffers.good[:direct], referring, *behind])
        target.assert_breaks(line, TABLES[fault])


@pytest.mark.row("malformed indirect table")
@pytest.mark.row("use of a feature that was offered but not negotiated")
def test_an_indirect_table_without_the_feature(target: Target, ring_class: Any) -> None:
    attacker = target.attacker(ring_class=ring_class, indirect=False)
    for direct in (0, 1):
        offer(attacker.lines[0], Buffers(attacker).good, direct)
        target.assert_breaks(attacker.lines[0], ring_rules.INDIRECT_NOT_NEGOTIATED)


# Address and length: across each edge of each region, into and across the hole, and around 2^64.
RANGES = [
    (FIRST - 1, 1),
    (FIRST - 1, 2),
    (FIRST - 512, 512),
    (FIRST - 512, 513),
    (END, 1),
    (END - 1, 2),
    (END - 511, 512),
    (END + HOLE - 1, 1),
    (END - 1, HOLE + 2),
    (END + HOLE - 1, 2),
    (END + HOLE + PAGE, 1),
    (END + HOLE + PAGE - 1, 2),
    (FIRST, (1 << 32) - 1024),
    ((1 << 63) - 1, 2),
    (1 << 63 | FIRST, 512),
    ((1 << 64) - 1, 1),
    ((1 << 64) - 16, 32),
    ((1 << 64) - 512, 1024),
    ((1 << 64) - (1 << 32) + 2048, (1 << 32) - 1024),
    (0, 512),
]


@pytest.mark.row("address range outside the guest's memory")
@pytest.mark.parametrize("position", ["header", "read", "write", "status"])
def test_ranges_outside_the_memory(target: Target, ring_class: Any, position: str) -> None:
    attacker = target.attacker(ring_class=ring_class)
    line = attacker.lines[0]
    for number, (address, length) in enumerate(RANGES):
        buffers = Buffers(attacker, OUT if position == "read" else IN)
        chain = [buffers.header, buffers.read if position == "read" else buffers.write, buffers.status]
        chain[{"header": 0, "status": 2}.get(position, 1)] = (
            address,
            length,
            WRITE * (position in ("write", "status")),
        )
        offer(line, chain, number % 2 if number % 3 else None)
        target.assert_breaks(line, ring_rules.ADDRESS)


@pytest.mark.row("address range outside the guest's memory")
def test_ranges_that_just_fit(target: Target, ring_class: Any) -> None:
    """Up to the last byte of the memory, across two adjacent regions, and up to the end of the page behind the hole."""
    attacker = target.attacker(ring_class=ring_class)
    line, guest, half = attacker.lines[0], attacker.guest, attacker.guest.size // 2
    for address, offset in [
        (END - 513, guest.size - 513),
        (GUEST_BASE + half - 100, half - 100),
        (END + HOLE + PAGE - 513, PAGE - 513),
    ]:
        buffers = Buffers(attacker)
        offer(line, [buffers.header, (address, 513, WRITE)])
        line.kick()
        assert eventually(lambda offset=offset: guest.read(offset, 513) == sector(3) + b"\0")
        line.reset()


@pytest.mark.row("address range outside the guest's memory")
def test_rings_outside_the_memory(target: Target, ring_class: Any) -> None:
    attacker = target.attacker(ring_class=ring_class)
    line, front_end = attacker.lines[0], attacker.front_end
    line.stop()
    front_end.set_vring_num(0, 16)
    front_end.set_vring_kick(0, line.kick_fd)
    end = USER_BASE + attacker.guest.size
    places = (USER_BASE - 16, end - 16, end, end + HOLE - 16, 0, 1 << 63, (1 << 64) - 16, (1 << 64) - 256)
    for which in range(3):
        # In a packed ring all areas but the descriptors have 4 bytes.
        for wrong in places if which == 0 or ring_class is Ring else [*places[0:1], *places[2:]]:
            areas = [USER_BASE + area for area in (line.ring.desc, line.ring.avail, line.ring.used)]
            areas[which] = wrong
            with pytest.raises(Refused):
                front_end.set_vring_addr(0, *areas)
            assert "SET_VRING_ADDR" in target.logged().splitlines()[-1]
            # Nothing runs until the address is valid.
            line.kick()
    attacker.check_honest_ring(DISK)
    line.reset()
    assert line.do(IN, 5, room=512) == Answer(OK, 513, sector(5))


@pytest.mark.row("address range outside the guest's memory")
def test_invalid_memory_regions(target: Target) -> None:
    """Sums that wrap, regions longer than the file, empty and overlapping ones; in a table and one by one."""
    attacker = target.attacker()
    front_end, size = attacker.front_end, attacker.guest.size
    top = 1 << 64
    for guest, user, length, offset in [
        (top - 4096, USER_BASE, 8192, 0),
        (1 << 63, USER_BASE, 4096, 0),
        ((1 << 63) - 4096, USER_BASE, 8192, 0),
        (1 << 40, top - 4096, 8192, 0),
        (1 << 40, USER_BASE, 4096, top - 4096),
        (1 << 40, USER_BASE, top - 4096, 8192),
        (1 << 40, USER_BASE, 4096, size - 4095),
        (1 << 40, USER_BASE, size + 1, 0),
        (1 << 40, USER_BASE, 0, 0),
        (1 << 40, USER_BASE, 1 << 62, 0),
        (GUEST_BASE + 4096, USER_BASE, 4096, 0),
    ]:
        region = MemoryRegion(guest, length, user, offset)
        with pytest.raises(Refused):
            front_end.add_mem_reg(region, attacker.guest.fd)
        with pytest.raises(Refused):
            front_end.set_mem_table([*attacker.regions(), region], [attacker.guest.fd] * 4)
        with pytest.raises(Refused):
            front_end.rem_mem_reg(region)
        assert attacker.lines[0].do(IN, 5, room=512) == Answer(OK, 513, sector(5))


@pytest.mark.row("request header split over several descriptors")
@FRAMINGS
def test_any_framing(target: Target, ring_class: Any, direct: int | None) -> None:
    """Descriptor boundaries have no meaning: the header may be split or joined with data, the status with data too."""
    attacker = target.attacker(ring_class=ring_class, sizes=(64, 16))
    line = attacker.lines[0]
    target.allowed = [(0, 1024)]
    data = bytes(512)
    for head in ([16], [8, 8], [4, 4, 4, 4], [1] * 16, [15, 1], [1, 15]):
        for writable in ([512, 1], [513], [1, 512], [511, 2], [171, 171, 171]):
            answer = line.do(IN, 7, room=512, readable=head, writable=writable, direct=direct)
            assert answer == Answer(OK, 513, sector(7))
        for readable in ([*head, 512], [*head[:-1], head[-1] + 512], [*head, 1, 511]):
            data = os.urandom(512)
            assert line.do(OUT, 1, data, readable=readable, direct=direct) == Answer(OK, 1, b"")
            assert line.do(IN, 1, room=512, direct=direct).data == data
        assert line.do(FLUSH, readable=head, direct=direct) == Answer(OK, 1, b"")
        for writable in ([20, 1], [21], [1] * 21):
            assert line.do(GET_ID, room=20, readable=head, writable=writable, direct=direct).used_length == 21


@pytest.mark.row("request header split over several descriptors")
@FRAMINGS
def test_chains_shorter_than_a_header(target: Target, ring_class: Any, direct: int | None) -> None:
    attacker = target.attacker(ring_class=ring_class)
    for sizes in ([15], [8, 7], [1]):
        buffers = Buffers(attacker)
        pieces = [(buffers.header[0], size, 0) for size in sizes]
        offer(attacker.lines[0], [*pieces, buffers.write, buffers.status], direct)
        target.assert_breaks(attacker.lines[0], ring_rules.NO_HEADER)
    buffers = Buffers(attacker)
    offer(attacker.lines[0], [buffers.header, buffers.status, buffers.read], direct)
    target.assert_breaks(attacker.lines[0], ring_rules.ORDER)


@pytest.mark.row("truncated chain treated as complete")
@FRAMINGS
@pytest.mark.parametrize("rule", [ring_rules.ADDRESS, ring_rules.ZERO_LENGTH], ids=["address", "length"])
def test_a_bad_third_descriptor(target: Target, ring_class: Any, direct: int | None, rule: int) -> None:
    """Without it, each would be a valid request: a read, and a write that must not happen."""
    attacker = target.attacker(ring_class=ring_class)
    for kind in (IN, OUT):
        chain = two_of_a_request(attacker, kind)
        bad = (NOWHERE, 1, WRITE) if rule == ring_rules.ADDRESS else (chain[1][0], 0, WRITE)
        offer(attacker.lines[0], [*chain, bad], direct)
        target.assert_breaks(attacker.lines[0], rule)


@pytest.mark.row("truncated chain treated as complete")
@pytest.mark.parametrize("in_table", [False, True], ids=["direct", "indirect"])
def test_next_outside_a_split_table(target: Target, in_table: bool) -> None:
    """In the second descriptor, and in the first one."""
    attacker = target.attacker()
    line = attacker.lines[0]
    for kind in (IN, OUT):
        for following in ([1, 2, 2], [1, 3, 3], [2, 2, 2]) if in_table else ([1, 16, 0], [1, 0xFFFF, 0], [17, 0, 0]):
            chain = [
                (address, size, flags | NEXT, following[number])
                for number, (address, size, flags) in enumerate(two_of_a_request(attacker, kind))
            ]
            if in_table:
                table = place(line, descriptors(chain))
                offer(line, [(GUEST_BASE + table, 32, INDIRECT)])
            else:
                attacker.guest.write(line.ring.desc, descriptors(chain))
                line.ring.put_available(0)
            target.assert_breaks(line, ring_rules.NEXT_RANGE)


def two_of_a_request(attacker: Attacker, kind: int) -> list[Descriptor]:
    """A request of two descriptors: a read with data and status in one, or a write with header and data in one."""
    buffers = Buffers(attacker, kind)
    if kind == IN:
        return [buffers.header, (buffers.write[0], 513, WRITE)]
    assert buffers.read[0] == buffers.header[0] + 16
    return [(buffers.header[0], 528, 0), buffers.status]


@pytest.mark.row("the same head twice in flight")
def test_the_same_chain_many_times_in_flight(target: Target, ring_class: Any) -> None:
    """It is completed as often as it was made available, as if it were several requests."""
    attacker = target.attacker(ring_class=ring_class, sizes=(64, 16))
    line = attacker.lines[0]
    for _ in range(20):
        request = line.put(IN, 3, room=65536)
        for _ in range(15):
            line.ring.put_available(request.head)
        line.kick()
        used: list[tuple[int, int]] = []
        assert eventually(lambda used=used: used.extend(line.ring.take_used()) or len(used) == 16), used
        assert used == [(request.head, 65537)] * 16
        assert attacker.guest.read(request.writable[0].offset, 65536) == sector(3, 128)
        line.reset()
        attacker.guest.free = attacker.guest.free if attacker.guest.free < 1 << 19 else 1 << 16


@pytest.mark.row("the same head twice in flight")
def test_more_chains_in_flight_than_descriptors(target: Target, ring_class: Any) -> None:
    """All chains of a full ring and one of them again, while the slow first request keeps all of them in flight."""
    attacker = target.attacker(ring_class=ring_class, sizes=(4, 16), event_idx=True, in_order=True)
    line, start = attacker.lines[0], attacker.guest.free
    # On a fast disk the slow request takes hardly longer than this process needs to notice that it has begun.
    for _ in range(100):
        requests = [target.put_slow(line), *(line.put(GET_ID, room=20, direct=0) for _ in range(3))]
        line.kick()
        # It is about to sleep, with all of them in flight.
        assert eventually(line.ring.asks_for_kick, pause=0)
        line.ring.put_available(requests[0].head)
        line.kick()
        select.select([line.err_fd], [], [], 0.2)
        if ring_rules.MESSAGES[ring_rules.TOO_MANY_IN_FLIGHT] in target.logged():
            break
        # The ring is made again in the same memory.
        attacker.guest.free = start
        line.reset()
    else:
        pytest.fail("the slow request was not in flight for long enough")
    attacker.check_honest_ring(DISK)
    line.reset()
    assert line.do(IN, 5, room=512) == Answer(OK, 513, sector(5))
