"""A model of the device's end of a split virtqueue in plain Python, written from virtio 1.2 section 2.7."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

NEXT, WRITE, INDIRECT = 1, 2, 4
DESCRIPTOR = struct.Struct("<QIHH")
HEADER_BYTES = 16
MAX_SEGMENTS = 1028
MAX_BYTES = 2**32


class Broken(Exception):
    """The driver broke a rule; `args[0]` is the name of the rule in dataplane/ring_rules.py."""


def need_event(event: int, new: int, old: int) -> bool:
    """Section 2.7.10 by brute force: is the entry `event` one of those from `old` up to, not including, `new`?"""
    return (event - old) % 65536 in range((new - old) % 65536)


class Area(NamedTuple):
    """One region of guest memory."""

    start: int
    content: bytearray


class Buffer(NamedTuple):
    """A piece of a chain that lies within one region: `offset` in area number `area`."""

    area: int
    offset: int
    length: int


class Descriptor(NamedTuple):
    addr: int
    length: int
    flags: int
    next: int

    def pack(self) -> bytes:
        return DESCRIPTOR.pack(*self)


@dataclass
class Chain:
    """The buffers of one chain: those that the device reads, then those that it writes."""

    readable: list[Buffer] = field(default_factory=list)
    writable: list[Buffer] = field(default_factory=list)


@dataclass
class Request:
    """A chain as virtio-blk sees it: sixteen bytes of header, data of either direction, one byte of status."""

    header: bytes
    readable: list[Buffer]
    writable: list[Buffer]
    status: Buffer


class Memory:
    """Guest memory."""

    def __init__(self, areas: Sequence[Area]) -> None:
        self.areas = areas

    def locate(self, addr: int) -> tuple[int, int]:
        """The number of the area that holds `addr`, and the offset of it in there."""
        for number, area in enumerate(self.areas):
            if area.start <= addr < area.start + len(area.content):
                return number, addr - area.start
        raise Broken("ADDRESS")

    def split(self, addr: int, length: int) -> list[Buffer]:
        """A range of addresses as pieces that each lie in one area."""
        buffers = []
        while length:
            number, offset = self.locate(addr)
            part = min(length, len(self.areas[number].content) - offset)
            buffers.append(Buffer(number, offset, part))
            addr, length = addr + part, length - part
        return buffers

    def read(self, buffer: Buffer) -> bytes:
        return bytes(self.areas[buffer.area].content[buffer.offset : buffer.offset + buffer.length])


def parse_table(content: bytes) -> list[Descriptor]:
    return [Descriptor(*fields) for fields in DESCRIPTOR.iter_unpack(content)]


def read_indirect(memory: Memory, descriptor: Descriptor) -> list[Descriptor]:
    """The table that an indirect descriptor refers to (section 2.7.5.3), which must lie in one region."""
    if descriptor.flags & NEXT:
        raise Broken("INDIRECT_NEXT")
    if descriptor.length == 0 or descriptor.length % 16:
        raise Broken("INDIRECT_LENGTH")
    try:
        number, offset = memory.locate(descriptor.addr)
    except Broken:
        raise Broken("INDIRECT_ADDRESS") from None
    if offset + descriptor.length > len(memory.areas[number].content):
        raise Broken("INDIRECT_ADDRESS")
    return parse_table(memory.read(Buffer(number, offset, descriptor.length)))


def read_chain(memory: Memory, table: list[Descriptor], head: int, indirect_negotiated: bool) -> Chain:
    """Follow a chain from its head (sections 2.7.5 and 2.7.13); raises Broken at the first descriptor that is wrong."""
    if head >= len(table):
        raise Broken("HEAD_RANGE")
    chain = Chain()
    index, steps, total, in_indirect = head, 0, 0, False
    while True:
        # After more steps than the table has entries, an entry is visited for the second time.
        steps += 1
        if steps > len(table):
            raise Broken("LOOP")
        descriptor = table[index]
        if descriptor.flags & INDIRECT:
            if not indirect_negotiated:
                raise Broken("INDIRECT_NOT_NEGOTIATED")
            if in_indirect:
                raise Broken("INDIRECT_NESTED")
            table = read_indirect(memory, descriptor)
            index, steps, in_indirect = 0, 0, True
            continue
        total += descriptor.length
        add_buffer(memory, chain, descriptor, total)
        if not descriptor.flags & NEXT:
            return chain
        if descriptor.next >= len(table):
            raise Broken("NEXT_RANGE")
        index = descriptor.next


def add_buffer(memory: Memory, chain: Chain, descriptor: Descriptor, total: int) -> None:
    """Add the buffer of one descriptor; `total` is the length of the chain up to its end."""
    if descriptor.length == 0:
        raise Broken("ZERO_LENGTH")
    if chain.writable and not descriptor.flags & WRITE:
        raise Broken("ORDER")
    if total > MAX_BYTES:
        raise Broken("TOO_MANY_BYTES")
    used = len(chain.readable) + len(chain.writable)
    if used == MAX_SEGMENTS:
        raise Broken("TOO_MANY_SEGMENTS")
    buffers = memory.split(descriptor.addr, descriptor.length)
    if used + len(buffers) > MAX_SEGMENTS:
        raise Broken("TOO_MANY_SEGMENTS")
    (chain.writable if descriptor.flags & WRITE else chain.readable).extend(buffers)


def drop_front(buffers: list[Buffer], size: int) -> list[Buffer]:
    kept = []
    for area, offset, length in buffers:
        dropped = min(size, length)
        size -= dropped
        if dropped < length:
            kept.append(Buffer(area, offset + dropped, length - dropped))
    return kept


def parse_request(memory: Memory, chain: Chain) -> Request:
    """Split a chain into header, data and status, however it is framed (sections 2.7.4 and 5.2.6)."""
    if sum(buffer.length for buffer in chain.readable) < HEADER_BYTES:
        raise Broken("NO_HEADER")
    if not chain.writable:
        raise Broken("NO_STATUS")
    header = b"".join(memory.read(buffer) for buffer in chain.readable)[:HEADER_BYTES]
    area, offset, length = chain.writable[-1]
    writable = chain.writable[:-1]
    if length > 1:
        writable = [*writable, Buffer(area, offset, length - 1)]
    status = Buffer(area, offset + length - 1, 1)
    return Request(header, drop_front(chain.readable, HEADER_BYTES), writable, status)
