"""A structure-aware fuzzer of requests, rings and messages: mostly valid, with something broken in each case.

    cd tests && python -m hostile.fuzz --seconds 3600

It breaks fields of rings, chains, requests and the in-flight area. While requests are in flight, it stops rings, adds
and removes memory, and switches a dirty log on and off. Disks are regular or zoned; notifications are eventfds or
messages. Other connections send messages of any kind.

A case depends only on its seed, so a seed that found something finds it again (`--seed N --cases 1`) and can be kept in
seeds.txt, with which each run starts. Each case checks that an honest ring of the same front end and a neighbour on the
same I/O thread read the right data, that no byte of the image changed that nobody was allowed to write, and that no fd,
thread or mapping leaked. Now and then it also checks the next front end, and that zones accept data at their write
pointers. A log line for each broken ring and each dropped front end names the rule. SIGTERM ends the run early.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

from ringplane.driver import Driver
from ringplane.driver.frontend import WANTED_PROTOCOL_FEATURES, Refused
from ringplane.inflight.tracking import region_bytes
from ringplane.vhost_user.message_rules import RULES
from ringplane.vhost_user.messages import HEADER, VHOST_F_LOG_ALL, ProtocolError, ProtocolFeature, Request
from ringplane.vhost_user.payloads import Inflight, MemoryRegion, VringState
from unit.combinations import FEATURES
from unit.packed_ring import PackedRing
from unit.rig import (
    APPEND,
    CLOSE,
    DISCARD,
    FINISH,
    FLUSH,
    GET_ID,
    GUEST_BASE,
    IN,
    OK,
    OPEN,
    OUT,
    PATIENCE,
    REPORT_ZONES,
    RESET,
    RESET_ALL,
    USER_BASE,
    WRITE_ZEROES,
    Pending,
    Piece,
    Ring,
    header,
)

from .attacker import PAGE, Attacker, RemoteLine
from .conftest import FOLDERS, SIZE, ZONE, Victim, running

SEEDS = Path(__file__).with_name("seeds.txt")
SIZES = (4, 8, 16, 64)

# Nobody may write to one half of the disk. Requests are for the first sectors of the other half, because a request
# whose length was broken may still write as much as it asks for: some MiB, if all of the guest's memory is its data.
FENCE = SIZE // 2
SECTORS = FENCE // 512
FIRST_SECTORS = 1024

ZONED_KINDS = (APPEND, APPEND, APPEND, IN, OUT, FLUSH, REPORT_ZONES, OPEN, CLOSE, FINISH, RESET, RESET, RESET_ALL)

# The honest ring and its requests have memory of their own, which no broken field can point to. Otherwise a request
# that is valid except for an address or a length could ask the device to write there.
GUEST_SIZE = 1 << 20
HONEST = 2 * GUEST_SIZE
# An in-flight area for two rings of any of these sizes, and a log with a bit for each page of the guest's memory.
AREA_SIZE = 2 * region_bytes(max(SIZES), packed=True)
LOG_SIZE = (GUEST_BASE + HONEST + GUEST_SIZE) >> 15
SOON, LATE = 0.3, 20.0

# The values that a field is broken with, besides random numbers.
EXTREMES = (0, 1, 2, 7, 8, 15, 16, 0x7FFF, 0x8000, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 55, 1 << 63, (1 << 64) - 1)

DROPPED = re.compile(r"front end dropped: (.*)")
BROKEN = re.compile(r"ring broken by the driver: (.*)")


@dataclass(frozen=True)
class Ground:
    """A disk that is fuzzed: requests are for the sectors from `first` on, the start of one of its halves."""

    name: str
    first: int = 0
    zoned: bool = False

    @property
    def fence(self) -> int:
        """The first byte of the half that nobody may write to."""
        return 0 if self.first else FENCE

    def image(self, folder: Path) -> Path:
        return folder / f"{self.name}.img"

    def build_fence(self, folder: Path) -> bytes:
        """Fill the half that nobody may write to; returns its content."""
        expected = os.urandom(FENCE)
        with self.image(folder).open("r+b") as file:
            file.seek(self.fence)
            file.write(expected)
            os.fsync(file.fileno())
        return expected

    def check_fence(self, folder: Path, expected: bytes) -> None:
        unchanged = self.image(folder).read_bytes()[self.fence : self.fence + FENCE] == expected
        assert unchanged, f"{self.name}: bytes changed that nobody was allowed to write"


# On a zoned disk the fence consists of the conventional zones, which come first and cannot be reset.
COMMON, ZONED = Ground("bad"), Ground("zoned", SECTORS, zoned=True)
GROUNDS = (COMMON, COMMON, ZONED)


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


class InbandLine(RemoteLine):
    """A ring without eventfds, which is kicked by messages."""

    def set_notifiers(self) -> None:
        """There are none."""

    def kick(self) -> None:
        self.ring.publish()
        self.rig.front_end.send(Request.VRING_KICK, VringState(self.number, 0))


class FuzzedFrontEnd(Attacker):
    """Its first ring is fuzzed, and so are the messages that it sends meanwhile; the second ring is honest."""

    def __init__(self, folder: Path, ground: Ground, draw: random.Random) -> None:
        self.draw, self.ground = draw, ground
        self.tables: list[tuple[int, int]] = []
        self.extra: MemoryRegion | None = None
        self.honest_free = HONEST
        self.channel: socket.socket | None = None
        if draw.random() < 0.15:
            self.line_class = InbandLine
        super().__init__(
            folder / f"{ground.name}.sock",
            ring_class=draw.choice([Ring, PackedRing]),
            sizes=(draw.choice(SIZES), draw.choice(SIZES)),
            **{name: draw.random() < 0.5 for name in FEATURES},
            protocol_features=self.protocol_features_wanted(),
            guest_size=HONEST + GUEST_SIZE,
        )
        self.area, self.log = (os.memfd_create(name, os.MFD_CLOEXEC) for name in ("in flight", "log"))
        os.ftruncate(self.area, AREA_SIZE)
        os.ftruncate(self.log, LOG_SIZE)

    def protocol_features_wanted(self) -> ProtocolFeature:
        wanted = WANTED_PROTOCOL_FEATURES | ProtocolFeature.INFLIGHT_SHMFD | ProtocolFeature.LOG_SHMFD
        inband = ProtocolFeature.BACKEND_REQ | ProtocolFeature.INBAND_NOTIFICATIONS
        return wanted | inband if self.line_class is InbandLine else wanted

    def connect(self) -> None:
        super().connect()
        if self.line_class is InbandLine:
            self.open_channel()

    def open_channel(self) -> None:
        """Open a new back-end channel."""
        self.close_channel()
        self.channel, theirs = socket.socketpair()
        self.channel.setblocking(False)
        with theirs:
            self.front_end.send(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])

    def close_channel(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def close(self) -> None:
        super().close()
        self.close_channel()
        os.close(self.area)
        os.close(self.log)

    def regions(self) -> list[MemoryRegion]:
        half = GUEST_SIZE // 2
        regions = [MemoryRegion(GUEST_BASE + at, half, USER_BASE + at, at) for at in (0, half)]
        return [*regions, MemoryRegion(GUEST_BASE + HONEST, GUEST_SIZE, USER_BASE + HONEST, HONEST)]

    @contextlib.contextmanager
    def honest_memory(self) -> Iterator[None]:
        """Allocate from the honest ring's memory inside this block."""
        free, self.guest.free = self.guest.free, self.honest_free
        try:
            yield
        finally:
            self.guest.free, self.honest_free = free, self.guest.free

    def new_ring(self, line: RemoteLine) -> None:
        with self.honest_memory() if line.number == 1 else contextlib.nullcontext():
            super().new_ring(line)

    # Requests

    def offer(self, index: int, kind: int, sector: int, data: bytes, room: int) -> Pending | None:
        """Put a request with any framing into the ring if there is room for it, without a kick."""
        ring, draw, guest = self.lines[index].ring, self.draw, self.guest
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
        sector, count = self.ground.first + draw.randrange(FIRST_SECTORS), draw.randrange(1, 9)
        if self.ground.zoned and draw.random() < 0.9:
            kind = draw.choice(ZONED_KINDS)
            # Most requests for a zone are for its start.
            sector -= sector % ZONE if draw.random() < 0.9 else 0
        if kind in (DISCARD, WRITE_ZEROES, 14):
            return self.offer(0, kind, 0, struct.pack("<QII", sector, count, draw.choice([0, 0, 1])), 0)
        # Requests of unknown types may have data too.
        writes = kind in (OUT, APPEND) or draw.random() < 0.1
        data = draw.randbytes(512 * count) if writes else b""
        room = {IN: 512 * count, APPEND: 8, REPORT_ZONES: 64 * count}.get(kind, 20)
        return self.offer(0, kind, sector, data, room)

    def read_honestly(self, expected: bytes) -> None:
        """Read from the half behind the fence through the honest ring."""
        at = self.draw.randrange(SECTORS - 1)
        sector = self.ground.fence // 512 + at
        line = self.lines[1]
        ring = line.ring
        while ring.collect():
            pass
        pending = None
        while pending is None:
            # Some framings need more descriptors than a small ring has.
            with self.honest_memory():
                pending = self.offer(1, IN, sector, b"", 512)
        line.kick()
        end = time.monotonic() + LATE
        while not ring.collect():
            assert time.monotonic() < end, "the honest ring is not served"
            time.sleep(0.0005)
        content = b"".join(self.guest.read(piece.offset, piece.size) for piece in pending.writable)
        assert content == expected[at * 512 : (at + 1) * 512] + b"\0", "the honest ring got other data"

    # Breaking fields

    def value(self) -> int:
        near = GUEST_BASE + self.draw.randrange(-64, GUEST_SIZE + 64)
        return self.draw.choice([*EXTREMES, near, self.draw.getrandbits(16), self.draw.getrandbits(64)])

    def break_field(self, start: int, fields: str) -> None:
        """Overwrite one field of the struct at this offset in guest memory; `fields` is as for struct.pack."""
        number = self.draw.randrange(len(fields))
        place = start + struct.calcsize("<" + fields[:number])
        size = struct.calcsize("<" + fields[number])
        self.guest.write(place, (self.value() & (1 << 8 * size) - 1).to_bytes(size, "little"))

    def break_something(self, pending: Pending | None) -> None:
        draw, ring = self.draw, self.lines[0].ring
        packed = isinstance(ring, PackedRing)
        what = draw.choice(["descriptor", "descriptor", "table", "header", "avail", "used", "area"])
        if what == "descriptor":
            # addr, len, flags, next; in a packed ring addr, len, id, flags
            self.break_field(ring.desc + 16 * draw.randrange(ring.size), "QIHH")
        elif what == "table" and self.tables:
            start, count = draw.choice(self.tables)
            self.break_field(start + 16 * draw.randrange(count), "QIHH")
        elif what == "header" and pending is not None:
            # Not the sector: a valid request may not ask for what is behind the fence.
            offset = pending.pieces[0].offset
            self.guest.write(offset, struct.pack("<I", draw.choice([*range(30), draw.getrandbits(32)])))
        elif what == "area":
            os.pwrite(self.area, draw.randbytes(draw.choice([1, 2, 8, 64])), draw.randrange(AREA_SIZE - 64))
        elif what == "avail":
            self.break_field(ring.avail, "HH" if packed else "HH" + "H" * ring.size)
        else:
            self.break_field(ring.used, "HH" if packed else "HHHHHH")

    # Messages that a front end may send while requests are in flight

    def say_something(self) -> None:
        front_end, draw = self.front_end, self.draw
        what = draw.choice(["memory", "log", "area", "stop", "stop", "disable", "call", "channel", "table"])
        with contextlib.suppress(Refused):
            if what == "memory":
                self.change_memory()
            elif what == "log":
                front_end.set_log_base(LOG_SIZE, 0, self.log)
                front_end.set_features(front_end.features ^ VHOST_F_LOG_ALL)
            elif what == "area":
                front_end.set_inflight_fd(Inflight(AREA_SIZE, 0, 2, max(SIZES)), self.area)
            elif what == "stop":
                self.restart()
            elif what == "disable":
                front_end.set_vring_enable(0, False)
                front_end.set_vring_enable(0, True)
            elif what == "call":
                front_end.set_vring_call(0, self.lines[0].call_fd)
            elif what == "channel":
                self.open_channel()
            else:
                self.share_memory()

    def change_memory(self) -> None:
        """Add or remove memory, or remove a region and add it again."""
        if self.extra is not None:
            self.front_end.rem_mem_reg(self.extra)
            self.extra = None
        elif self.draw.random() < 0.5:
            self.extra = MemoryRegion(1 << 40, PAGE, 1 << 40, 0)
            self.front_end.add_mem_reg(self.extra, self.guest.fd)
        else:
            region = self.draw.choice(self.regions())
            self.front_end.rem_mem_reg(region)
            self.front_end.add_mem_reg(region, self.guest.fd)

    def answer_channel(self) -> None:
        """Answer the messages on the channel: correctly, wrongly or not at all; or close it."""
        what = self.draw.choice(["right", "right", "right", "wrong", "nothing", "close"])
        if self.channel is None or what == "nothing":
            return
        if what == "close":
            self.close_channel()
            return
        with contextlib.suppress(OSError):
            while said := self.channel.recv(HEADER.size + VringState.sizes[0]):
                answer = HEADER.pack(HEADER.unpack_from(said)[0], 5, 8) + bytes(8)
                self.channel.send(answer if what == "right" else self.draw.randbytes(self.draw.randrange(1, 40)))

    def restart(self) -> None:
        """Stop the ring, which waits for the requests in flight, and continue with a new one."""
        self.lines[0].stop()
        self.new_ring(self.lines[0])


def ring_case(folder: Path, ground: Ground, draw: random.Random, tally: Tally, expected: bytes) -> None:
    """Offer several batches of requests with something broken among them; stop and start the ring in between."""
    attacker = FuzzedFrontEnd(folder, ground, draw)
    line = attacker.lines[0]
    try:
        for _ in range(draw.randrange(1, 6)):
            offered = [attacker.any_request() for _ in range(draw.randrange(1, 8))]
            if draw.random() < 0.8:
                attacker.break_something(draw.choice(offered))
            line.kick()
            if draw.random() < 0.3:
                attacker.say_something()
            tally.requests += sum(pending is not None for pending in offered)
            select.select([line.err_fd], [], [], draw.choice([0, 0.002, 0.02]))
            attacker.answer_channel()
            # The used elements of a broken ring may be invalid.
            with contextlib.suppress(Exception):
                tally.answered += len(line.ring.collect())
            attacker.read_honestly(expected)
            if draw.random() < 0.2:
                attacker.restart()
    finally:
        attacker.close()


def message_case(path: Path, draw: random.Random) -> None:
    """Send messages of any type with any payloads and any fds, and disconnect at any moment."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.settimeout(SOON)
        connection.connect(str(path))
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
    announced = size if draw.random() < 0.95 else draw.choice(EXTREMES) & 0xFFFF_FFFF
    fds = [any_fd(draw) for _ in range(draw.choice([0, 0, 1, 1, 2, 8, 9]))]
    try:
        data = HEADER.pack(number & 0xFFFF_FFFF, flags, announced) + payload
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


def check_zones(folder: Path) -> None:
    """Check that after a reset each zone that was fuzzed accepts data at its start."""
    data = os.urandom(4096)
    with Driver(folder / f"{ZONED.name}.sock", memory_size=16 << 20, timeout=PATIENCE) as driver:
        assert driver.request(RESET_ALL, 0).status == OK
        for start in range(ZONED.first, ZONED.first + FIRST_SECTORS, ZONE):
            answer = driver.request(APPEND, start, data, read=8)
            assert (answer.status, answer.data) == (OK, start.to_bytes(8, "little")), answer
            assert driver.read(start * 512, len(data)) == data
            # Because only some zones may be open at a time.
            assert driver.request(FINISH, start).status == OK


def seeds(first: int | None) -> Iterator[int]:
    if first is not None:
        yield first
    else:
        yield from (int(line.split()[0]) for line in SEEDS.read_text().splitlines() if line and line[0] != "#")
    while True:
        yield random.getrandbits(48)


def run_cases(victim: Victim, over: Callable[[Tally], bool], first: int | None = None) -> Tally:
    """Run cases until it is `over`. Raises AssertionError with the seed of the case that found something."""
    tally = Tally()
    fences = {ground: ground.build_fence(victim.folder) for ground in GROUNDS}
    victim.check()
    check_zones(victim.folder)
    before = victim.resources()
    for seed in seeds(first):
        if over(tally):
            break
        draw = random.Random(seed)
        ground = draw.choice(GROUNDS)
        try:
            if draw.random() < 0.7:
                with contextlib.suppress(ProtocolError, Refused, ConnectionError):
                    ring_case(victim.folder, ground, draw, tally, fences[ground])
            else:
                message_case(victim.folder / f"{ground.name}.sock", draw)
            tally.cases += 1
            ground.check_fence(victim.folder, fences[ground])
            victim.check_neighbour(draw.randbytes(512))
            victim.wait_for_resources(before)
            if tally.cases % 50 == 0:
                victim.check()
                check_zones(victim.folder)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}\n{victim.logged()[-2000:]}") from error
    victim.check()
    victim.wait_for_resources(before)
    tally.note(victim.logged())
    return tally


@click.command(help=__doc__)
@click.option("--seconds", type=float, default=60.0, show_default=True)
@click.option("--cases", type=int, help="End after so many cases.")
@click.option("--seed", type=int, help="The seed of the first case.")
@click.option("--engine", type=click.Choice(list(FOLDERS)), default="io_uring", show_default=True)
def main(seconds: float, cases: int | None, seed: int | None, engine: str) -> None:
    end, asked_to_end = time.monotonic() + seconds, threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked_to_end.set())

    def over(tally: Tally) -> bool:
        return time.monotonic() > end or asked_to_end.is_set() or (cases is not None and tally.cases >= cases)

    with running(engine) as victim:
        tally = run_cases(victim, over, seed)
    click.echo(tally)


if __name__ == "__main__":
    main()
