"""A fuzzer that knows what requests, rings and messages look like: mostly valid, with something broken in each case.

    cd tests && python -m hostile.fuzz --seconds 3600

A case is made of its seed alone, so that a seed that found something finds it again (`--seed N --cases 1`), and can be
kept in seeds.txt, which is where each run begins. After each case an honest ring of the same front end is served with
the right data, no byte of the image has changed that nobody was allowed to write, and now and then that a neighbour on
the same I/O thread and the next front end are served and nothing has leaked. A log line for each broken ring and each
dropped front end says which rule that was.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from ringplane.driver.frontend import FrontEnd, Refused
from ringplane.vhost_user.messages import HEADER, RULES, MemoryRegion, ProtocolError, Request
from ringplane.virtio.features import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_VERSION_1,
)
from unit.packed import PackedRing
from unit.rig import (
    FLUSH,
    GET_ID,
    GUEST_BASE,
    IN,
    OUT,
    USER_BASE,
    DriverRing,
    Guest,
    Pending,
    Piece,
    Ring,
    header,
    new_eventfd,
)

from .conftest import SIZE, Victim, running

SEEDS = Path(__file__).with_name("seeds.txt")
DISCARD, WRITE_ZEROES = 11, 13
BLOCK_FEATURES = 0x1_FFFF

# Nobody may write to the second half of the disk. Requests are for its first sectors, as one that was made longer is
# still allowed to write as much as it asks for: some MiB, if all of the guest's memory is its data.
FENCE = SIZE // 2
SECTORS = FENCE // 512
FIRST_SECTORS = 1024

GUEST_SIZE = 1 << 20
SOON, LATE = 0.3, 20.0

# What a field is broken with, beside random numbers.
EXTREMES = (0, 1, 2, 7, 8, 15, 16, 0x7FFF, 0x8000, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 55, 1 << 63, (1 << 64) - 1)

DROPPED = re.compile(r"front end dropped: (.*)")
BROKEN = re.compile(r"ring broken by the driver: (.*)")


@dataclass
class Tally:
    """What has happened so far."""

    cases: int = 0
    requests: int = 0
    answered: int = 0
    rules: Counter[str] = field(default_factory=Counter)

    def note(self, log: str) -> None:
        for found in BROKEN.findall(log) + DROPPED.findall(log):
            self.rules[re.sub(r"\(chain \d+\)|0x[0-9a-f]+|\d+", "N", found)] += 1

    def __str__(self) -> str:
        listed = "\n".join(f"{count:8} {rule}" for rule, count in self.rules.most_common())
        return f"{self.cases} cases, {self.requests} requests, {self.answered} answered; rules broken:\n{listed}"


class Attacker:
    """A front end with two rings: the first is fuzzed, the second is honest."""

    def __init__(self, path: Path, draw: random.Random) -> None:
        self.draw, self.guest = draw, Guest(GUEST_SIZE)
        self.front_end = FrontEnd(path, LATE)
        self.notifiers = [tuple(new_eventfd() for _ in range(3)) for _ in range(2)]
        self.tables: list[tuple[int, int]] = []
        wanted = VIRTIO_F_VERSION_1 | BLOCK_FEATURES
        for feature in (VIRTIO_F_RING_PACKED, VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC):
            wanted |= draw.choice([0, feature])
        agreed = self.front_end.negotiate(wanted)
        half = GUEST_SIZE // 2
        regions = [MemoryRegion(GUEST_BASE + at, half, USER_BASE + at, at) for at in (0, half)]
        self.front_end.set_mem_table(regions, [self.guest.fd] * 2)
        self.packed = bool(agreed & VIRTIO_F_RING_PACKED)
        kind: Any = PackedRing if self.packed else Ring
        negotiated = {"event_idx": bool(agreed & VIRTIO_F_EVENT_IDX), "indirect": bool(agreed & VIRTIO_F_INDIRECT_DESC)}
        self.rings: list[DriverRing] = [
            kind(self.guest, draw.choice([4, 8, 16, 64]), features=agreed, **negotiated) for _ in range(2)
        ]
        for index in range(2):
            self.start(index)

    def start(self, index: int) -> None:
        front_end, layout = self.front_end, self.rings[index].layout()
        front_end.set_vring_num(index, layout.size)
        front_end.set_vring_base(index, layout.base)
        front_end.set_vring_addr(index, layout.desc, layout.avail, layout.used)
        kick, call, error = self.notifiers[index]
        front_end.set_vring_kick(index, kick)
        front_end.set_vring_call(index, call)
        front_end.set_vring_err(index, error)
        front_end.set_vring_enable(index, True)

    def close(self) -> None:
        self.front_end.close()
        for fd in [fd for three in self.notifiers for fd in three]:
            os.close(fd)
        self.guest.close()

    # Requests

    def offer(self, index: int, kind: int, sector: int, data: bytes, room: int) -> Pending | None:
        """Put a request into the ring, however it is framed, if there is room for it; no kick."""
        ring, draw, guest = self.rings[index], self.draw, self.guest
        content = header(kind, sector) + data
        pieces = [Piece(self.place(content[start:end]), end - start, False) for start, end in self.cuts(len(content))]
        answer = room + 1
        pieces += [Piece(guest.allocate(end - start), end - start, True) for start, end in self.cuts(answer)]
        direct = draw.randrange(len(pieces)) if ring.indirect and draw.random() < 0.5 else None
        if not ring.has_room(len(pieces) if direct is None else direct + 1):
            return None
        if direct is not None:
            # Where `add` puts the table.
            start = -(-guest.free // 16) * 16
            self.tables.append((start, len(pieces) - direct))
        pending = ring.add(pieces, direct)
        ring.put_available(pending.head)
        return pending

    def place(self, content: bytes) -> int:
        offset = self.guest.allocate(len(content), self.draw.choice([1, 2, 16, 512]))
        self.guest.write(offset, content)
        return offset

    def cuts(self, total: int) -> list[tuple[int, int]]:
        """`total` bytes in up to four pieces, none of them empty."""
        most = min(3, total - 1) if self.draw.random() < 0.5 else 0
        places = sorted(self.draw.sample(range(1, total), self.draw.randrange(most + 1)) if most else [])
        return list(zip([0, *places], [*places, total], strict=True))

    def any_request(self) -> Pending | None:
        draw = self.draw
        kind = draw.choice([IN, IN, OUT, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, draw.randrange(30)])
        sector, count = draw.randrange(FIRST_SECTORS), draw.randrange(1, 9)
        if kind in (DISCARD, WRITE_ZEROES, 14):
            return self.offer(0, kind, 0, struct.pack("<QII", sector, count, draw.choice([0, 0, 1])), 0)
        # Requests that the disk does not know may have data too.
        writes = kind == OUT or draw.random() < 0.1
        data = draw.randbytes(512 * count) if writes else b""
        return self.offer(0, kind, sector, data, 512 * count if kind == IN else 20)

    def kick(self, index: int) -> None:
        self.rings[index].publish()
        os.eventfd_write(self.notifiers[index][0], 1)

    def read_honestly(self, expected: bytes) -> None:
        """A read of the second half of the disk through the honest ring."""
        sector = SECTORS + self.draw.randrange(SECTORS - 1)
        ring = self.rings[1]
        while ring.collect():
            pass
        pending = None
        while pending is None:
            # Some ways to frame it need more descriptors than a small ring has.
            pending = self.offer(1, IN, sector, b"", 512)
        self.kick(1)
        end = time.monotonic() + LATE
        while not ring.collect():
            assert time.monotonic() < end, "the honest ring is not served"
            time.sleep(0.0005)
        content = b"".join(self.guest.read(piece.offset, piece.size) for piece in pending.writable)
        start = sector * 512 - FENCE
        assert content == expected[start : start + 512] + b"\0", "the honest ring got other data"

    # What is broken

    def value(self) -> int:
        near = GUEST_BASE + self.draw.randrange(-64, GUEST_SIZE + 64)
        return self.draw.choice([*EXTREMES, near, self.draw.getrandbits(16), self.draw.getrandbits(64)])

    def break_field(self, start: int, fields: str) -> None:
        """Write over one of the fields, given as for struct.pack, of the struct at this offset in guest memory."""
        number = self.draw.randrange(len(fields))
        place = start + struct.calcsize("<" + fields[:number])
        size = struct.calcsize("<" + fields[number])
        self.guest.write(place, (self.value() & (1 << 8 * size) - 1).to_bytes(size, "little"))

    def break_something(self, pending: Pending | None) -> None:
        draw, ring = self.draw, self.rings[0]
        what = draw.choice(["descriptor", "descriptor", "table", "header", "avail", "used"])
        if what == "descriptor":
            # addr, len, flags, next; of a packed ring addr, len, id, flags
            self.break_field(ring.desc + 16 * draw.randrange(ring.size), "QIHH")
        elif what == "table" and self.tables:
            start, count = draw.choice(self.tables)
            self.break_field(start + 16 * draw.randrange(count), "QIHH")
        elif what == "header" and pending is not None:
            # Not a sector that others could mean: what the fence keeps out is not to be asked for.
            offset = pending.pieces[0].offset
            self.guest.write(offset, struct.pack("<I", draw.choice([*range(30), draw.getrandbits(32)])))
        elif what == "avail":
            self.break_field(ring.avail, "HH" if self.packed else "HH" + "H" * ring.size)
        else:
            self.break_field(ring.used, "HH" if self.packed else "HHHHHH")


def ring_case(victim: Victim, draw: random.Random, tally: Tally, expected: bytes) -> None:
    """Some requests with something broken among them, several times over, and stops and starts in between."""
    attacker = Attacker(victim.socket, draw)
    try:
        for _ in range(draw.randrange(1, 6)):
            offered = [attacker.any_request() for _ in range(draw.randrange(1, 8))]
            if draw.random() < 0.8:
                attacker.break_something(draw.choice(offered))
            attacker.kick(0)
            tally.requests += sum(pending is not None for pending in offered)
            select.select([attacker.notifiers[0][2]], [], [], draw.choice([0, 0.002, 0.02]))
            # What the broken ring tells is not to be believed.
            with contextlib.suppress(Exception):
                tally.answered += len(attacker.rings[0].collect())
            attacker.read_honestly(expected)
            if draw.random() < 0.2:
                attacker.front_end.get_vring_base(0)
                attacker.rings[0].pending.clear()
                attacker.start(0)
    finally:
        attacker.close()


def message_case(victim: Victim, draw: random.Random) -> None:
    """Messages of any kind with payloads of any kind and any fds, then the end, at any moment."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.settimeout(SOON)
        connection.connect(str(victim.socket))
        with contextlib.suppress(OSError):
            for _ in range(draw.randrange(1, 12)):
                send_any_message(connection, draw)
            while draw.random() < 0.7 and connection.recv(256):
                pass


def send_any_message(connection: socket.socket, draw: random.Random) -> None:
    number = draw.choice([*map(int, Request)] * 3 + [0, 44, draw.getrandbits(32)])
    sizes = list(RULES[Request(number)].payload.sizes) if number in Request._value2member_map_ else [8]
    size = draw.choice(sizes) if draw.random() < 0.9 else draw.randrange(300)
    words = [draw.choice([*EXTREMES, draw.getrandbits(3), draw.getrandbits(64)]) for _ in range(size // 8 + 1)]
    payload = struct.pack(f"<{len(words)}Q", *words)[:size]
    flags = draw.choice([1, 1, 1, 9, 9, 5, 0, 2, draw.getrandbits(32)])
    told = size if draw.random() < 0.95 else draw.choice(EXTREMES) & 0xFFFF_FFFF
    fds = [any_fd(draw) for _ in range(draw.choice([0, 0, 1, 1, 2, 8, 9]))]
    try:
        data = HEADER.pack(number & 0xFFFF_FFFF, flags, told) + payload
        cut = draw.randrange(1, len(data)) if draw.random() < 0.1 else len(data)
        socket.send_fds(connection, [data[:cut]], fds)
        connection.sendall(data[cut:])
    finally:
        for fd in fds:
            os.close(fd)


def any_fd(draw: random.Random) -> int:
    kind = draw.choice(["eventfd", "memfd", "pipe", "socket"])
    if kind == "eventfd":
        return os.eventfd(0, os.EFD_CLOEXEC)
    if kind == "memfd":
        fd = os.memfd_create("fuzz")
        os.ftruncate(fd, draw.choice([0, 4096, 1 << 20]))
        return fd
    if kind == "socket":
        return socket.socket(socket.AF_UNIX).detach()
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def seeds(first: int | None) -> Iterator[int]:
    if first is not None:
        yield first
    else:
        yield from (int(line.split()[0]) for line in SEEDS.read_text().splitlines() if line and line[0] != "#")
    while True:
        yield random.getrandbits(48)


def run_cases(victim: Victim, over: Callable[[Tally], bool], first: int | None = None) -> Tally:
    """Case after case until it is `over`; AssertionError that names the seed of the case that found something."""
    tally, image = Tally(), victim.folder / "bad.img"
    expected = os.urandom(FENCE)
    with image.open("r+b") as file:
        file.seek(FENCE)
        file.write(expected)
        os.fsync(file.fileno())
    victim.check()
    before = victim.resources()
    for seed in seeds(first):
        if over(tally):
            break
        draw = random.Random(seed)
        try:
            if draw.random() < 0.7:
                with contextlib.suppress(ProtocolError, Refused, ConnectionError):
                    ring_case(victim, draw, tally, expected)
            else:
                message_case(victim, draw)
            tally.cases += 1
            assert image.read_bytes()[FENCE:] == expected, "bytes changed that nobody was allowed to write"
            if tally.cases % 50 == 0:
                victim.check()
                victim.wait_for_resources(before)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}\n{victim.told()[-2000:]}") from error
    victim.check()
    victim.wait_for_resources(before)
    tally.note(victim.told())
    return tally


@click.command(help=__doc__)
@click.option("--seconds", type=float, default=60.0, show_default=True)
@click.option("--cases", type=int, help="End after so many cases.")
@click.option("--seed", type=int, help="The seed of the first case.")
@click.option("--engine", type=click.Choice(["io_uring", "aio"]), default="io_uring", show_default=True)
def main(seconds: float, cases: int | None, seed: int | None, engine: str) -> None:
    end = time.monotonic() + seconds
    with running(engine) as victim:
        tally = run_cases(
            victim, lambda tally: time.monotonic() > end or (cases is not None and tally.cases >= cases), seed
        )
    click.echo(tally)


if __name__ == "__main__":
    main()
