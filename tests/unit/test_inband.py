"""In-band notifications: rings without eventfds, whose kicks, calls and errors are messages."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import ringplane
from ringplane.driver.frontend import Refused
from ringplane.driver.virtqueue import poke
from ringplane.vhost_user.connection import Connection, Role
from ringplane.vhost_user.messages import BackendRequest, ProtocolFeature, Request
from ringplane.vhost_user.payloads import U64, VringFd, VringState
from ringplane.vhost_user.transport import BlockingTransport
from ringplane.virtio.split import AVAIL_IDX

from .protocol_rig import CONTENT, OFFERED_PROTOCOL_FEATURES, QUEUES, SOON, Machine, negotiated, sector

INBAND = OFFERED_PROTOCOL_FEATURES | ProtocolFeature.INBAND_NOTIFICATIONS


@pytest.fixture
def export(tmp_path: Path) -> Iterator[ringplane.Export]:
    image = tmp_path / "image"
    image.write_bytes(CONTENT)
    features = {"inband-notifications": True}
    with ringplane.serve(image, tmp_path / "socket", num_queues=QUEUES, features=features) as export:
        yield export


class FrontEnd(Machine):
    """A guest whose ring has no eventfds; used chains and errors are reported on its back-end channel."""

    def __init__(self, export: ringplane.Export) -> None:
        super().__init__(negotiated(export, INBAND))
        self.share_memory()
        ours, theirs = socket.socketpair()
        with theirs:
            self.peer.send(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        self.channel = BlockingTransport(ours, SOON, Connection(Role.FRONT_END, backend_channel=True))

    def close(self) -> None:
        self.channel.close()
        super().close()

    def place(self) -> None:
        """Set up and enable the ring, without any fd."""
        self.ring.reset(0)
        self.peer.set_vring_num(0, self.ring.size)
        self.peer.set_vring_base(0, 0)
        self.set_addresses()
        self.peer.set_vring_enable(0, True)

    def kick(self) -> None:
        self.peer.send(Request.VRING_KICK, VringState(0, 0))

    def read_by_messages(self, number: int) -> None:
        """Read one sector; the kick and the call are messages."""
        self.offer_read(number)
        self.ring.publish()
        self.kick()
        assert self.hear() == (BackendRequest.VRING_CALL, VringState(0, 0))
        self.reap()

    def hear(self) -> tuple[object, object]:
        """The next request of the back end, which asks for a reply."""
        message = self.channel.receive()
        assert message is not None
        assert message.need_reply
        self.channel.send(self.channel.connection.reply(message, U64(0)))
        return message.request, message.payload


def test_kicks_and_calls_are_messages(export: ringplane.Export) -> None:
    with FrontEnd(export) as guest:
        guest.place()
        for number in range(50):
            guest.read_by_messages(number)


def test_a_ring_error_is_a_message(export: ringplane.Export) -> None:
    with FrontEnd(export) as guest:
        guest.place()
        poke(guest.ring.avail + AVAIL_IDX, struct.pack("<H", 1000))
        guest.kick()
        assert guest.hear() == (BackendRequest.VRING_ERR, VringState(0, 0))


def test_eventfds_are_preferred_if_there_are_any(export: ringplane.Export) -> None:
    with FrontEnd(export) as guest:
        guest.start()
        assert guest.read(7) == sector(7)
        guest.channel._sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            guest.hear()


def test_a_kick_before_the_ring_is_set_up_starts_it_later(export: ringplane.Export) -> None:
    with FrontEnd(export) as guest:
        guest.ring.reset(0)
        guest.offer_read(1)
        guest.ring.publish()
        guest.kick()
        guest.peer.set_vring_num(0, guest.ring.size)
        guest.set_addresses()
        guest.peer.set_vring_enable(0, True)
        assert guest.hear() == (BackendRequest.VRING_CALL, VringState(0, 0))
        guest.reap()


def test_a_front_end_that_does_not_reply_blocks_nobody(export: ringplane.Export) -> None:
    """It replies to no call, yet all requests are completed, and the next front end is served."""
    with FrontEnd(export) as guest:
        guest.place()
        for number in range(200):
            guest.offer_read(number)
            guest.ring.publish()
            guest.kick()
            guest.reap()
    with FrontEnd(export) as guest:
        guest.place()
        guest.offer_read(1)
        guest.ring.publish()
        guest.kick()
        assert guest.hear() == (BackendRequest.VRING_CALL, VringState(0, 0))


def test_a_ring_stops_and_starts_again(export: ringplane.Export) -> None:
    with FrontEnd(export) as guest:
        for _ in range(3):
            guest.place()
            guest.offer_read(1)
            guest.ring.publish()
            guest.kick()
            assert guest.hear() == (BackendRequest.VRING_CALL, VringState(0, 0))
            guest.reap()
            assert guest.peer.get_vring_base(0) == 1


def test_a_message_without_an_fd_is_like_no_message(export: ringplane.Export) -> None:
    with FrontEnd(export) as guest:
        guest.peer.send(Request.SET_VRING_KICK, VringFd(0, no_fd=True))
        guest.place()
        guest.offer_read(1)
        guest.ring.publish()
        guest.kick()
        guest.reap()


@pytest.mark.parametrize("missing", [ProtocolFeature.BACKEND_REQ, ProtocolFeature.REPLY_ACK])
def test_in_band_notifications_need_a_channel_and_replies(export: ringplane.Export, missing: ProtocolFeature) -> None:
    with negotiated(export) as peer, pytest.raises(Refused):
        peer.send(Request.SET_PROTOCOL_FEATURES, U64(int(INBAND & ~missing)))


def test_nothing_is_left_behind(export: ringplane.Export) -> None:
    threads = threading.active_count()
    with FrontEnd(export) as guest:
        guest.place()
        guest.kick()
    assert threading.active_count() == threads
