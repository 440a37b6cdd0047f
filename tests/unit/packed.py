"""The driver's end of a packed virtqueue in guest memory (virtio 1.2, section 2.8); see rig.Ring for a split one."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ringplane.dataplane.queue import RingLayout
from ringplane.virtio.features import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_RING_PACKED

from .rig import GUEST_BASE, INDIRECT, NEXT, USER_BASE, WRITE, Guest, Pending, Piece, barrier

AVAIL, USED = 1 << 7, 1 << 15
ENABLE, DISABLE, DESC = 0, 1, 2

Descriptor = tuple[int, int, int]  # address, length, flags


def place(index: int, wrap: int) -> int:
    """A place in the ring as event suppression structs and vring bases tell it."""
    return index | wrap << 15


class PackedRing:
    """Descriptors that are made available, and used ones that are taken back, lap after lap."""

    def __init__(self, guest: Guest, size: int, *, event_idx: bool = False, start: int = 0) -> None:
        """`start` is a base as the device tells it; 0: a new ring."""
        self.guest, self.size, self.event_idx = guest, size, event_idx
        start = start or 0x8000_8000
        self.desc = guest.allocate(16 * size, 16)
        self.avail, self.used = guest.allocate(4, 4), guest.allocate(4, 4)
        self.next, self.wrap = start & 0x7FFF, start >> 15 & 1
        self.used_next, self.used_wrap = start >> 16 & 0x7FFF, start >> 31
        # As the lap before has left them.
        stale = 0 if self.wrap else AVAIL | USED
        guest.write(self.desc, struct.pack("<QIHH", 0, 0, 0, stale) * size)
        guest.write(self.avail, struct.pack("<HH", 0, ENABLE))
        self._ids = list(range(size))
        self._room = size
        self._held: tuple[int, int] | None = None
        self._chains: dict[int, list[Descriptor]] = {}
        self.pending: dict[int, Pending] = {}

    def layout(self, *, indirect: bool = True, write_through: bool = False, features: int = 0) -> RingLayout:
        features |= self.event_idx * VIRTIO_F_EVENT_IDX | indirect * VIRTIO_F_INDIRECT_DESC | VIRTIO_F_RING_PACKED
        base = place(self.next, self.wrap) | place(self.used_next, self.used_wrap) << 16
        areas = (USER_BASE + area for area in (self.desc, self.avail, self.used))
        return RingLayout(self.size, *areas, base, features, write_through)

    def has_room(self, count: int) -> bool:
        return self._room >= count

    def add(self, pieces: Sequence[Piece], direct: int | None = None) -> Pending:
        """Plan a chain: all but `direct` of its descriptors in an indirect table, all direct if None."""
        chain = [descriptor(piece) for piece in (pieces if direct is None else pieces[:direct])]
        rest = [] if direct is None else [descriptor(piece) for piece in pieces[direct:]]
        if rest:
            table = b"".join(struct.pack("<QIHH", address, length, 0, flags) for address, length, flags in rest)
            offset = self.guest.allocate(len(table), 16)
            self.guest.write(offset, table)
            chain.append((GUEST_BASE + offset, len(table), INDIRECT))
        identifier = self._ids.pop()
        self._room -= len(chain)
        self._chains[identifier] = chain
        self.pending[identifier] = pending = Pending(identifier, list(pieces), [identifier] * len(chain))
        return pending

    def put_available(self, identifier: int) -> None:
        """Write the chain; what comes from the first one since the last `publish` on is not the device's yet."""
        chain = self._chains.pop(identifier)
        for number, (address, length, flags) in enumerate(chain):
            flags |= NEXT if number + 1 < len(chain) else 0
            flags |= AVAIL if self.wrap else USED
            start = self.desc + 16 * self.next
            # Only the last descriptor's id counts.
            number_of = identifier if number + 1 == len(chain) else 0xFFFF
            if self._held is None:
                self._held = (start + 14, flags)
                self.guest.write(start, struct.pack("<QIH", address, length, number_of))
            else:
                self.guest.write(start, struct.pack("<QIHH", address, length, number_of, flags))
            self.next += 1
            if self.next == self.size:
                self.next, self.wrap = 0, self.wrap ^ 1

    def publish(self) -> None:
        if self._held is not None:
            self.guest.store16(*self._held)
            self._held = None

    @property
    def used_idx(self) -> int:
        """The place of the next used descriptor."""
        return place(self.used_next, self.used_wrap)

    def set_used_event(self, wanted: int) -> None:
        """Ask for a call when the descriptor at this place is used."""
        self.guest.store16(self.avail, wanted)
        self.guest.store16(self.avail + 2, DESC)

    def collect(self) -> list[Pending]:
        """What has been answered since the last call."""
        done = []
        while True:
            used = self.desc + 16 * self.used_next
            (flags,) = struct.unpack_from("<H", self.guest.memory, used + 14)
            if bool(flags & USED) != bool(self.used_wrap) or bool(flags & AVAIL) != bool(self.used_wrap):
                return done
            # What the flags make ours is read after them.
            barrier()
            length, identifier = struct.unpack_from("<IH", self.guest.memory, used + 8)
            pending = self.pending.pop(identifier)
            pending.used_length = length
            # The device says that it wrote something exactly if it did.
            assert bool(flags & WRITE) == (length > 0)
            self._ids.append(identifier)
            self._room += len(pending.descriptors)
            self.used_next += len(pending.descriptors)
            if self.used_next >= self.size:
                self.used_next, self.used_wrap = self.used_next - self.size, self.used_wrap ^ 1
            done.append(pending)


def descriptor(piece: Piece) -> Descriptor:
    return GUEST_BASE + piece.offset, piece.size, WRITE if piece.writable else 0
