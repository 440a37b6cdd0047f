"""A worker with queues, and a small driver for them: guest memory is a memfd, notifications are eventfds."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import select
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numba
import pytest

from ringplane.dataplane.loop import TURN, serve_ready
from ringplane.dataplane.queue import Device, Queue, RingLayout
from ringplane.dataplane.worker import POLL_US, Worker
from ringplane.engines.choose import MEMORY, make_engine
from ringplane.engines.common import IN_MEMORY, THROUGH_WORKER
from ringplane.image import Image
from ringplane.memory import MemoryTable, Region
from ringplane.native.access import fence, store16
from ringplane.virtio.features import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC

IN, OUT, FLUSH, SCSI_CMD, SCSI_CMD_OUT, GET_ID = 0, 1, 4, 2, 3, 8
OK, IOERR, UNSUPP = 0, 1, 2
NO_ANSWER = 0xEE

NEXT, WRITE, INDIRECT = 1, 2, 4

# A test that waits for this long has found a hang.
PATIENCE = 20.0

GUEST_BASE, USER_BASE = 0x1_0000_0000, 0x7F00_0000_0000
RING_AREA = 64 * 1024


@numba.njit
def barrier() -> None:
    """The driver's memory barrier (section 2.7.13.3), which Python has no other way to say."""
    fence()


@numba.njit
def store_between_barriers(address: int, value: int) -> None:
    """What the driver stores for the device to see at any time."""
    fence()
    store16(address, value)
    fence()


class Guest:
    """Guest memory: one memfd, mapped here as the driver sees it and mapped again for the device."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.memory = mmap.mmap(self.fd, size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.free = 0

    def table(self) -> MemoryTable:
        """A new mapping for the device: two adjoining regions, so that buffers may run over the border."""
        half = self.size // 2
        return MemoryTable(
            Region.map(GUEST_BASE + start, USER_BASE + start, half, start, self.fd) for start in (0, half)
        )

    def allocate(self, size: int, alignment: int = 1) -> int:
        """The offset of a piece of memory that nobody else has."""
        start = -(-self.free // alignment) * alignment
        self.free = start + size
        assert self.free <= self.size, "the test needs more guest memory"
        return start

    def read(self, offset: int, size: int) -> bytes:
        return self.memory[offset : offset + size]

    def write(self, offset: int, content: bytes) -> None:
        self.memory[offset : offset + len(content)] = content

    def store16(self, offset: int, value: int) -> None:
        """Store 16 bits at once, between two barriers (struct.pack_into clears them first, which a device may see)."""
        store_between_barriers(self.address + offset, value)

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)


@dataclass(frozen=True)
class Piece:
    """The buffer of one descriptor: where in guest memory, and for whom."""

    offset: int
    size: int
    writable: bool

    def pack(self, flags: int, following: int) -> bytes:
        flags |= WRITE if self.writable else 0
        return struct.pack("<QIHH", GUEST_BASE + self.offset, self.size, flags, following)


@dataclass
class Pending:
    """A request that was put into a ring, and where its answer will be."""

    head: int
    pieces: list[Piece]
    descriptors: list[int]
    used_length: int | None = None

    @property
    def writable(self) -> list[Piece]:
        return [piece for piece in self.pieces if piece.writable]


@dataclass(frozen=True)
class Answer:
    """What the device made of a request: `data` is all that it may write, but for the status."""

    status: int
    used_length: int
    data: bytes


class Ring:
    """The driver's end of a split virtqueue in guest memory (virtio 1.2, section 2.7)."""

    def __init__(self, guest: Guest, size: int, *, event_idx: bool = False, start: int = 0) -> None:
        self.guest, self.size, self.event_idx = guest, size, event_idx
        self.desc = guest.allocate(16 * size, 16)
        self.avail = guest.allocate(6 + 2 * size, 2)
        self.used = guest.allocate(6 + 8 * size, 4)
        self.avail_idx = self.used_idx = start
        self._free = list(range(size))
        self.pending: dict[int, Pending] = {}
        guest.write(self.avail, struct.pack("<HH", 0, start))
        guest.write(self.used, struct.pack("<HH", 0, start))

    def layout(self, *, indirect: bool = True, write_through: bool = False, features: int = 0) -> RingLayout:
        return RingLayout(
            size=self.size,
            desc=USER_BASE + self.desc,
            avail=USER_BASE + self.avail,
            used=USER_BASE + self.used,
            base=self.avail_idx,
            features=features | self.event_idx * VIRTIO_F_EVENT_IDX | indirect * VIRTIO_F_INDIRECT_DESC,
            write_through=write_through,
        )

    def has_room(self, count: int) -> bool:
        return len(self._free) >= count

    def add(self, pieces: Sequence[Piece], direct: int | None = None) -> Pending:
        """Write the descriptors of a chain; all but `direct` of them in an indirect table, all direct if None."""
        first = list(pieces if direct is None else pieces[:direct])
        rest = [] if direct is None else list(pieces[direct:])
        places = [self._free.pop() for _ in range(len(first) + bool(rest))]
        for number, piece in enumerate(first):
            last = number + 1 == len(places)
            self._write_descriptor(places[number], piece.pack(0 if last else NEXT, 0 if last else places[number + 1]))
        if rest:
            table = b"".join(piece.pack(NEXT, number + 1) for number, piece in enumerate(rest[:-1])) + rest[-1].pack(
                0, 0
            )
            offset = self.guest.allocate(len(table), 16)
            self.guest.write(offset, table)
            self._write_descriptor(places[-1], struct.pack("<QIHH", GUEST_BASE + offset, len(table), INDIRECT, 0))
        pending = Pending(places[0], list(pieces), places)
        self.pending[pending.head] = pending
        return pending

    def _write_descriptor(self, index: int, content: bytes) -> None:
        self.guest.write(self.desc + 16 * index, content)

    def put_available(self, head: int) -> None:
        """Fill the next entry of the available ring; `publish` makes it visible."""
        self.guest.write(self.avail + 4 + 2 * (self.avail_idx % self.size), struct.pack("<H", head))
        self.avail_idx = (self.avail_idx + 1) % 65536

    def publish(self) -> None:
        self.set_avail_idx(self.avail_idx)

    def set_avail_idx(self, index: int) -> None:
        self.guest.store16(self.avail + 2, index)

    def set_used_event(self, index: int) -> None:
        self.guest.store16(self.avail + 4 + 2 * self.size, index)

    def device_used_idx(self) -> int:
        barrier()
        return int(struct.unpack_from("<H", self.guest.memory, self.used + 2)[0])

    def collect(self) -> list[Pending]:
        """What has been answered since the last call, in the order of the used ring."""
        done = []
        end = self.device_used_idx()
        while self.used_idx != end:
            element = self.used + 4 + 8 * (self.used_idx % self.size)
            head, length = struct.unpack_from("<II", self.guest.memory, element)
            pending = self.pending.pop(head)
            pending.used_length = length
            self._free += pending.descriptors
            done.append(pending)
            self.used_idx = (self.used_idx + 1) % 65536
        return done


def header(kind: int, sector: int) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def new_eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def wait_for_event(fd: int, what: str) -> None:
    """Wait for an eventfd and take what is in it."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(PATIENCE * 1000), f"{what} did not come"
    os.eventfd_read(fd)


def has_event(fd: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        return os.eventfd_read(fd) > 0
    return False


@contextlib.contextmanager
def held(worker: Worker) -> Iterator[None]:
    """The worker's thread stands still; what is asked of it meanwhile happens in a row at the end, then it runs."""
    entered, release = threading.Event(), threading.Event()

    def stand_still() -> bool:
        entered.set()
        return release.wait(PATIENCE)

    holding = worker.call(stand_still)
    assert entered.wait(PATIENCE)
    try:
        yield
    finally:
        release.set()
        assert holding.result(PATIENCE)


def fetch_only(worker: Worker) -> None:
    """Asked of a held worker: take what is in the rings, but do not submit it yet, so that it is in flight for sure."""
    worker.call(worker._look_at_all_queues)
    # As many turns as a full ring takes.
    for _ in range(-(-1024 // TURN)):
        worker.call(lambda: serve_ready(worker._state[0]))


class Line:
    """A queue of the device with its driver's ring and eventfds."""

    # What `start` makes: a Ring, or what is like one.
    ring_class: type[Any] = Ring

    def __init__(self, rig: Rig, number: int, worker: Worker) -> None:
        self.rig, self.worker = rig, worker
        self.queue = Queue(rig.device, number, f"disk queue {number}")
        self.kick_fd, self.call_fd, self.queue.err_fd = new_eventfd(), new_eventfd(), new_eventfd()
        self.ring: Ring

    def start(
        self,
        *,
        size: int = 128,
        event_idx: bool = False,
        base: int = 0,
        indirect: bool = True,
        write_through: bool = False,
        table: MemoryTable | None = None,
        features: int = 0,
    ) -> Line:
        """Make a new ring and have it served."""
        self.ring = self.ring_class(self.rig.guest, size, event_idx=event_idx, start=base)
        self.resume(indirect=indirect, write_through=write_through, table=table, features=features)
        return self

    def resume(
        self,
        *,
        indirect: bool = True,
        write_through: bool = False,
        table: MemoryTable | None = None,
        base: int | None = None,
        features: int = 0,
    ) -> None:
        """Have the ring served that is there, from `base` on or from where its driver is."""
        layout = self.ring.layout(indirect=indirect, write_through=write_through, features=features)
        if base is not None:
            layout = replace(layout, base=base)
        self.worker.set_call_fd(self.queue, self.call_fd).result(PATIENCE)
        self.worker.start_queue(self.queue, layout, table or self.rig.guest.table(), self.kick_fd).result(PATIENCE)

    def stop(self) -> int:
        """Drain; returns the index to go on from."""
        self.worker.stop_queue(self.queue).result(PATIENCE)
        return self.queue.base

    def put(
        self,
        kind: int,
        sector: int = 0,
        data: bytes = b"",
        room: int = 0,
        *,
        readable: Sequence[int] | None = None,
        writable: Sequence[int] | None = None,
        direct: int | None = None,
        alignment: int = 16,
    ) -> Pending:
        """Put a request into the ring, without a kick: `data` is for the device to read, `room` bytes to write.

        `readable` and `writable` are the sizes of descriptors that header and data, and room and status, are cut into.
        Each buffer's offset in memory is a multiple of `alignment`, and not of twice that.
        """
        content = header(kind, sector) + data
        readable = readable if readable is not None else [16, len(data)] if data else [16]
        writable = writable if writable is not None else [room, 1] if room else [1]
        assert sum(readable) == len(content)
        assert sum(writable) == room + 1
        guest, pieces = self.rig.guest, []
        for size in readable:
            offset = guest.allocate(size + alignment, 2 * alignment) + alignment
            guest.write(offset, content[:size])
            content = content[size:]
            pieces.append(Piece(offset, size, False))
        for size in writable:
            offset = guest.allocate(size + alignment, 2 * alignment) + alignment
            guest.write(offset, bytes([NO_ANSWER]) * size)
            pieces.append(Piece(offset, size, True))
        pending = self.ring.add(pieces, direct)
        self.ring.put_available(pending.head)
        return pending

    def kick(self) -> None:
        self.ring.publish()
        os.eventfd_write(self.kick_fd, 1)

    def wait(self) -> list[Pending]:
        """Wait, as a driver does that sleeps until it is called, for all that is in the ring to be answered."""
        done: list[Pending] = []
        while True:
            if self.ring.event_idx:
                self.ring.set_used_event(self.ring.used_idx)
            answered = self.ring.collect()
            done += answered
            if not self.ring.pending:
                return done
            if answered:
                # They may have passed the event that was asked for; another one, and another look.
                continue
            wait_for_event(self.call_fd, f"the call of {self.queue.name}")

    def answer(self, pending: Pending) -> Answer:
        assert pending.used_length is not None, "not answered yet"
        content = b"".join(self.rig.guest.read(piece.offset, piece.size) for piece in pending.writable)
        return Answer(content[-1], pending.used_length, content[:-1])

    def do(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0, **framing: object) -> Answer:
        """Put a request into the ring, kick, wait, and return the answer."""
        pending = self.put(kind, sector, data, room, **framing)  # type: ignore[arg-type]
        self.kick()
        self.wait()
        return self.answer(pending)


@dataclass
class Rig:
    """A disk over an image, workers, and as many lines as a test asks for."""

    path: Path
    image: Image
    device: Device
    guest: Guest
    workers: list[Worker]
    lines: list[Line] = field(default_factory=list)

    def line(self, worker: int = 0) -> Line:
        self.lines.append(Line(self, len(self.lines), self.workers[worker]))
        return self.lines[-1]

    def content(self) -> bytes:
        """The image as the page cache or the disk has it."""
        return self.path.read_bytes()

    def close(self) -> None:
        for line in self.lines:
            if line.worker._thread.is_alive():
                line.stop()
        for worker in self.workers:
            worker.stop()
        for line in self.lines:
            for fd in (line.kick_fd, line.call_fd, line.queue.err_fd):
                os.close(fd)
        self.guest.close()
        self.device.close()
        self.image.close()


def make(
    path: Path,
    content: bytes | None,
    *,
    direct: bool = False,
    read_only: bool = False,
    block_size: int = 512,
    slots: int = 64,
    engine: str = "aio",
    workers: int = 1,
    guest_size: int = 64 << 20,
    serial: str = "serial-0123456789",
    poll_us: int | None = POLL_US,
    pin_memory: bool = False,
) -> Rig:
    """A rig over a new image of this content, or over the image that is there where that is None."""
    if content is not None:
        path.write_bytes(content)
    image = Image(path, read_only=read_only, direct=direct, block_size=block_size)
    alignment = (image.alignment.memory, image.alignment.block)
    device = Device(
        image.fd,
        image.size,
        read_only=read_only,
        block_size=block_size,
        alignment=alignment,
        serial=serial,
        storage=IN_MEMORY if engine == MEMORY else THROUGH_WORKER,
    )
    made = [Worker(f"io-{number}", slots, engine, poll_us, pin_memory) for number in range(workers)]
    rig = Rig(path, image, device, Guest(guest_size), made)
    for worker in rig.workers:
        worker.start()
    return rig


def need_engine(name: str) -> str:
    """The engine's name; where the kernel forbids or lacks it the test is skipped, in CI it fails."""
    try:
        make_engine(name, 8).close()
    except OSError as error:
        reason = f"the engine {name} is not to be had on this machine: {error}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return name


def cuts(total: int, randomness: random.Random, at_most: int = 6) -> list[int]:
    """`total` bytes as sizes of up to `at_most` pieces, none of them empty."""
    places = sorted({randomness.randrange(1, total) for _ in range(randomness.randrange(at_most))}) if total > 1 else []
    return [end - start for start, end in zip([0, *places], [*places, total], strict=True)]


def pattern(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def is_mapped(address: int, fd: int) -> bool:
    """Whether `address` of this process is a mapping of this file."""
    inode = str(os.fstat(fd).st_ino)
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, _, _, _, mapped_inode = line.split()[:5]
            start, end = (int(bound, 16) for bound in span.split("-"))
            if start <= address < end:
                return mapped_inode == inode
    return False


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true before patience ends."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True
