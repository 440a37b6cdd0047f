"""The in-flight area, which outlives the process."""

from __future__ import annotations

import os
import struct

import pytest

import ringplane
from ringplane.driver.frontend import Refused
from ringplane.driver.virtqueue import peek, poke
from ringplane.guest_memory.regions import Mapping
from ringplane.vhost_user.messages import Request
from ringplane.vhost_user.payloads import Inflight

from .protocol_rig import QUEUES, RING_SIZE, SECTOR, machine, sector, wait_until

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def test_an_area_is_created_and_used(export: ringplane.Export) -> None:
    with machine(export) as guest:
        described, fd = guest.peer.get_inflight_fd(QUEUES, RING_SIZE)
        guest.peer.set_inflight_fd(described, fd)
        guest.start()
        assert guest.read(5) == sector(5)
        region = Mapping(fd, described.mmap_size, described.mmap_offset)
        assert (described.num_queues, described.queue_size) == (QUEUES, RING_SIZE)
        # The first ring: version 1, 64 descriptors, one chain used.
        assert struct.unpack("<HH2xH", peek(region.address + 8, 8)) == (1, RING_SIZE, 1)
        assert guest.peer.get_vring_base(0) == 1
        assert struct.unpack("<H", peek(region.address + 8, 2)) == (0,)
        os.close(fd)


def test_a_reset_of_the_device_forgets_the_area(export: ringplane.Export) -> None:
    """The front end sets the base of the next driver's rings; the area's old contents do not matter."""
    with machine(export) as guest:
        described, fd = guest.peer.get_inflight_fd(QUEUES, RING_SIZE)
        guest.peer.set_inflight_fd(described, fd)
        guest.start()
        assert guest.read(5) == sector(5)
        region = Mapping(fd, described.mmap_size, described.mmap_offset)
        assert struct.unpack("<H", peek(region.address + 8, 2)) == (1,)
        guest.peer.send(Request.RESET_DEVICE)
        assert struct.unpack("<H", peek(region.address + 8, 2)) == (0,)
        os.close(fd)


def test_a_damaged_area_starts_no_ring_and_leaves_no_mapping(export: ringplane.Export) -> None:
    with machine(export) as guest:
        described, fd = guest.peer.get_inflight_fd(QUEUES, RING_SIZE)
        os.pwrite(fd, struct.pack("<HH", 2, RING_SIZE), 8)
        guest.peer.set_inflight_fd(described, fd)
        with pytest.raises(Refused):
            guest.start()
        os.close(fd)


def test_requests_in_flight_of_a_dead_process_are_resubmitted(export: ringplane.Export) -> None:
    """The region says that heads 3 and 1 were fetched in this order, and the used ring is still empty."""
    with machine(export) as guest:
        described, fd = guest.peer.get_inflight_fd(QUEUES, RING_SIZE)
        region = Mapping(fd, described.mmap_size, described.mmap_offset)
        answers = [guest.offer_read(number) for number in range(4)]
        guest.ring.publish()
        poke(region.address, struct.pack("<QHHHH", 0, 1, RING_SIZE, 0, 0))
        heads = struct.unpack("<4H", peek(guest.ring.avail + 4, 8))
        for counter, place in enumerate((0, 1)):
            poke(region.address + 16 * (1 + heads[place]), struct.pack("<B5xHQ", 1, 0, counter))
        guest.peer.set_inflight_fd(described, fd)
        # QEMU sends the used index after a crash, so the two must not be fetched again.
        peer = guest.peer
        peer.set_vring_num(0, RING_SIZE)
        peer.set_vring_base(0, 0)
        guest.set_addresses()
        peer.set_vring_kick(0, guest.vring.kick_fd)
        peer.set_vring_enable(0, True)
        wait_until(lambda: guest.used_idx == 4)
        assert [peek(data, SECTOR) for data, _ in answers] == [sector(number) for number in range(4)]
        assert peer.get_vring_base(0) == 4
        os.close(fd)


@pytest.mark.parametrize(
    "described",
    [
        Inflight(0, 0, 1, 64),
        Inflight(1 << 63, 0, 1, 64),
        Inflight(4096, (1 << 64) - 4096, 1, 64),
        Inflight(4096, 1 << 20, 1, 64),
        Inflight(1 << 20, 0, 1, 64),
        Inflight(4096, 0, 0, 64),
        Inflight(4096, 0, 1, 0),
        Inflight(4096, 0, 1, 65535),
    ],
    ids=str,
)
def test_an_invalid_area_is_refused(export: ringplane.Export, described: Inflight) -> None:
    """CVE-2021-3839: sizes that are not checked against the mapping."""
    fd = os.memfd_create("area")
    os.ftruncate(fd, 8192)
    with machine(export) as guest:
        with pytest.raises(Refused):
            guest.peer.set_inflight_fd(described, fd)
        guest.start()
        assert guest.read() == sector(3)
    os.close(fd)


@pytest.mark.parametrize("described", [Inflight(4096, 0, 64, 64), Inflight(256, 0, 1, 64), Inflight(8188, 4, 1, 64)])
def test_an_area_without_room_for_the_ring_does_not_start_it(export: ringplane.Export, described: Inflight) -> None:
    fd = os.memfd_create("area")
    os.ftruncate(fd, 8192)
    with machine(export) as guest:
        guest.peer.set_inflight_fd(described, fd)
        with pytest.raises(Refused):
            guest.start()
    os.close(fd)


@pytest.mark.parametrize(("queues", "size"), [(0, 64), (2, 0), (1, 32769), (65535, 65535)])
def test_an_invalid_request_for_an_area(export: ringplane.Export, queues: int, size: int) -> None:
    with machine(export) as guest:
        assert guest.peer.ask(Request.GET_INFLIGHT_FD, Inflight, Inflight(0, 0, queues, size)).mmap_size == 0
        guest.start()
        assert guest.read() == sector(3)
