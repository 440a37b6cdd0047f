"""Anything that a device reads may have changed when it reads again: it must be read once, checked, then used."""

from __future__ import annotations

import random
import select
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest

from unit.packed_ring import PackedRing
from unit.rig import (
    DISCARD,
    GUEST_BASE,
    IN,
    INDIRECT,
    NEXT,
    OK,
    OUT,
    WRITE,
    WRITE_ZEROES,
    Pending,
    Ring,
    header,
    take_events,
)

from .attacker import Attacker, RemoteLine
from .conftest import DISK, EVERY_ENGINE, Target
from .flipper import Flipper
from .watchpoint import Watchpoint, address_in, why_not

pytestmark = EVERY_ENGINE

SECONDS = 0.6
CAPACITY = len(DISK) // 512

# The values most useful to an attacker if one value is checked and another used: unmapped, across the end, wrapping.
BAD_ADDRESSES = (0xDEAD_0000_0000, GUEST_BASE + (1 << 20) - 100, (1 << 64) - 100)
BAD_LENGTHS = (0, 0xFFFF_FFFF, 1 << 20)
BAD_SECTORS = (CAPACITY, 1 << 55, 1 << 63, (1 << 64) - 1)

# Requests may write these sectors of the disk and these buffers in guest memory.
SECTORS, BUFFER = (8, 40), 4096
ALLOWED = (8 * 512, 40 * 512 + BUFFER)


# Its name, its offset in guest memory, and its size in bytes.
Field = tuple[str, int, int]


class Arena:
    """Chains that are offered repeatedly; all their parts stay at fixed places in memory."""

    def __init__(self, attacker: Attacker, line: RemoteLine, *, indirect: bool) -> None:
        self.attacker, self.line, self.indirect = attacker, line, indirect
        guest = attacker.guest
        guest.write(0, random.Random(2).randbytes(guest.size))
        attacker.new_ring(attacker.lines[1])
        self.headers, self.segments, self.tables = (guest.allocate(size, 4096) for size in (4096, 4096, 4096))
        # Two data buffers, each surrounded by bytes that nobody may touch.
        self.data = [guest.allocate(BUFFER + 4096, 4096) for _ in range(2)]
        self.status = guest.allocate(4096, 4096)
        self.ring_at = guest.allocate(0, 4096)
        self.fields: list[tuple[int, int, tuple[int, ...]]] = []
        self.chains = [self.chain(number, kind) for number, kind in enumerate([IN, OUT, IN, DISCARD, WRITE_ZEROES])]

    def field(self, offset: int, size: int, *values: int) -> None:
        self.fields.append((self.attacker.guest.address + offset, size, values))

    def chain(self, number: int, kind: int) -> list[tuple[int, int, int]]:
        """Its descriptors; the fields of its header and segment are added to those that change."""
        guest = self.attacker.guest
        head = self.headers + 16 * number
        guest.write(head, header(kind, SECTORS[0]))
        if kind in (IN, OUT):
            # A read may become a write and vice versa: both may touch the data of both.
            self.field(head, 4, kind, IN, OUT, 8, 99)
            self.field(head + 8, 8, *SECTORS, *BAD_SECTORS)
            data = (GUEST_BASE + self.data[number % 2], 512, WRITE * (kind == IN))
        else:
            self.field(head, 4, kind, DISCARD, WRITE_ZEROES, 14)
            segment = self.segments + 16 * number
            guest.write(segment, struct.pack("<QII", SECTORS[0], 8, 0))
            self.field(segment, 8, *SECTORS, *BAD_SECTORS)
            self.field(segment + 8, 4, 8, 0, 1 << 23, 0xFFFF_FFFF, 1 << 20)
            self.field(segment + 12, 4, 0, 0, 0, 0, 1, 0xFFFF_FFFF)
            data = (GUEST_BASE + segment, 16, 0)
        return [(GUEST_BASE + head, 16, 0), data, (GUEST_BASE + self.status + number, 1, WRITE)]

    def place(self) -> None:
        """Start a new ring in the memory of the last one, with all chains in it."""
        guest, line = self.attacker.guest, self.line
        guest.free = self.ring_at
        self.attacker.new_ring(line)
        take_events(line.err_fd)
        self.heads = []
        for number, chain in enumerate(self.chains):
            if self.indirect:
                table = line.ring.table(chain)
                start = self.tables + 64 * number
                guest.write(start, table)
                chain = [(GUEST_BASE + start, len(table), INDIRECT)]
            self.heads.append(line.ring.add_chain(chain).head)

    def flipping(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """All fields, including those of the descriptors at their current places."""
        self_fields, self.fields = self.fields, list(self.fields)
        ring, packed = self.line.ring, isinstance(self.line.ring, PackedRing)
        for number, chain in enumerate(self.chains):
            for position, (address, length, flags) in enumerate(chain):
                if self.indirect:
                    place = self.tables + 64 * number + 16 * position
                else:
                    place = ring.desc + 16 * ring.pending[self.heads[number]].descriptors[position]
                self.flip_descriptor(place, address, length, flags, packed)
        if not packed:
            for index in range(ring.size):
                self.field(ring.avail + 4 + 2 * index, 2, *self.heads, ring.size, 0xFFFF)
        fields, self.fields = self.fields, self_fields
        return fields

    def flip_descriptor(self, place: int, address: int, length: int, flags: int, packed: bool) -> None:
        a, b = (GUEST_BASE + data for data in self.data)
        others = (a, b) if address in (a, b) else ()
        self.field(place, 8, address, *others, *BAD_ADDRESSES)
        self.field(place + 8, 4, length, *((512, 4096) if others else ()), *BAD_LENGTHS)
        self.field(place + (14 if packed else 12), 2, flags | NEXT, flags | NEXT, flags, flags | INDIRECT)

    def offer(self) -> None:
        ring = self.line.ring
        for head in self.heads:
            ring.put_available(head)
        self.line.kick()

    def drive(self, seconds: float) -> tuple[int, int]:
        """Offer chains for so many seconds; returns how many batches were used and how often the ring broke."""
        used = broken = 0
        draw = random.Random(3)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.place()
            # Only a few at a time: they change faster, and more requests are valid otherwise.
            with Flipper(draw.sample(self.flipping(), draw.randrange(1, 4))) as flipper:
                before = self.used()
                turn_over = time.monotonic() + 0.03
                while time.monotonic() < turn_over:
                    self.offer()
                    # A driver that has lost count, as its own flips may cause, starts again too.
                    if select.select([self.line.err_fd], [], [], 0)[0] or not self.wait_for_more(before):
                        broken += 1
                        break
                    before, used = self.used(), used + 1
                assert flipper.record["count"] > 0
            self.line.stop()
        return used, broken

    def used(self) -> bytes:
        ring = self.line.ring
        if isinstance(ring, PackedRing):
            return self.attacker.guest.read(ring.desc, 16 * ring.size)
        return self.attacker.guest.read(ring.used + 2, 2)

    def wait_for_more(self, before: bytes) -> bool:
        end = time.monotonic() + 0.02
        while time.monotonic() < end:
            if self.used() != before:
                return True
        return False

    def writable(self) -> list[tuple[int, int]]:
        """The ranges that a device may write to, and those that we write ourselves."""
        return [
            (self.headers, self.tables + 4096),
            *[(data, data + BUFFER) for data in self.data],
            (self.status, self.status + len(self.chains)),
            (self.ring_at, self.ring_at + 4096),
            # One of the bad addresses is a valid buffer if its length is short.
            (self.attacker.guest.size - 100, self.attacker.guest.size),
            # The honest ring, and its buffers.
            (self.attacker.lines[1].ring.desc, self.headers),
        ]

    def content(self) -> bytes:
        """The guest's memory, with zeros in place of those ranges."""
        memory = bytearray(self.attacker.guest.memory)
        for start, end in self.writable():
            memory[start:end] = bytes(end - start)
        return bytes(memory)


@pytest.mark.row("double fetch")
@pytest.mark.parametrize(
    ("ring_class", "indirect"),
    [(Ring, False), (Ring, True), (PackedRing, True)],
    ids=["split-direct", "split-indirect", "packed-indirect"],
)
def test_fields_that_change_during_requests(target: Target, ring_class: Any, indirect: bool) -> None:
    """Descriptors, tables, headers, segments and available entries change while the requests are being served.

    The descriptors of a packed ring itself are left out: a slot belongs to another chain in the next lap, and this
    driver loses count, so that its descriptors form other valid requests. test_each_field_is_read_once covers them.
    """
    attacker = target.attacker(ring_class=ring_class, sizes=(64, 16))
    target.allowed = [ALLOWED]
    attacker.lines[0].stop()
    attacker.lines[1].stop()
    attacker.guest.free = 0
    arena = Arena(attacker, attacker.lines[0], indirect=indirect)
    before = arena.content()
    used, broken = arena.drive(SECONDS)
    assert used > 0 or broken > 0
    changed = [offset for offset, (old, new) in enumerate(zip(before, arena.content(), strict=True)) if old != new]
    assert not changed, "the device wrote where no request was to"
    attacker.guest.free = arena.ring_at + 65536
    attacker.new_ring(arena.line)
    attacker.check_honest_ring(DISK)


def fields_of(line: RemoteLine, kind: int, pending: Pending, first: int, *, indirect: bool) -> Iterator[Field]:
    """The fields that the device reads for a request, without those that it polls or writes itself.

    `first` is the offset of the chain's first descriptor.
    """
    ring, begin = line.ring, pending.pieces[0].offset
    yield from (("type", begin, 4), ("sector", begin + 8, 8))
    if kind == DISCARD:
        segment = pending.pieces[1].offset
        yield from (("segment's sector", segment, 8), ("sectors", segment + 8, 4), ("segment's flags", segment + 12, 4))
    if indirect:
        table = int.from_bytes(line.rig.guest.read(first, 8), "little") - GUEST_BASE
        places = [table + 16 * number for number in range(3)]
    elif isinstance(ring, PackedRing):
        places = [first + 16 * number for number in range(3)]
    else:
        places = [ring.desc + 16 * number for number in pending.descriptors]
    for number, place in enumerate(places):
        yield f"address {number}", place, 8
        if indirect or not isinstance(ring, PackedRing) or number > 0:
            yield from ((f"length {number}", place + 8, 4), (f"flags {number}", place + 12, 2))
            yield f"next or id {number}", place + 14, 2


@pytest.mark.row("double fetch")
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "there are watchpoints")
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("kind", [IN, OUT, DISCARD], ids=["read", "write", "discard"])
def test_each_field_is_read_once(target: Target, ring_class: Any, kind: int, indirect: bool) -> None:
    """The processor counts the reads, so this holds for the compiled code and not only for the source.

    Header and segments, which are copied, may be read twice: memcpy(3) of 16 bytes reads and writes some bytes twice.
    """
    attacker = target.attacker(ring_class=ring_class)
    line, pid = attacker.lines[0], target.victim.process.pid
    target.allowed.append((8 * 512, 9 * 512))
    content = {OUT: bytes(512), DISCARD: struct.pack("<QII", 8, 1, 0)}.get(kind, b"")
    counts: dict[str, int] = {}
    while True:
        line.stop()
        attacker.new_ring(line)
        first = line.ring.desc
        pending = line.put(kind, 8, content, 0 if content else 512, direct=0 if indirect else None)
        if ring_class is not PackedRing:
            first += 16 * pending.head
        left = [each for each in fields_of(line, kind, pending, first, indirect=indirect) if each[0] not in counts]
        if not left:
            break
        name, offset, size = left[0]
        with Watchpoint(pid, address_in(pid, attacker.guest.fd, offset), size) as watch:
            line.kick()
            line.wait()
            counts[name] = watch.count
        assert line.answer(pending).status == OK
    for name, count in counts.items():
        assert count <= (1 if name[-1].isdigit() else 2), (name, counts)
    assert counts["address 0"] == 1, "nothing was counted"
