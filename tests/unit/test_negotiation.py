"""Features, protocol features, and the device status."""

from __future__ import annotations

import struct

import pytest

import ringplane
from ringplane.driver.frontend import Refused
from ringplane.driver.virtqueue import poke
from ringplane.vhost_user.messages import VHOST_USER_F_PROTOCOL_FEATURES, Request
from ringplane.vhost_user.payloads import U64
from ringplane.virtio.split import AVAIL_IDX

from .protocol_rig import OFFERED_PROTOCOL_FEATURES, machine, negotiated, sector, wait_until

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.mark.parametrize("bit", [0, 7, 15, 16, 17, 24, 27, 35, 41, 63])
def test_feature_that_was_not_offered_is_refused(export: ringplane.Export, bit: int) -> None:
    with negotiated(export) as peer:
        assert not peer.get_features() & 1 << bit
        with pytest.raises(Refused):
            peer.set_features(VHOST_USER_F_PROTOCOL_FEATURES | 1 << bit)
        peer.set_features(VHOST_USER_F_PROTOCOL_FEATURES)


@pytest.mark.parametrize("bit", [2, 14, 20, 21, 63])
def test_protocol_feature_that_was_not_offered_is_refused(export: ringplane.Export, bit: int) -> None:
    with negotiated(export) as peer:
        assert peer.get_protocol_features() == OFFERED_PROTOCOL_FEATURES
        peer.sock.settimeout(2)
        with pytest.raises(Refused):
            peer.send(Request.SET_PROTOCOL_FEATURES, U64(int(OFFERED_PROTOCOL_FEATURES) | 1 << bit))
        # None of the features were accepted: messages are still acknowledged.
        peer.set_owner()


def test_the_status_can_be_set_and_read(export: ringplane.Export) -> None:
    with negotiated(export) as peer:
        assert peer.get_status() == 0
        for status in (1, 3, 11, 15):
            peer.set_status(status)
            assert peer.get_status() == status
        with pytest.raises(Refused):
            peer.set_status(0x100)
        assert peer.get_status() == 15


def test_features_ok_stays_clear_after_refused_features(export: ringplane.Export) -> None:
    with negotiated(export) as peer:
        with pytest.raises(Refused):
            peer.set_features(1 << 63)
        peer.set_status(11)
        assert peer.get_status() == 3
        peer.set_features(VHOST_USER_F_PROTOCOL_FEATURES)
        peer.set_status(11)
        assert peer.get_status() == 11


def test_a_broken_ring_needs_a_reset_by_status_0(export: ringplane.Export) -> None:
    """When a guest stops and continues, QEMU sends status 0 and then sets up the rings again."""
    with machine(export) as guest:
        peer = guest.peer
        guest.start()
        peer.set_status(15)
        assert guest.read() == sector(3)
        poke(guest.ring.avail + AVAIL_IDX, struct.pack("<H", 1000))
        guest.vring.kick()
        wait_until(lambda: peer.get_status() == 15 | 64)
        peer.set_status(0)
        assert peer.get_status() == 0
        guest.place_ring()
        guest.start()
        assert guest.read(5) == sector(5)


def test_status_0_stops_all_rings_and_keeps_the_state_of_the_connection(export: ringplane.Export) -> None:
    with machine(export) as guest:
        peer = guest.peer
        guest.start()
        peer.set_status(15)
        assert guest.read() == sector(3)
        peer.set_status(0)
        guest.offer_read(4)
        guest.ring.publish()
        guest.vring.kick()
        assert export.in_flight == 0
        # Neither the memory nor the call fd are sent again.
        guest.place_ring()
        ring = guest.ring
        peer.set_vring_num(0, ring.size)
        peer.set_vring_base(0, 0)
        ring.reset(0)
        guest.set_addresses()
        peer.set_vring_kick(0, guest.vring.kick_fd)
        peer.set_vring_enable(0, True)
        assert guest.read(5) == sector(5)
