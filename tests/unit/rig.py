"""A worker with queues, and a small driver for them: guest memory is a memfd, notifications are eventfds."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numba
import pytest

from ringplane.block.image import Image
from ringplane.block.io import CHANNEL
from ringplane.block.merge import send_held
from ringplane.block.sources.file import FileSource
from ringplane.block.sources.memory import MemorySource
from ringplane.block.sources.source import Source
from ringplane.block.stack import LayerPart, Stack
from ringplane.compiler.jit import compiled
from ringplane.dataplane.loop import TURN, serve_ready
from ringplane.dataplane.queue import NO_TYPES, Device, DirtyLog, Queue, RingLayout
from ringplane.dataplane.state import WORKER, RequestTypes
from ringplane.dataplane.worker import SLOTS, Worker
from ringplane.engines.choose_engine import make_engine
from ringplane.guest_memory.regions import MemoryTable, Region
from ringplane.inflight.area import InflightRegion
from ringplane.native.access import fence, store16, view
from ringplane.options.engine_names import MEMORY
from ringplane.options.image_options import ImageOptions
from ringplane.options.thread_options import POLL_US
from ringplane.virtio.features import VIRTIO_F_EVENT_IDX, VIRTIO_F_IN_ORDER, VIRTIO_F_INDIRECT_DESC

from . import model
from .waiting import eventually as eventually

IN, OUT, FLUSH, SCSI_CMD, SCSI_CMD_OUT, GET_ID = 0, 1, 4, 2, 3, 8
DISCARD, WRITE_ZEROES, SECURE_ERASE = 11, 13, 14
APPEND, REPORT_ZONES, OPEN, CLOSE, FINISH, RESET, RESET_ALL = 15, 16, 18, 20, 22, 24, 26
OK, IOERR, UNSUPP, ZONE_INVALID_CMD = 0, 1, 2, 3
NO_ANSWER = 0xEE

NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = NO_NOTIFY = 1

SERIAL = "serial-0123456789"

# `ringplane` for tests that read the log right after a reply: each line is written before the reply, by the thread that
# logs it, and repeated lines are not summed up. tests/hostile/test_log.py tests the log itself.
LOGGING_AT_ONCE = """
from ringplane.log import repeats
from ringplane.cli import main
from ringplane.log.outlet import Outlet
repeats.BURST = 1 << 40
Outlet.start = lambda self: None
main()
"""

# A test that waits for so many seconds has found a hang.
PATIENCE = 20.0

GUEST_BASE, USER_BASE = 0x1_0000_0000, 0x7F00_0000_0000
RING_AREA = 64 * 1024


@numba.njit
def barrier() -> None:
    """The driver's memory barrier (section 2.7.13.3), for which Python has no other means."""
    fence()


@numba.njit
def store_between_barriers(address: int, value: int) -> None:
    """A store of the driver that the device may see at any time."""
    fence()
    store16(address, value)
    fence()


class Guest:
    """Guest memory: one memfd, mapped here for the driver, and mapped again for the device."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.memory = mmap.mmap(self.fd, size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.free = 0

    def table(self) -> MemoryTable:
        """A new mapping for the device: two adjacent regions, so that buffers may cross the border."""
        half = self.size // 2
        return MemoryTable(
            Region.map(GUEST_BASE + start, USER_BASE + start, half, start, self.fd) for start in (0, half)
        )

    def allocate(self, size: int, alignment: int = 1) -> int:
        """Allocate memory; returns its offset."""
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


# Address in the guest, length, flags.
Descriptor = tuple[int, int, int]


@dataclass(frozen=True)
class Piece:
    """The buffer of one descriptor: its place in guest memory and its direction."""

    offset: int
    size: int
    writable: bool

    @property
    def descriptor(self) -> Descriptor:
        return GUEST_BASE + self.offset, self.size, WRITE if self.writable else 0


@dataclass
class Pending:
    """A request that was put into a ring, and the places of its answer."""

    head: int
    pieces: list[Piece]
    # The descriptors of the ring that it uses.
    descriptors: list[int]
    used_length: int | None = None

    @property
    def writable(self) -> list[Piece]:
        return [piece for piece in self.pieces if piece.writable]


@dataclass(frozen=True)
class Answer:
    """The answer of the device to a request: `data` is everything that it may write, except the status."""

    status: int
    used_length: int
    data: bytes


class DriverRing:
    """The common part of the driver's ends of both formats: the negotiated features and the requests in flight."""

    def __init__(
        self,
        guest: Guest,
        size: int,
        *,
        event_idx: bool = False,
        indirect: bool = True,
        in_order: bool = False,
        features: int = 0,
        write_through: bool = False,
    ) -> None:
        """`features`: bits besides the three that have their own arguments."""
        self.guest, self.size, self.event_idx, self.indirect, self.in_order = guest, size, event_idx, indirect, in_order
        self.features = features | event_idx * VIRTIO_F_EVENT_IDX | indirect * VIRTIO_F_INDIRECT_DESC
        self.features |= in_order * VIRTIO_F_IN_ORDER
        self.write_through = write_through
        self.inflight: InflightRegion | None = None
        self.log: DirtyLog | None = None
        # In the order of submission.
        self.pending: dict[int, Pending] = {}

    def allocate(self, desc: int, avail: int, used: int) -> None:
        """Get cleared memory for the three areas, of these sizes."""
        self.desc, self.avail, self.used = (
            self.guest.allocate(size, alignment) for size, alignment in ((desc, 16), (avail, 4), (used, 4))
        )
        for area, size in ((self.desc, desc), (self.avail, avail), (self.used, used)):
            self.guest.write(area, bytes(size))

    def layout(self) -> RingLayout:
        areas = (USER_BASE + area for area in (self.desc, self.avail, self.used))
        return RingLayout(self.size, *areas, self.base, self.features, self.write_through, self.inflight, self.log)

    def add(self, pieces: Sequence[Piece], direct: int | None = None) -> Pending:
        """Add a chain of these buffers; all after the first `direct` ones are in an indirect table (None: no table)."""
        chain = [piece.descriptor for piece in pieces]
        if direct is not None and direct < len(chain):
            table = self.table(chain[direct:])
            offset = self.guest.allocate(len(table), 16)
            self.guest.write(offset, table)
            chain[direct:] = [(GUEST_BASE + offset, len(table), INDIRECT)]
        return self.add_chain(chain, pieces)

    def collect(self) -> list[Pending]:
        """The requests that were completed since the last call, in the order of completion."""
        done = []
        for head, used_length in self.take_used():
            if self.in_order:
                assert head == next(iter(self.pending)), "an answer before its turn"
            pending = self.pending.pop(head)
            pending.used_length = used_length
            self.give_back(pending)
            done.append(pending)
        return done


class Ring(DriverRing):
    """The driver's end of a split virtqueue in guest memory (virtio 1.2, section 2.7)."""

    def __init__(self, guest: Guest, size: int, *, start: int = 0, **negotiated: Any) -> None:
        """`start`: a base as the device reports it."""
        super().__init__(guest, size, **negotiated)
        self.allocate(16 * size, 6 + 2 * size, 6 + 8 * size)
        self.avail_idx = self.used_idx = self._published = start
        self._free = list(range(size))
        guest.write(self.avail, struct.pack("<HH", 0, start))
        guest.write(self.used, struct.pack("<HH", 0, start))

    @staticmethod
    def any_base(size: int, randomness: random.Random) -> int:
        """A random valid base of an empty ring; in half of the cases the counters soon wrap around."""
        return randomness.choice([randomness.randrange(65536), 65536 - randomness.randrange(1, size + 1)])

    @property
    def base(self) -> int:
        """Where a device continues that has fetched everything in the ring."""
        return self.avail_idx

    def has_room(self, count: int) -> bool:
        return len(self._free) >= count

    def table(self, chain: Sequence[Descriptor]) -> bytes:
        """An indirect table (section 2.7.5.3): its descriptors are linked by `next`."""
        last = len(chain) - 1
        return b"".join(
            struct.pack("<QIHH", address, length, flags | NEXT * (number < last), number + 1 if number < last else 0)
            for number, (address, length, flags) in enumerate(chain)
        )

    def add_chain(self, chain: Sequence[Descriptor], pieces: Sequence[Piece] = ()) -> Pending:
        """Write a chain's descriptors; if the last one has the flag NEXT too, it points back to the first.

        With IN_ORDER they are consecutive in the table (section 2.7.9): the first free one is the oldest.
        """
        places = [self._free.pop(0 if self.in_order else -1) for _ in chain]
        for number, (address, length, flags) in enumerate(chain):
            flags |= NEXT * (number + 1 < len(chain))
            following = places[(number + 1) % len(places)] if flags & NEXT else 0
            self.guest.write(self.desc + 16 * places[number], struct.pack("<QIHH", address, length, flags, following))
        pending = self.pending[places[0]] = Pending(places[0], list(pieces), places)
        return pending

    def put_available(self, head: int) -> None:
        """Fill the next entry of the available ring; `publish` makes it visible."""
        self.guest.write(self.avail + 4 + 2 * (self.avail_idx % self.size), struct.pack("<H", head))
        self.avail_idx = (self.avail_idx + 1) % 65536

    def put_bad_head(self) -> None:
        """Make a chain available with a head outside the ring."""
        self.put_available(self.size)

    def publish(self) -> bool:
        """Make the new chains visible; returns whether the device wants a kick for them (section 2.7.10)."""
        old, self._published = self._published, self.avail_idx
        self.set_avail_idx(self.avail_idx)
        if self.event_idx:
            return model.need_event(self._avail_event(), self.avail_idx, old)
        return not self._used_flags() & NO_NOTIFY

    def set_avail_idx(self, index: int) -> None:
        self.guest.store16(self.avail + 2, index)

    def asks_for_kick(self) -> bool:
        """Whether the device wants a kick with the next chain."""
        barrier()
        return self._avail_event() == self.avail_idx if self.event_idx else not self._used_flags() & NO_NOTIFY

    def _used_flags(self) -> int:
        return int(struct.unpack_from("<H", self.guest.memory, self.used)[0])

    def _avail_event(self) -> int:
        return int(struct.unpack_from("<H", self.guest.memory, self.used + 4 + 8 * self.size)[0])

    def enable_notifications(self) -> None:
        """Request a call with the next used chain."""
        if self.event_idx:
            self.set_used_event(self.used_idx)
        else:
            self.guest.store16(self.avail, 0)

    def disable_notifications(self) -> None:
        """Suppress calls: by the flag, or with EVENT_IDX by requesting one for the last used entry."""
        if self.event_idx:
            self.set_used_event((self.used_idx - 1) % 65536)
        else:
            self.guest.store16(self.avail, NO_INTERRUPT)

    def set_used_event(self, index: int) -> None:
        self.guest.store16(self.avail + 4 + 2 * self.size, index)

    def place_behind(self, chains: Sequence[int]) -> int:
        """The used_event for the used element after those of the next chains, which have so many descriptors each."""
        return (self.used_idx + len(chains)) % 65536

    def device_used_idx(self) -> int:
        barrier()
        return int(struct.unpack_from("<H", self.guest.memory, self.used + 2)[0])

    def take_used(self) -> Iterator[tuple[int, int]]:
        """Heads and used lengths of the chains that were used since the last call."""
        end = self.device_used_idx()
        while self.used_idx != end:
            element = self.used + 4 + 8 * (self.used_idx % self.size)
            self.used_idx = (self.used_idx + 1) % 65536
            yield struct.unpack_from("<II", self.guest.memory, element)

    def give_back(self, pending: Pending) -> None:
        self._free += pending.descriptors


def header(kind: int, sector: int) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


@contextlib.contextmanager
def small_tmpfs(folder: Path, mib: int, *options: str) -> Iterator[Path]:
    """A tmpfs of so many MiB in a new folder; needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join([f"size={mib}M", *options]), "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def loop_device(path: Path, *options: str) -> Iterator[Path]:
    """A loop device with this file."""
    if os.getuid() != 0:
        pytest.skip("only root can make a loop device")
    losetup = shutil.which("losetup")
    if losetup is None:
        pytest.skip("losetup is not installed")
    command = [losetup, "--find", "--show", *options, str(path)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"loop devices are unavailable: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run([losetup, "--detach", device], check=True)


def new_eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def wait_for_event(fd: int, what: str) -> None:
    """Wait for an eventfd, and read it."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(PATIENCE * 1000), f"{what} did not come"
    os.eventfd_read(fd)


def take_events(fd: int) -> int:
    """How often an eventfd was written since it was last read."""
    with contextlib.suppress(BlockingIOError):
        return os.eventfd_read(fd)
    return 0


def has_event(fd: int) -> bool:
    return take_events(fd) > 0


def fill(fd: int) -> None:
    """Fill the counter of an eventfd, or the buffer of a pipe or socket; the next writer has to wait."""
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(fd, ((1 << 64) - 2).to_bytes(8, "little"))
    os.set_blocking(fd, True)


def _socket_pair() -> tuple[int, int]:
    one, other = socket.socketpair()
    return one.detach(), other.detach()


# Call fds that a front end may use (user-mode Linux has sockets): our end, if it is separate, and the device's end.
NOTIFIERS: dict[str, Callable[[], tuple[int, ...]]] = {
    "eventfd": lambda: (new_eventfd(),),
    "pipe": os.pipe,
    "socket": _socket_pair,
}


@contextlib.contextmanager
def full_notifier(kind: str) -> Iterator[int]:
    """A full notifier of this kind. O_NONBLOCK belongs to the open file: the receiver sets it, the test clears it."""
    ends = NOTIFIERS[kind]()
    fill(ends[-1])
    try:
        yield ends[-1]
    finally:
        for fd in ends:
            os.close(fd)


@contextlib.contextmanager
def held(worker: Worker) -> Iterator[None]:
    """Keep the worker's thread waiting. Calls that are queued meanwhile run at the end, one after the other."""
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
        # The queued calls have run before this returns.
        worker.call(lambda: None).result(PATIENCE)


@compiled
def serve_ready_at(worker, channel):
    serve_ready(view(worker, WORKER), view(channel, CHANNEL))
    send_held(view(channel, CHANNEL))


def fetch_only(worker: Worker) -> None:
    """Have a held worker fetch everything in the rings without submitting it, so that it is certainly in flight."""
    worker.call(worker.rings.check_all)
    # As many turns as a full ring needs.
    for _ in range(-(-1024 // TURN)):
        worker.call(lambda: serve_ready_at(worker.state.address, worker.state.channel.address))


class Line:
    """A queue of the device with the driver's ring and eventfds."""

    def __init__(self, rig: Rig, number: int, worker: Worker, layers: Sequence[LayerPart]) -> None:
        self.rig, self.worker = rig, worker
        self.queue = Queue(rig.device, number, Stack(rig.source.part(SLOTS), layers))
        self.kick_fd, self.call_fd, self.queue.err_fd = new_eventfd(), new_eventfd(), new_eventfd()
        self.ring: Any

    def start(
        self,
        *,
        ring_class: type[Any] = Ring,
        size: int = 128,
        base: int = 0,
        table: MemoryTable | None = None,
        **negotiated: Any,
    ) -> Line:
        """Make a new ring and start it; `negotiated` are arguments of DriverRing."""
        self.ring = ring_class(self.rig.guest, size, start=base, **negotiated)
        self.queue.reset()
        self.resume(table=table)
        return self

    def resume(self, *, table: MemoryTable | None = None, base: int | None = None) -> None:
        """Start the existing ring at `base`, or where its driver is."""
        layout = self.ring.layout()
        if base is not None:
            layout = replace(layout, base=base)
        self.worker.set_call_fd(self.queue, self.call_fd).result(PATIENCE)
        self.worker.start_queue(self.queue, layout, table or self.rig.guest.table(), self.kick_fd).result(PATIENCE)

    def stop(self) -> int:
        """Drain; returns the index to resume from."""
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
        """Put a request into the ring, without a kick: the device reads `data` and may write `room` bytes.

        `readable` are the sizes of the descriptors of header and data, `writable` those of room and status. The offset
        of each buffer in memory is a multiple of `alignment`, but not of twice that.
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

    def notify(self) -> None:
        """Kick if the device wants it."""
        if self.ring.publish():
            os.eventfd_write(self.kick_fd, 1)

    def wait(self) -> list[Pending]:
        """Wait until all requests in the ring are completed, like a driver that sleeps until it is called."""
        done: list[Pending] = []
        while True:
            self.ring.enable_notifications()
            answered = self.ring.collect()
            done += answered
            if not self.ring.pending:
                return done
            if answered:
                # They may have passed the requested event: request another one and check again.
                continue
            wait_for_event(self.call_fd, f"the call of {self.queue.name}")

    def finish_without_a_call(self) -> list[Pending]:
        """Poll until all requests in the ring are completed, and the worker's turn has ended."""
        done: list[Pending] = []

        def is_done() -> bool:
            done.extend(self.ring.collect())
            return not self.ring.pending

        assert eventually(is_done)
        self.turn_is_over()
        return done

    def turn_is_over(self) -> None:
        """Wait until the worker has finished the turn of the last completion."""
        self.worker.call(lambda: None).result(PATIENCE)

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
    """A disk with its image and workers, and as many lines as a test asks for."""

    path: Path
    device: Device
    source: Source
    guest: Guest
    workers: list[Worker]
    layers: Sequence[LayerPart] = ()
    lines: list[Line] = field(default_factory=list)

    def line(self, worker: int = 0, layers: Sequence[LayerPart] | None = None) -> Line:
        """A queue with a stack of its own, of these layers, by default those of the rig."""
        layers = self.layers if layers is None else layers
        self.lines.append(Line(self, len(self.lines), self.workers[worker], layers))
        return self.lines[-1]

    def content(self) -> bytes:
        """The content of the image in the page cache or on the disk."""
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
        self.source.close()


def make(
    path: Path,
    content: bytes | int | None,
    *,
    direct: bool = False,
    read_only: bool = False,
    block_size: int = 512,
    slots: int = 64,
    engine: str = "aio",
    workers: int = 1,
    guest_size: int = 64 << 20,
    serial: str = SERIAL,
    poll_us: int | None = POLL_US,
    pin_memory: bool = False,
    layers: Sequence[LayerPart] = (),
    request_types: RequestTypes = NO_TYPES,
) -> Rig:
    """A rig with a new image of this content, a sparse one of so many bytes, or an existing one (None)."""
    if isinstance(content, int):
        path.touch()
        os.truncate(path, content)
    elif content is not None:
        path.write_bytes(content)
    image = Image(path, ImageOptions(read_only=read_only, direct=direct, block_size=block_size))
    device = Device(image.size, read_only=read_only, block_size=block_size, serial=serial, request_types=request_types)
    source = (MemorySource if engine == MEMORY else FileSource)(image).prepare([])
    made = [Worker(f"io-{number}", slots, engine, poll_us, pin_memory) for number in range(workers)]
    rig = Rig(path, device, source, Guest(guest_size), made, layers)
    for worker in rig.workers:
        worker.start()
        # The first rig compiles the data plane, however long that takes.
        worker.call(lambda: None).result()
    return rig


RigFactory = Callable[..., Rig]


@contextlib.contextmanager
def rig_factory(folder: Path, content: bytes | int | None = None, **defaults: Any) -> Iterator[RigFactory]:
    """Make rigs with new images in `folder`, and close them at the end; `defaults` are options of `make`."""
    made: list[Rig] = []

    def factory(content: bytes | int | None = content, path: Path | None = None, **options: Any) -> Rig:
        options = {"engine": "aio"} | defaults | options
        need_engine(options["engine"])
        made.append(make(path or folder / f"disk-{len(made)}.img", content, **options))
        return made[-1]

    yield factory
    for rig in made:
        rig.close()


def direct_rig(make_rig: RigFactory, **options: Any) -> Rig:
    rig = make_rig(direct=True, **options)
    if not rig.source.direct:
        pytest.skip(f"the file system of {rig.path} refuses O_DIRECT")
    return rig


def need_engine(name: str) -> str:
    """The name of the engine; if the kernel forbids or lacks it, the test is skipped, or fails in CI."""
    try:
        make_engine(name, 8).close()
    except OSError as error:
        reason = f"the engine {name} is unavailable on this machine: {error}"
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


def listens(path: Path) -> bool:
    """Whether a process listens there (proc(5), /proc/net/unix); other back ends make the file a little earlier.

    This does not connect, because that would be the first front end of a back end. ringplane's file is called otherwise
    until it listens.
    """
    sockets = [line.split() for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]]
    names = ([str(path)], [f"{path}~"])
    # __SO_ACCEPTCON
    return path.exists() and any(fields[7:] in names and int(fields[3], 16) & 0x1_0000 for fields in sockets)
