"""Front ends, and machines with one ring, for tests of the back end's side of the vhost-user protocol."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

import ringplane
from ringplane.driver.frontend import FrontEnd, SharedMemory, Vring
from ringplane.driver.virtqueue import Ring, peek, poke
from ringplane.vhost_user.messages import ProtocolFeature, Request
from ringplane.vhost_user.payloads import MemoryRegion, Payload
from ringplane.virtio.blk import HEADER as BLK_HEADER
from ringplane.virtio.blk import HEADER_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN
from ringplane.virtio.features import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
)
from ringplane.virtio.split import USED_IDX

from .waiting import PATIENCE
from .waiting import wait_until as wait_until

IMAGE_SIZE = 64 << 20
QUEUES = 2
RING_SIZE = 64
MEMORY_SIZE = 8 << 20
MIB = 1 << 20
SECTOR = 512
SOON = 10.0
LOG_ADDRESS_OF_UML = (1 << 64) - 1

OFFERED_PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.LOG_SHMFD
)
DRIVER_FEATURES = VIRTIO_F_VERSION_1 | VIRTIO_BLK_F_FLUSH
OTHER_FEATURES = DRIVER_FEATURES | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC

# Sector s of the image holds the number s, 64 times.
CONTENT = np.repeat(np.arange(IMAGE_SIZE // SECTOR, dtype="<u8"), SECTOR // 8).tobytes()


def by_name(request: Request) -> str:
    return request.name


def serve_in(folder: Path) -> ringplane.Export:
    image = folder / "image"
    image.write_bytes(CONTENT)
    return ringplane.serve(image, folder / "socket", num_queues=QUEUES)


def take_over(serve: Callable[..., ringplane.Export], running: ringplane.Export, **options: object) -> ringplane.Export:
    """The export of `serve` that has taken over the front ends of the running one."""
    export = serve(upgrade=True, **options)
    assert running.wait(PATIENCE)
    return export


def open_fds() -> dict[str, str]:
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return {number: target for number, target in found.items() if not target.endswith("/fd")}


def shared_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:")


class Peer(FrontEnd):
    """A front end that is closed at the end of a `with` block."""

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ended(self) -> bool:
        """Whether the back end closes the connection without a reply."""
        return self.transport.receive() is None

    def acknowledgement(self, request: Request, payload: Payload, fds: tuple[int, ...] = ()) -> Payload:
        """The back end's reply to a message with NEED_REPLY."""
        answer = self.transport.call(request, payload, fds, need_reply=True)
        assert answer is not None
        return answer.payload


def front_end(export: ringplane.Export) -> Peer:
    assert export.socket_path is not None
    return Peer(export.socket_path, timeout=SOON)


def negotiated(export: ringplane.Export, protocol_features: ProtocolFeature = OFFERED_PROTOCOL_FEATURES) -> Peer:
    """A front end that has negotiated features; each of its messages asks for an acknowledgement."""
    peer = front_end(export)
    peer.negotiate(DRIVER_FEATURES, protocol_features)
    return peer


class Machine:
    """A front end and its guest, which does one read at a time; a test sends the messages in any order."""

    def __init__(self, peer: Peer, index: int = 0, size: int = RING_SIZE, event_idx: bool = False) -> None:
        self.peer = peer
        self.index = index
        self.memory = SharedMemory(MEMORY_SIZE)
        self.place_ring(size, event_idx)

    def place_ring(self, size: int = RING_SIZE, event_idx: bool = False) -> None:
        """Put an empty ring into unused memory."""
        if hasattr(self, "vring"):
            self.vring.close()
        start = self.memory.allocate(Ring.bytes_needed(size))
        self.ring = Ring(self.memory.address, start, size, event_idx)
        self.vring = Vring(self.index, self.ring, self.peer.sock)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.close()
        self.close()

    def close(self) -> None:
        """Close everything except the connection."""
        self.vring.close()
        self.memory.close()

    def share_memory(self) -> None:
        self.peer.set_mem_table([self.memory.region()], [self.memory.fd])

    def start(self, base: int = 0) -> None:
        self.peer.start_vring(self.vring, base)

    def set_addresses(self, flags: int = 0, log: int = 0) -> None:
        ring = self.ring
        self.peer.set_vring_addr(self.index, ring.desc, ring.avail, ring.used, flags, log)

    def offer_read(self, sector: int, length: int = SECTOR) -> tuple[int, int]:
        """Put a read into the ring, without a kick; returns the places of its data and its status."""
        header, data, status = (self.memory.allocate(size) for size in (HEADER_SIZE, length, 1))
        poke(header, np.array([(VIRTIO_BLK_T_IN, 0, sector)], BLK_HEADER).tobytes())
        poke(status, b"\xff")
        self.ring.add([(header, HEADER_SIZE, False), (data, length, True), (status, 1, True)], 1)
        return data, status

    def read(self, sector: int = 3) -> bytes:
        """Read one sector with a kick, and poll the ring."""
        data, status = self.offer_read(sector)
        if self.ring.publish():
            self.vring.kick()
        self.reap()
        assert peek(status, 1)[0] == VIRTIO_BLK_S_OK
        return peek(data, SECTOR)

    def reap(self) -> None:
        wait_until(lambda: self.ring.reap() is not None)

    @property
    def used_idx(self) -> int:
        return int.from_bytes(peek(self.ring.used + USED_IDX, 2), "little")


def machine(
    export: ringplane.Export, protocol_features: ProtocolFeature = OFFERED_PROTOCOL_FEATURES, **ring: int
) -> Machine:
    """A guest that has shared its memory with the back end."""
    guest = Machine(negotiated(export, protocol_features), **ring)
    guest.share_memory()
    return guest


def sector(number: int) -> bytes:
    return struct.pack("<Q", number) * (SECTOR // 8)


def region(memory: SharedMemory, number: int) -> MemoryRegion:
    """One MiB of the memory."""
    return MemoryRegion(number * MIB, MIB, memory.address + number * MIB, number * MIB)


def break_ring(guest: Machine) -> None:
    """Offer a head that does not exist."""
    guest.ring.offer(RING_SIZE)
    guest.ring.publish()
    guest.vring.kick()
    wait_until(lambda: bool(select.select([guest.vring.err_fd], [], [], 0)[0]))


def select_readable(fd: int) -> list[int]:
    import select

    return select.select([fd], [], [], 0)[0]
