"""All rings of a front end are stopped and restarted."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

import ringplane
from ringplane.driver.virtqueue import peek
from ringplane.vhost_user.messages import Request
from ringplane.virtio.blk import VIRTIO_BLK_S_OK

from .protocol_rig import RING_SIZE, SECTOR, Machine, by_name, machine, negotiated, open_fds, sector, wait_until

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def stop_with_get_vring_base(guest: Machine) -> int:
    return guest.peer.get_vring_base(0)


def stop_with_enable(guest: Machine) -> int:
    guest.peer.set_vring_enable(0, False)
    return guest.used_idx


@pytest.mark.parametrize("stop", [stop_with_get_vring_base, stop_with_enable])
def test_stop_waits_for_every_request_in_flight(export: ringplane.Export, stop: Callable[[Machine], int]) -> None:
    """The base is where fetching stopped: all requests before it have a used entry, all later ones have none."""
    fetched_in_all = 0
    for _ in range(5):
        with machine(export) as guest:
            guest.start()
            places = [guest.offer_read(number, 256 * 1024) for number in range(16)]
            guest.ring.publish()
            guest.vring.kick()
            wait_until(lambda: export.in_flight > 0 or guest.used_idx > 0)
            base = stop(guest)
            assert guest.used_idx == base
            assert [peek(status, 1)[0] for _, status in places] == [VIRTIO_BLK_S_OK] * base + [0xFF] * (16 - base)
            fetched_in_all += base
        wait_until(lambda: export.state == "listening")
    assert fetched_in_all > 0


def test_stop_under_load_loses_no_request(export: ringplane.Export) -> None:
    with machine(export) as guest:
        base = 0
        for number in range(20):
            guest.ring.reset(base)
            guest.peer.start_vring(guest.vring, base)
            for _ in range(8):
                guest.offer_read(number, 65536)
            guest.ring.publish()
            guest.vring.kick()
            stopped = guest.peer.get_vring_base(0)
            assert guest.used_idx == stopped
            assert 0 <= (stopped - base) & 0xFFFF <= 8
            guest.memory.forget()
            guest.place_ring()
            base = stopped


def test_restart_from_the_base_serves_the_remaining_requests(export: ringplane.Export) -> None:
    with machine(export) as guest:
        guest.start()
        guest.read(1)
        guest.peer.set_vring_enable(0, False)
        base = guest.peer.get_vring_base(0)
        data, _ = guest.offer_read(7)
        guest.ring.publish()
        guest.peer.set_vring_num(0, RING_SIZE)
        guest.peer.set_vring_base(0, base)
        guest.set_addresses()
        guest.peer.set_vring_kick(0, guest.vring.kick_fd)
        guest.peer.set_vring_enable(0, True)
        guest.reap()
        assert peek(data, SECTOR) == sector(7)
        assert guest.peer.get_vring_base(0) == base + 1


def test_ring_that_never_ran_has_the_base_that_was_set(export: ringplane.Export) -> None:
    with negotiated(export) as peer:
        peer.set_vring_base(1, 1234)
        assert peer.get_vring_base(1) == 1234


@pytest.mark.parametrize("request_", [Request.RESET_DEVICE, Request.RESET_OWNER], ids=by_name)
def test_reset_stops_the_rings_and_leaves_the_memory(export: ringplane.Export, request_: Request) -> None:
    with machine(export) as guest:
        guest.start()
        for number in range(3):
            guest.read(number)
        guest.peer.send(request_)
        guest.offer_read(1)
        guest.ring.publish()
        guest.vring.kick()
        time.sleep(0.05)
        assert guest.used_idx == 3
        guest.peer.get_vring_base(0)
        guest.start()
        assert guest.read(6) == sector(6)


def test_reset_device_forgets_the_rings(export: ringplane.Export) -> None:
    with machine(export) as guest:
        guest.start()
        guest.read()
        fds = len(open_fds())
        guest.peer.send(Request.RESET_DEVICE)
        # The back end's copies of the kick, call and error fds.
        assert len(open_fds()) == fds - 3
        assert guest.peer.get_vring_base(0) == 0
