"""A front end with two rings: the first one misbehaves, the second one is honest."""

from __future__ import annotations

import os
import select
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ringplane.driver.frontend import WANTED_PROTOCOL_FEATURES, FrontEnd
from ringplane.vhost_user.messages import ProtocolFeature
from ringplane.vhost_user.payloads import MemoryRegion
from ringplane.virtio.features import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_VERSION_1,
)
from unit.packed_ring import PackedRing
from unit.rig import GUEST_BASE, IN, OK, PATIENCE, USER_BASE, Answer, Guest, Line, Ring, new_eventfd, take_events

BLOCK_FEATURES = 0x3_FFFF

# The guest's memory consists of two adjacent regions and, behind a hole, one more page.
HOLE, PAGE = 4096, 4096


class RemoteLine(Line):
    """A ring of a disk that another process serves, with the driver's eventfds."""

    def __init__(self, attacker: Attacker, number: int) -> None:
        self.rig: Any = attacker
        self.number = number
        self.kick_fd, self.call_fd, self.err_fd = new_eventfd(), new_eventfd(), new_eventfd()
        # The back end resets its queue when the front end sends GET_VRING_BASE.
        self.queue: Any = SimpleNamespace(name=f"queue {number}", reset=lambda: None)

    def resume(self, *, table: object = None, base: int | None = None) -> None:
        front_end, layout = self.rig.front_end, self.ring.layout()
        front_end.set_vring_num(self.number, layout.size)
        front_end.set_vring_base(self.number, layout.base if base is None else base)
        front_end.set_vring_addr(self.number, layout.desc, layout.avail, layout.used)
        self.set_notifiers()
        front_end.set_vring_enable(self.number, True)

    def set_notifiers(self) -> None:
        front_end = self.rig.front_end
        front_end.set_vring_kick(self.number, self.kick_fd)
        front_end.set_vring_call(self.number, self.call_fd)
        front_end.set_vring_err(self.number, self.err_fd)

    def stop(self) -> int:
        return int(self.rig.front_end.get_vring_base(self.number))

    def reset(self) -> None:
        """Do what a driver does after its ring was broken: stop it and start a new one."""
        self.stop()
        self.rig.new_ring(self)
        take_events(self.err_fd)

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)


class Attacker:
    """`lines[0]` is the ring that misbehaves; so may the methods of the FrontEnd."""

    line_class = RemoteLine

    def __init__(
        self,
        path: Path,
        *,
        ring_class: type[Any] = Ring,
        sizes: tuple[int, int] = (16, 16),
        event_idx: bool = False,
        indirect: bool = True,
        in_order: bool = False,
        features: int = BLOCK_FEATURES,
        protocol_features: ProtocolFeature = WANTED_PROTOCOL_FEATURES,
        guest_size: int = 1 << 20,
    ) -> None:
        """Negotiate, share the memory and start both rings; `features` are those of the block device."""
        self.path, self.sizes, self.ring_class = path, sizes, ring_class
        self.negotiated = {"event_idx": event_idx, "indirect": indirect, "in_order": in_order}
        self.features, self.protocol_features = VIRTIO_F_VERSION_1 | features, protocol_features
        self.features |= event_idx * VIRTIO_F_EVENT_IDX | indirect * VIRTIO_F_INDIRECT_DESC
        self.features |= in_order * VIRTIO_F_IN_ORDER | VIRTIO_F_RING_PACKED * (ring_class is PackedRing)
        self.guest = Guest(guest_size)
        # The first page of the file is the page behind the hole.
        self.guest.free = PAGE
        self.connect()
        self.lines = [self.line_class(self, number) for number in range(2)]
        for line in self.lines:
            self.new_ring(line)

    def connect(self) -> None:
        """Connect again, possibly to another process; the rings are not started."""
        self.front_end = FrontEnd(self.path, PATIENCE)
        agreed = self.front_end.negotiate(self.features, self.protocol_features)
        assert agreed & self.features & ~BLOCK_FEATURES == self.features & ~BLOCK_FEATURES
        self.share_memory()

    def share_memory(self) -> None:
        regions = self.regions()
        self.front_end.set_mem_table(regions, [self.guest.fd] * len(regions))

    def regions(self) -> list[MemoryRegion]:
        half, size = self.guest.size // 2, self.guest.size
        regions = [MemoryRegion(GUEST_BASE + at, half, USER_BASE + at, at) for at in (0, half)]
        return [*regions, MemoryRegion(GUEST_BASE + size + HOLE, PAGE, USER_BASE + size + HOLE, 0)]

    def new_ring(self, line: RemoteLine) -> None:
        line.start(ring_class=self.ring_class, size=self.sizes[line.number], **self.negotiated)

    def memory_beside_rings(self) -> bytes:
        """Up to 1 MiB of the guest's memory, with zeros in place of the rings, which a device may always write to."""
        content = bytearray(self.guest.memory[: 1 << 20])
        for ring in (line.ring for line in self.lines):
            end = ring.used + (4 if isinstance(ring, PackedRing) else 6 + 8 * ring.size)
            content[ring.desc : end] = bytes(end - ring.desc)
        return bytes(content)

    def is_attached(self) -> bool:
        """Whether the connection is still open."""
        return not select.select([self.front_end.sock], [], [], 0)[0]

    def check_honest_ring(self, disk: bytes) -> None:
        """Check that the second ring is served and reads what is on the disk."""
        sector = len(disk) // 512 - 1
        answer = self.lines[1].do(IN, sector, room=512)
        assert answer == Answer(OK, 513, disk[sector * 512 :]), "the honest ring of the same front end"

    def close(self) -> None:
        """May be called again."""
        if self.guest.fd >= 0:
            self.front_end.close()
            for line in self.lines:
                line.close()
            self.guest.close()
            self.guest.fd = -1
