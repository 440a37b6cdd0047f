"""Random combinations of everything: the device's results for a load equal those of a bytearray."""

from __future__ import annotations

import random
import struct
from typing import Any

from ringplane.virtio.blk import VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES

from .combinations import INDIFFERENT, Combination, any_size, some_of
from .rig import (
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    NO_ANSWER,
    OK,
    OUT,
    SCSI_CMD,
    SERIAL,
    UNSUPP,
    WRITE_ZEROES,
    Answer,
    Line,
    Pending,
    Rig,
    cuts,
)

SLICES, SLICE = 32, 64  # of the disk, and sectors of each
CAPACITY = SLICES * SLICE

Issued = tuple[Line, Pending, Answer]


class Workload:
    """Batches of random requests on several queues; disk and guest memory are compared with a model."""

    def __init__(self, rig: Rig, lines: list[Line], combination: Combination, seed: int) -> None:
        """Start the lines, with rings of random sizes at random places in their laps; `rig` has a disk of CAPACITY."""
        self.rig, self.lines, self.random = rig, lines, random.Random(seed)
        self.disk = bytearray(rig.content())
        rig.guest.free = 0
        features = VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES | some_of(INDIFFERENT, self.random)
        for line in lines:
            size = any_size(combination, self.random)
            base = combination["ring_class"].any_base(size, self.random)
            line.start(size=size, base=base, features=features, **combination)
        self.start = rig.guest.free

    def run(self) -> None:
        try:
            for _ in range(self.random.randrange(1, 8)):
                self.batch()
        finally:
            for line in self.lines:
                line.stop()

    def batch(self) -> None:
        """Requests with disjoint sectors, so that their order does not matter."""
        guest = self.rig.guest
        guest.free = self.start
        issued = self.issue()
        expected = bytearray(guest.memory[self.start : guest.free])
        for _, pending, answer in issued:
            content = answer.data + bytes([answer.status])
            for piece in pending.writable:
                place = piece.offset - self.start
                expected[place : place + piece.size], content = content[: piece.size], content[piece.size :]
        self.serve()
        assert [line.answer(pending) for line, pending, _ in issued] == [answer for _, _, answer in issued]
        assert guest.memory[self.start : guest.free] == expected, "guest memory beside the buffers was written"
        assert self.rig.content() == self.disk

    def issue(self) -> list[Issued]:
        """Put requests until a ring is full or all sectors are used; in some batches, some are served meanwhile."""
        issued: list[Issued] = []
        slices = self.random.sample(range(SLICES), self.random.randrange(SLICES))
        hasty, stream = self.random.random() < 0.5, self.random.random() < 0.2
        if stream:
            # Adjacent requests become one I/O.
            slices.sort(reverse=True)
        line, choice, size = self.random.choice(self.lines), self.random.random(), SLICE
        while slices:
            if not stream:
                line, choice = self.random.choice(self.lines), self.random.random()
                size = self.random.randrange(1, SLICE // 2)
            one = self.put(line, choice, slices.pop() * SLICE, size * 512)
            if one is None:
                break
            issued.append(one)
            if hasty and self.random.random() < 0.3:
                line.notify()
        return issued

    def serve(self) -> None:
        """The drivers kick if requested and sleep until they are called, but do not always want calls."""
        for line in self.random.sample(self.lines, len(self.lines)):
            choice = self.random.random()
            if choice < 0.3:
                line.ring.disable_notifications()
            elif choice < 0.5:
                line.ring.enable_notifications()
            if self.random.random() < 0.8:
                line.notify()
            else:
                line.kick()
            if self.random.random() < 0.3:
                # In the middle of its work, with some chains fetched and others not.
                line.resume(base=line.stop())
        for line in self.lines:
            line.wait()
            if self.random.random() < 0.2:
                base = line.stop()
                assert base == line.ring.base
                line.resume(base=base)

    def put(self, line: Line, choice: float, first: int, size: int) -> Issued | None:
        """Put a request for `size` bytes from sector `first` on, and apply it to the model; None without room."""
        ring = line.ring
        direct = self.random.choice([None, 0, 1]) if ring.indirect else None
        # The maximum for each half of the chain, so that it always fits.
        pieces = max(1, min(6, ring.size // 2))
        if not ring.has_room(2 * pieces if direct is None else direct + 1):
            return None
        kind, data, room, answer = self.choose(choice, first, size)
        framing: dict[str, Any] = {
            "readable": cuts(16 + len(data), self.random, pieces),
            "writable": cuts(room + 1, self.random, pieces),
            "direct": direct,
            "alignment": self.random.choice([1, 8, 512, 4096]),
        }
        return line, line.put(kind, first, data, room, **framing), answer

    def choose(self, choice: float, first: int, size: int) -> tuple[int, bytes, int, Answer]:
        """Choose type, data, room, and the expected answer."""
        place, nothing = slice(first * 512, first * 512 + size), bytes([NO_ANSWER])
        if choice < 0.4:
            return IN, b"", size, Answer(OK, size + 1, bytes(self.disk[place]))
        if choice < 0.7:
            self.disk[place] = self.random.randbytes(size)
            return OUT, bytes(self.disk[place]), 0, Answer(OK, 1, b"")
        if choice < 0.8:
            self.disk[place] = bytes(size)
            return WRITE_ZEROES, struct.pack("<QII", first, size // 512, 0), 0, Answer(OK, 1, b"")
        if choice < 0.88:
            return FLUSH, b"", 0, Answer(OK, 1, b"")
        if choice < 0.92:
            return GET_ID, b"", 20, Answer(OK, 21, SERIAL.encode().ljust(20, b"\0"))
        if choice < 0.96:
            return SCSI_CMD, b"", size, Answer(UNSUPP, 0, nothing * size)
        return IN, b"", size + 1, Answer(IOERR, 0, nothing * (size + 1))
