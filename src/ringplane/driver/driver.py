"""A virtio-blk driver (virtio 1.2, section 5.2): read, write, flush, and requests with any layout of descriptors."""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from ringplane.driver.frontend import FrontEnd, SharedMemory, Vring
from ringplane.driver.process import peer_pid
from ringplane.driver.virtqueue import NO_ROOM, Ring, peek, poke
from ringplane.virtio.blk import (
    CONFIG,
    HEADER,
    HEADER_SIZE,
    SECTOR,
    SEGMENT,
    SEGMENT_F_UNMAP,
    VIRTIO_BLK_F_BLK_SIZE,
    VIRTIO_BLK_F_CONFIG_WCE,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_GEOMETRY,
    VIRTIO_BLK_F_LIFETIME,
    VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SECURE_ERASE,
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_F_ZONED,
    VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
)
from ringplane.virtio.features import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1
from ringplane.virtio.split import DESC_SIZE

FEATURES = (
    VIRTIO_F_VERSION_1
    | VIRTIO_BLK_F_SIZE_MAX
    | VIRTIO_BLK_F_SEG_MAX
    | VIRTIO_BLK_F_RO
    | VIRTIO_BLK_F_BLK_SIZE
    | VIRTIO_BLK_F_FLUSH
    | VIRTIO_BLK_F_TOPOLOGY
    | VIRTIO_BLK_F_MQ
    | VIRTIO_BLK_F_GEOMETRY
    | VIRTIO_BLK_F_CONFIG_WCE
    | VIRTIO_BLK_F_DISCARD
    | VIRTIO_BLK_F_WRITE_ZEROES
    | VIRTIO_BLK_F_SECURE_ERASE
    | VIRTIO_BLK_F_LIFETIME
    | VIRTIO_BLK_F_ZONED
)

# The part of the configuration space that every back end has: all up to secure erase. The rest reads as zeros.
CONFIG_SIZE: int = CONFIG.fields["max_secure_erase_sectors"][1]  # type: ignore[index]

# Large reads and writes are split into pieces of this many bytes, and at most so many pieces are in flight.
PIECE = 256 * 1024
PIECES_IN_FLIGHT = 8

# Of a range of a device that has no limit: its number of sectors has 32 bits.
MOST_BYTES = 1 << 40

# Not a status of virtio-blk: it stays there if the device wrote no status.
NO_STATUS = 0xFF

# A segment of a request: our address, length, whether the device writes to it.
Segment = tuple[int, int, bool]


def segments(*ranges: tuple[int, int, int]) -> bytes:
    """The data of a discard, write zeroes or secure erase request: (sector, number of sectors, flags) of each range."""
    return np.array(list(ranges), SEGMENT).tobytes()


class Unsupported(Exception):
    """The back end completed a request with VIRTIO_BLK_S_UNSUPP."""


@dataclass(slots=True)
class Ticket:
    """A chain in flight, or done: then `used` is the length in its used element."""

    queue: int
    blocks: list[int]  # to be freed when the chain is done
    used: int | None = None
    abandoned: bool = False  # no caller waits for it any more


@dataclass(frozen=True, slots=True)
class Answer:
    """How a request ended: its status byte, the length in the used element, and the data that the device wrote."""

    status: int
    used: int
    data: bytes


@dataclass(slots=True)
class _Placed:
    """A request in shared memory: its segments, and the allocated blocks that they lie in."""

    segments: list[Segment] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)

    def written(self) -> bytes:
        return b"".join(peek(address, size) for address, size, writable in self.segments if writable)


@dataclass(frozen=True, slots=True)
class Begun:
    """A request in flight, for `Driver.end`."""

    placed: _Placed
    ticket: Ticket


class Driver:
    """A driver for the disk behind the vhost-user socket `path`. One thread at a time may use it.

    It has `queues` rings of `queue_size` descriptors. `event_idx` and `indirect` are requests: `features` has the
    negotiated features. `feature_bits` are the features that the driver accepts. `timeout` is how long, in seconds, a
    request may take. `memory_size` bytes of (sparse) shared memory hold rings and buffers; or `memory` does, which the
    caller owns: drivers that are used alternately may share it, so that all use the same pages.

    Opening and `reconnect` raise what `FrontEnd` raises, and ValueError if the back end has fewer queues. Requests
    raise TimeoutError, RingBroken if the back end has stopped the ring, ConnectionError if it is gone, and BadUsed.
    """

    def __init__(
        self,
        path: str | Path,
        queues: int = 1,
        queue_size: int = 256,
        event_idx: bool = True,
        indirect: bool = True,
        *,
        feature_bits: int = FEATURES,
        timeout: float = 30.0,
        memory_size: int = 1 << 30,
        memory: SharedMemory | None = None,
    ) -> None:
        if queues < 1:
            raise ValueError("a disk has at least one queue")
        self.path = str(path)
        self.queue_size = queue_size
        self.timeout = timeout
        self._wanted_queues = queues
        self._wanted_features = (
            feature_bits | (VIRTIO_F_EVENT_IDX if event_idx else 0) | (VIRTIO_F_INDIRECT_DESC if indirect else 0)
        )
        self._token = count(1 << 32)
        self.memory = memory or SharedMemory(memory_size)
        self._own_memory = memory is None
        try:
            self._open([0] * queues)
        except BaseException:
            self._free_memory()
            if self._own_memory:
                self.memory.close()
            raise

    # Start and stop

    def _open(self, bases: Sequence[int]) -> None:
        self._ring_blocks: list[int] = []
        self.queues: list[Vring] = []
        self._tickets: dict[int, Ticket] = {}
        self.front_end = FrontEnd(self.path)
        try:
            self._negotiate()
            self._start(bases)
        except BaseException:
            self._close_connection()
            raise

    def _negotiate(self) -> None:
        front_end = self.front_end
        self.features = front_end.negotiate(self._wanted_features)
        offered = front_end.get_queue_num()
        if self._wanted_queues > offered:
            raise ValueError(f"the back end has {offered} queues, not {self._wanted_queues}")
        self.config = np.zeros(1, CONFIG)[0]
        self.read_config()
        front_end.set_mem_table([self.memory.region()], [self.memory.fd])
        self.indirect = bool(self.features & VIRTIO_F_INDIRECT_DESC)
        self.event_idx = bool(self.features & VIRTIO_F_EVENT_IDX)
        for index in range(self._wanted_queues):
            start = self.memory.allocate(Ring.bytes_needed(self.queue_size))
            self._ring_blocks.append(start)
            ring = Ring(self.memory.address, start, self.queue_size, self.event_idx)
            self.queues.append(Vring(index, ring, front_end.sock))

    def _start(self, bases: Sequence[int]) -> None:
        for vring, base in zip(self.queues, bases, strict=True):
            self.front_end.start_vring(vring, base)

    def stop(self) -> list[int]:
        """Stop every ring; returns the base of each, where `start` can resume. Waits for requests in flight."""
        bases = []
        for vring in self.queues:
            self.front_end.set_vring_enable(vring.index, False)
            bases.append(self.front_end.get_vring_base(vring.index))
        for vring in self.queues:
            self._reap(vring)
        return bases

    def start(self, bases: Sequence[int] | None = None) -> None:
        """Start every ring again after `stop`, on the same connection, from `bases` (default: 0 each)."""
        self._start(bases or [0] * len(self.queues))

    def reconnect(self, bases: Sequence[int] | None = None) -> None:
        """Close the connection, in any state, and start again on a new one; requests in flight are dropped."""
        self._close_connection()
        self._free_memory()
        self._open(bases or [0] * self._wanted_queues)

    def _close_connection(self) -> None:
        self.front_end.close()
        for vring in self.queues:
            vring.close()

    def close(self) -> None:
        """Stop the rings if the back end still answers, close the connection, free the memory. May be called again."""
        with suppress(Exception):
            self.stop()
        self._close_connection()
        self._free_memory()
        if self._own_memory:
            self.memory.close()

    def _free_memory(self) -> None:
        """Free all of our own memory, even if a back end had it in flight; of a caller's memory only our rings."""
        while self._ring_blocks:
            self.memory.free(self._ring_blocks.pop())
        if self._own_memory:
            self.memory.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Properties

    def read_config(self) -> None:
        """Read `config` (a CONFIG struct, fields by name) again."""
        size = CONFIG.itemsize if self.features & VIRTIO_BLK_F_ZONED else CONFIG_SIZE
        data = self.front_end.get_config(0, size).ljust(CONFIG.itemsize, b"\0")
        self.config = np.frombuffer(data, CONFIG)[0]

    @property
    def capacity(self) -> int:
        """The disk's size in bytes."""
        return int(self.config["capacity"]) * SECTOR

    @property
    def block_size(self) -> int:
        """The logical block size in bytes, of which every offset and length is a multiple."""
        return int(self.config["blk_size"]) if self.features & VIRTIO_BLK_F_BLK_SIZE else SECTOR

    @property
    def backend_pid(self) -> int:
        """The pid of the process that listened on the socket; 0 if it is not visible in our pid namespace."""
        return peer_pid(self.front_end.sock)

    def serial(self) -> str:
        """The disk's serial (GET_ID, section 5.2.6)."""
        answer = self.request(VIRTIO_BLK_T_GET_ID, 0, read=VIRTIO_BLK_ID_BYTES)
        check_status(answer.status, "GET_ID")
        return answer.data.split(b"\0")[0].decode("ascii", "replace")

    # Blocks

    def read(self, offset: int, length: int, queue: int = 0) -> bytes:
        """`length` bytes from byte `offset`; ValueError if they are not whole blocks inside the disk.

        Raises OSError for an I/O error, Unsupported, and what the class says.
        """
        self.check_range(offset, length)
        result = bytearray(length)

        def submit(start: int, size: int) -> tuple[_Placed, Ticket]:
            return self._submit_request(VIRTIO_BLK_T_IN, (offset + start) // SECTOR, b"", size, queue)

        def finish(start: int, size: int, answer: Answer) -> None:
            check_status(answer.status, f"reading {size} bytes at {offset + start}")
            result[start : start + size] = answer.data

        self._in_pieces(length, submit, finish)
        return bytes(result)

    def write(self, offset: int, data: bytes, queue: int = 0) -> None:
        """Write `data` from byte `offset`. Raises as `read`; then any part of it may have been written."""
        self.check_range(offset, len(data))

        def submit(start: int, size: int) -> tuple[_Placed, Ticket]:
            piece = bytes(data[start : start + size])
            return self._submit_request(VIRTIO_BLK_T_OUT, (offset + start) // SECTOR, piece, 0, queue)

        def finish(start: int, size: int, answer: Answer) -> None:
            check_status(answer.status, f"writing {size} bytes at {offset + start}")

        self._in_pieces(len(data), submit, finish)

    def flush(self, queue: int = 0) -> None:
        """Make every completed write stable. Raises as `read`."""
        check_status(self.request(VIRTIO_BLK_T_FLUSH, 0, queue=queue).status, "flush")

    def discard(self, offset: int, length: int, queue: int = 0) -> None:
        """Discard these bytes: afterwards their content is undefined. Raises as `read`."""
        self._do_ranges(VIRTIO_BLK_T_DISCARD, "discard", offset, length, 0, queue)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False, queue: int = 0) -> None:
        """Write zeros; with `unmap` the device may deallocate storage instead. Raises as `read`."""
        flags = SEGMENT_F_UNMAP if unmap else 0
        self._do_ranges(VIRTIO_BLK_T_WRITE_ZEROES, "write_zeroes", offset, length, flags, queue)

    def _do_ranges(self, kind: int, name: str, offset: int, length: int, flags: int, queue: int) -> None:
        """Send one request for each range of the largest size that the device accepts."""
        self.check_range(offset, length)
        for data in self.range_requests(name, offset, length, flags):
            answer = self.request(kind, 0, data, queue=queue)
            check_status(answer.status, f"{name} of {length} bytes at {offset}")

    def range_requests(self, name: str, offset: int, length: int, flags: int = 0) -> Iterator[bytes]:
        """The data of requests for this range, each of at most the size that the device accepts.

        `name` is that of their limit in the configuration space: discard, write_zeroes or secure_erase.
        """
        most = int(self.config[f"max_{name}_sectors"]) * SECTOR or MOST_BYTES
        for start in range(offset, offset + length, most):
            yield segments((start // SECTOR, min(most, offset + length - start) // SECTOR, flags))

    @property
    def room(self) -> int:
        """How many requests of three segments each queue has room for."""
        return self.queue_size if self.indirect else max(1, self.queue_size // 3)

    def set_write_back(self, write_back: bool) -> None:
        """Select write-back (True: this driver flushes) or write-through (writes are stable when they complete).

        Raises Refused if CONFIG_WCE was not negotiated.
        """
        self.front_end.set_config(CONFIG.fields["writeback"][1], bytes([write_back]))  # type: ignore[index]
        self.read_config()

    def check_range(self, offset: int, length: int) -> None:
        """Raises ValueError for what is not whole blocks inside the disk."""
        if offset % self.block_size or length % self.block_size:
            raise ValueError(f"{length} bytes at {offset} are not whole blocks of {self.block_size} bytes")
        if offset < 0 or length < 0 or offset + length > self.capacity:
            raise ValueError(f"{length} bytes at {offset} are not inside the disk of {self.capacity} bytes")

    def _in_pieces(
        self,
        length: int,
        submit: Callable[[int, int], tuple[_Placed, Ticket]],
        finish: Callable[[int, int, Answer], None],
    ) -> None:
        window: deque[tuple[int, int, _Placed, Ticket]] = deque()
        most = min(PIECES_IN_FLIGHT, self.room)
        try:
            for start in range(0, length, PIECE):
                size = min(PIECE, length - start)
                if len(window) == most:
                    self._finish_piece(window.popleft(), finish)
                window.append((start, size, *submit(start, size)))
            while window:
                self._finish_piece(window.popleft(), finish)
        finally:
            for _, _, _, ticket in window:
                self._abandon(ticket)

    def _finish_piece(
        self, piece: tuple[int, int, _Placed, Ticket], finish: Callable[[int, int, Answer], None]
    ) -> None:
        start, size, placed, ticket = piece
        finish(start, size, self._answer(placed, ticket))

    # Requests with any layout

    def request(
        self,
        kind: int,
        sector: int,
        data: bytes = b"",
        read: int = 0,
        *,
        readable: Sequence[int] | None = None,
        writable: Sequence[int] | None = None,
        misalign: int = 0,
        indirect: bool | None = None,
        queue: int = 0,
        timeout: float | None = None,
    ) -> Answer:
        """Send one request with any framing (section 2.7.4: devices must not depend on it); no status raises.

        The bytes that the device reads (16 bytes of header, then `data`) are split into descriptors of `readable`
        lengths, those that it writes (`read` bytes, then the status) into descriptors of `writable` lengths. By default
        header, data and status have one each. Every buffer begins `misalign` bytes after a multiple of 64.
        """
        placed, ticket = self._submit_request(
            kind, sector, data, read, queue, readable=readable, writable=writable, misalign=misalign, indirect=indirect
        )
        return self._answer(placed, ticket, timeout)

    def begin(self, kind: int, sector: int, data: bytes = b"", *, queue: int = 0) -> Begun:
        """Submit a request that reads nothing; `end` waits for it. Raises BufferError for a full ring."""
        return Begun(*self._submit_request(kind, sector, data, 0, queue))

    def end(self, begun: Begun) -> Answer:
        """Wait for the end of a request."""
        return self._answer(begun.placed, begun.ticket)

    def _submit_request(
        self,
        kind: int,
        sector: int,
        data: bytes,
        read: int,
        queue: int,
        *,
        readable: Sequence[int] | None = None,
        writable: Sequence[int] | None = None,
        misalign: int = 0,
        indirect: bool | None = None,
    ) -> tuple[_Placed, Ticket]:
        header = np.array([(kind, 0, sector)], HEADER).tobytes()
        placed = _Placed()
        try:
            self._place(placed, header + data, readable or _lengths(HEADER_SIZE, len(data)), misalign, False)
            stale = bytes([NO_STATUS]) * (read + 1)
            self._place(placed, stale, writable or _lengths(read, 1), misalign, True)
            return placed, self.submit(placed.segments, queue, indirect=indirect, blocks=placed.blocks)
        except BaseException:
            self._free(placed.blocks)
            raise

    def _place(self, placed: _Placed, stream: bytes, lengths: Iterable[int], misalign: int, writable: bool) -> None:
        """Split a stream into separately allocated buffers, and add them to the request."""
        lengths = list(lengths)
        if sum(lengths) != len(stream):
            raise ValueError(f"descriptors of {sum(lengths)} bytes for {len(stream)} bytes of request")
        start = 0
        for length in lengths:
            block = self.memory.allocate(length + misalign + 1)
            placed.blocks.append(block)
            poke(block + misalign, stream[start : start + length])
            placed.segments.append((block + misalign, length, writable))
            start += length

    def _answer(self, placed: _Placed, ticket: Ticket, timeout: float | None = None) -> Answer:
        used = self.wait(ticket, timeout)
        written = placed.written()
        self._free(ticket.blocks)
        return Answer(written[-1], used, written[:-1])

    # Chains

    def submit(
        self,
        segments: Sequence[Segment],
        queue: int = 0,
        *,
        indirect: bool | None = None,
        blocks: Iterable[int] = (),
        kick: bool = True,
    ) -> Ticket:
        """Add a chain of any segments, and kick if the back end wants it (never with `kick` False).

        `indirect` is as negotiated, unless given. `blocks` from `memory.allocate` belong to the ticket from here on,
        and are freed when the chain is done. Raises BufferError if the ring has no room.
        """
        vring = self.queues[queue]
        self._reap(vring)
        ticket = Ticket(queue, list(blocks))
        table = 0
        if self.indirect if indirect is None else indirect:
            table = self.memory.allocate(DESC_SIZE * len(segments))
        token = next(self._token)
        if vring.ring.add(segments, token, table) == NO_ROOM:
            self._free([table] if table else [])
            raise BufferError(f"ring {queue} has too few free descriptors for a chain of {len(segments)} segments")
        ticket.blocks += [table] if table else []
        self._tickets[token] = ticket
        if vring.ring.publish() and kick:
            vring.kick()
        return ticket

    def wait(self, ticket: Ticket, timeout: float | None = None) -> int:
        """Wait until the chain is used; returns the length in its used element. Raises what the class says."""
        seconds = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        vring = self.queues[ticket.queue]
        try:
            while not self._done(vring, ticket):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"a request on ring {vring.index} was not completed in {seconds:g} s")
                # Enabled before the ring is checked for the last time, so that no notification is missed.
                if not vring.ring.enable_notifications():
                    vring.wait(max(0.0, deadline - time.monotonic()))
                vring.ring.disable_notifications()
        except BaseException:
            self._abandon(ticket)
            raise
        assert ticket.used is not None
        return ticket.used

    def _done(self, vring: Vring, ticket: Ticket) -> bool:
        self._reap(vring)
        return ticket.used is not None

    def _reap(self, vring: Vring) -> None:
        while (reaped := vring.ring.reap()) is not None:
            token, used = reaped
            # A load that ended early leaves chains with its own tokens in the ring.
            ticket = self._tickets.pop(token, None)
            if ticket is None:
                continue
            ticket.used = used
            if ticket.abandoned:
                self._free(ticket.blocks)

    def _abandon(self, ticket: Ticket) -> None:
        """Stop waiting for this chain: its memory is freed when the back end has used it."""
        if ticket.used is not None:
            self._free(ticket.blocks)
        ticket.abandoned = True

    def _free(self, blocks: list[int]) -> None:
        while blocks:
            self.memory.free(blocks.pop())


def _lengths(*lengths: int) -> list[int]:
    return [length for length in lengths if length]


def check_status(status: int, what: str) -> None:
    """Raises Unsupported or OSError for what the device could not do."""
    if status == VIRTIO_BLK_S_UNSUPP:
        raise Unsupported(f"the back end does not support: {what}")
    if status == VIRTIO_BLK_S_IOERR:
        raise OSError(errno.EIO, f"I/O error: {what}")
    if status != VIRTIO_BLK_S_OK:
        raise OSError(errno.EIO, f"the back end completed a request with the invalid status {status:#x}: {what}")
