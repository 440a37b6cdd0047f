"""The driver's end of a packed virtqueue in guest memory (virtio 1.2, section 2.8); see rig.Ring for a split one."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from ringplane.virtio.features import VIRTIO_F_RING_PACKED

from .rig import NEXT, WRITE, Descriptor, DriverRing, Guest, Pending, Piece, barrier

AVAIL, USED = 1 << 7, 1 << 15
ENABLE, DISABLE, DESC = 0, 1, 2
NEW_RING = 0x8000_8000


def place(index: int, wrap: int) -> int:
    """A place in the ring in the format of event suppression structs and vring bases."""
    return index | wrap << 15


class PackedRing(DriverRing):
    """Descriptors that are made available, and used ones that are taken back, lap after lap.

    Places are counted modulo two laps; in the first lap the wrap counter is 1.
    """

    def __init__(self, guest: Guest, size: int, *, start: int = 0, **negotiated: Any) -> None:
        """`start`: a base as the device reports it; 0: a new ring."""
        super().__init__(guest, size, **negotiated)
        self.features |= VIRTIO_F_RING_PACKED
        self.allocate(16 * size, 4, 4)
        start = start or NEW_RING
        self.next, self.used_next = self._count(start & 0xFFFF), self._count(start >> 16)
        for index in range(size):
            # The state after this lap so far, and after the previous lap.
            used = (self.next < size) == (index < self.next % size)
            guest.write(self.desc + 16 * index + 14, struct.pack("<H", AVAIL | USED if used else 0))
        self._ids = list(range(size))
        self._room = size
        # `publish` writes these flags, which make the first new descriptor available.
        self._held: tuple[int, int] | None = None
        self._published = self.next
        self._chains: dict[int, Sequence[Descriptor]] = {}

    @staticmethod
    def any_base(size: int, randomness: random.Random) -> int:
        """A random valid base of an empty ring."""
        here = place(randomness.randrange(size), randomness.randrange(2))
        return here | here << 16

    @property
    def base(self) -> int:
        """Where a device continues that has fetched everything in the ring."""
        return self._place(self.next) | self._place(self.used_next) << 16

    def _count(self, word: int) -> int:
        return (word & 0x7FFF) + (0 if word >> 15 else self.size)

    def _place(self, count: int) -> int:
        return place(count % self.size, int(count < self.size))

    def _after(self, count: int, steps: int) -> int:
        return (count + steps) % (2 * self.size)

    def has_room(self, count: int) -> bool:
        return self._room >= count

    def table(self, chain: Sequence[Descriptor]) -> bytes:
        """An indirect table (section 2.8.7): its descriptors are consecutive."""
        return b"".join(struct.pack("<QIHH", address, length, 0, flags) for address, length, flags in chain)

    def add_chain(self, chain: Sequence[Descriptor], pieces: Sequence[Piece] = ()) -> Pending:
        """Plan a chain; its last descriptor may have the flag NEXT too."""
        identifier = self._ids.pop()
        self._room -= len(chain)
        self._chains[identifier] = chain
        pending = self.pending[identifier] = Pending(identifier, list(pieces), [identifier] * len(chain))
        return pending

    def put_available(self, identifier: int) -> None:
        """Write the chain; it and all later ones become available at the next `publish`."""
        chain = self._chains[identifier]
        for number, (address, length, flags) in enumerate(chain):
            flags |= NEXT * (number + 1 < len(chain))
            flags |= AVAIL if self.next < self.size else USED
            start = self.desc + 16 * (self.next % self.size)
            # Only the id in the last descriptor counts.
            number_of = identifier if number + 1 == len(chain) else 0xFFFF
            if self._held is None:
                self._held = (start + 14, flags)
                self.guest.write(start, struct.pack("<QIH", address, length, number_of))
            else:
                self.guest.write(start, struct.pack("<QIHH", address, length, number_of, flags))
            self.next = self._after(self.next, 1)

    def put_bad_head(self) -> None:
        """Make a chain available with an id outside the ring."""
        self._chains[self.size] = [Piece(0, 16, False).descriptor, Piece(16, 1, True).descriptor]
        self.put_available(self.size)

    def publish(self) -> bool:
        """Make the new chains visible; returns whether the device wants a kick for them (section 2.8.14)."""
        if self._held is None:
            return False
        self.guest.store16(*self._held)
        count = (self.next - self._published) % (2 * self.size)
        old, self._held, self._published = self._published, None, self.next
        asked, flags = self._device_event()
        if flags == DESC:
            return (self._count(asked) - old) % (2 * self.size) < count
        return flags == ENABLE

    def asks_for_kick(self) -> bool:
        """Whether the device wants a kick with the next chain."""
        barrier()
        asked, flags = self._device_event()
        return asked == self._place(self.next) if flags == DESC else flags == ENABLE

    def _device_event(self) -> tuple[int, int]:
        """The device's event suppression struct: a place and its flags."""
        return struct.unpack_from("<HH", self.guest.memory, self.used)

    def enable_notifications(self) -> None:
        """Request a call with the next used chain."""
        if self.event_idx:
            self.set_used_event(self._place(self.used_next))
        else:
            self.guest.store16(self.avail + 2, ENABLE)

    def disable_notifications(self) -> None:
        self.guest.store16(self.avail + 2, DISABLE)

    def set_used_event(self, wanted: int) -> None:
        """Request a call when the descriptor at this place is used."""
        self.guest.store16(self.avail, wanted)
        self.guest.store16(self.avail + 2, DESC)

    def place_behind(self, chains: Sequence[int]) -> int:
        """The place of the used descriptor after those of the next chains, which have so many descriptors each."""
        return self._place(self._after(self.used_next, sum(chains)))

    def take_used(self) -> Iterator[tuple[int, int]]:
        """Ids and used lengths of the chains that were used since the last call."""
        while True:
            used, wrap = self.desc + 16 * (self.used_next % self.size), self.used_next < self.size
            (flags,) = struct.unpack_from("<H", self.guest.memory, used + 14)
            if bool(flags & USED) != wrap or bool(flags & AVAIL) != wrap:
                return
            # The flags are read before the data that they publish.
            barrier()
            length, identifier = struct.unpack_from("<IH", self.guest.memory, used + 8)
            # The device sets WRITE exactly if it wrote something.
            assert bool(flags & WRITE) == (length > 0)
            self.used_next = self._after(self.used_next, len(self._chains[identifier]))
            yield identifier, length

    def give_back(self, pending: Pending) -> None:
        self._ids.append(pending.head)
        self._room += len(pending.descriptors)
