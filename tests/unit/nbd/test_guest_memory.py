"""The guest's memory: data goes straight from and to it, and no reply reaches other parts of it."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest

import ringplane
from ringplane.block.sources.nbd import protocol as nbd
from ringplane.block.sources.nbd import reconnecting
from ringplane.block.sources.nbd.link import Link
from ringplane.block.sources.nbd.nbd_source import NbdSource
from ringplane.control.export import Export
from ringplane.driver import Driver
from ringplane.driver.virtqueue import peek, poke
from ringplane.virtio.blk import HEADER

from ..nbd_server import HangUp, NbdServer, Request, in_pieces, simple
from ..rig import PATIENCE, pattern
from ..waiting import wait_until
from .names import READ, WRITE

LENGTH = 64 << 10


def link_of(export: Export) -> Link:
    source = export.disk.source
    assert isinstance(source, NbdSource)
    [link] = source._links
    return link


def is_guest_memory(address: int) -> bool:
    """Whether the driver's memory is mapped there."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return "memfd:ringplane-driver" in line
    return False


def test_data_is_not_copied(server: NbdServer, tmp_path: Path) -> None:
    """Neither that of a write, nor that of a read, but for the part that comes with the start of the reply."""
    held: list[bytes] = []

    def hold_the_end(request: Request, server: NbdServer) -> bytes | None:
        if request.command != nbd.CMD_READ:
            return None
        reply = server.usual(request)
        held.append(reply[-512:])
        return reply[:-512]

    server.reply = hold_the_end
    with (
        ringplane.serve(server.uri, tmp_path / "socket", num_queues=1) as export,
        Driver(tmp_path / "socket", timeout=PATIENCE) as driver,
    ):
        link = link_of(export)
        # What the last message was made of: the header and the data of a request; where the data of a reply goes.
        driver.write(0, pattern(LENGTH))
        assert is_guest_memory(int(link._iovecs["base"][1]))
        sent = driver._submit_request(READ, 0, b"", LENGTH, 0)
        wait_until(lambda: int(link.record["left"]) == 512 and is_guest_memory(int(link._iovecs["base"][0])))
        server.connections[0].sendall(held[0])
        assert driver._answer(*sent).data == pattern(LENGTH)


# Where the buffers of requests are, after the rings. Between them and after them is memory that nothing may change.
MEMORY, BUFFERS = 2 << 20, 1 << 20
GAP, PIECES = 512, [512, 1024, 512, 2048]
CANARY = pattern(MEMORY - BUFFERS, 9)


class Guest:
    """Two requests at a time, with buffers all over its memory."""

    def __init__(self, driver: Driver) -> None:
        self._driver, self._start = driver, driver.memory.address + BUFFERS

    def try_both(self, kind: int) -> None:
        """Nothing but their buffers and status bytes is changed; nothing but their status bytes if they are writes."""
        poke(self._start, CANARY)
        expected = np.frombuffer(CANARY, np.uint8).copy()
        free = np.zeros(len(CANARY), bool)
        tickets, at = [], self._start
        for sector in (0, 512):
            header = np.array([(kind, 0, sector)], HEADER).tobytes()
            poke(at, header)
            expected[at - self._start :][: len(header)] = list(header)
            segments = [(at, len(header), False)]
            for size in (*PIECES, 1):
                at += segments[-1][1] + GAP
                status = size == 1
                segments.append((at, size, status or kind == READ))
                free[at - self._start :][:size] = status or kind == READ
            at += GAP
            tickets.append(self._driver.submit(segments))
        for ticket in tickets:
            self._driver.wait(ticket)
        found = np.frombuffer(peek(self._start, len(CANARY)), np.uint8)
        changed = np.flatnonzero((found != expected) & ~free)
        assert not changed.size, changed[:20]


def spoil(pieces: list[bytes], chance: random.Random) -> bytes:
    """One reply or chunk after the other, but for some that are wrong in one way or another."""
    pieces = list(pieces)
    for _ in range(chance.randint(1, 3)):
        number = chance.randrange(len(pieces))
        piece, place = bytearray(pieces[number]), chance.randrange(32)
        match chance.randrange(6):
            case 0:
                pieces.insert(chance.randrange(len(pieces) + 1), bytes(piece))
            case 1:
                piece[place : place + 4] = chance.randbytes(4)
            case 2:
                # The cookie of another one.
                piece[8:16] = chance.choice(pieces)[8:16]
            case 3:
                # What the length of a chunk is, or the high part of an offset.
                wrong = chance.choice([0, 1, 511, 4095, 4097, 1 << 16, (1 << 31) - 1, (1 << 32) - 1])
                piece[16:20] = struct.pack(">I", wrong)
            case 4:
                offset = chance.choice([-4096, -512, -1, 1, 512, 4095, 4096, 1 << 40]) % (1 << 64)
                piece[20:28] = struct.pack(">Q", offset)
            case 5:
                del piece[chance.randrange(len(piece) + 1) :]
        pieces[number] = bytes(piece)
    return b"".join(pieces) + chance.randbytes(chance.choice([0, 0, 5, 40, 9000]))


@pytest.mark.parametrize("kind", [READ, WRITE], ids=["read", "write"])
def test_replies_of_hostile_servers(
    server: NbdServer, tmp_path: Path, kind: int, structured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes, and then the end of the connection; on the next one the server is as it should be."""
    chance, held = random.Random(kind), list[Request]()
    monkeypatch.setattr(reconnecting, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(reconnecting, "LONGEST_PAUSE", 0.001)

    def reply(request: Request, server: NbdServer) -> bytes | None:
        if len(held) == 2:
            return None
        held.append(request)
        if len(held) < 2:
            return b""
        # A write gets what a read would get too.
        as_reads = chance.random() < 0.5 or kind == READ
        pieces = []
        for each in held:
            if not as_reads:
                pieces.append(simple(each))
            elif structured:
                pieces += in_pieces(server, each, chance)
            else:
                pieces.append(server.usual(Request(0, nbd.CMD_READ, each.cookie, each.offset, each.length)))
        server.connections[-1].sendall(spoil(pieces, chance))
        raise HangUp

    server.reply = reply
    with (
        ringplane.serve(server.uri, tmp_path / "socket", num_queues=1, nbd_reconnect_delay=3600),
        Driver(tmp_path / "socket", timeout=PATIENCE, memory_size=MEMORY) as driver,
    ):
        guest = Guest(driver)
        for _ in range(100):
            held.clear()
            guest.try_both(kind)
