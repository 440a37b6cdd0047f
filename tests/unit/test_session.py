"""One connection: the orders of messages of real front ends, and connections that end prematurely."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress

import pytest

import ringplane
from ringplane.driver.frontend import WANTED_PROTOCOL_FEATURES
from ringplane.driver.virtqueue import peek
from ringplane.vhost_user.connection import encode_request
from ringplane.vhost_user.messages import HEADER, VHOST_USER_F_PROTOCOL_FEATURES, ProtocolFeature, Request
from ringplane.vhost_user.payloads import U64, Config, Empty, MemoryRegion, MemoryTable, VringFd, VringState
from ringplane.virtio.features import (
    VIRTIO_F_VERSION_1,
)

from .protocol_rig import (
    DRIVER_FEATURES,
    LOG_ADDRESS_OF_UML,
    MEMORY_SIZE,
    OTHER_FEATURES,
    QUEUES,
    RING_SIZE,
    SECTOR,
    SOON,
    Machine,
    by_name,
    front_end,
    machine,
    negotiated,
    sector,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def test_user_mode_linux(export: ringplane.Export) -> None:
    """SET_OWNER first, unusual config sizes, SET_VRING_CALL with a pipe before NUM, finally ENABLE 0 and close."""
    features = ProtocolFeature.REPLY_ACK | ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG
    reading, writing = os.pipe()
    ours, theirs = socket.socketpair()
    with front_end(export) as peer, ours, theirs:
        peer.set_owner()
        offered = peer.get_features()
        assert peer.get_protocol_features() & features == features
        peer.set_protocol_features(features)
        peer.send(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        for size in (8, 12, 20, 24, 52):
            assert len(peer.get_config(0, size)) == size
        peer.set_features(offered & (DRIVER_FEATURES | VHOST_USER_F_PROTOCOL_FEATURES))
        with Machine(peer) as guest:
            # A table with room for two regions, of which one is used.
            peer.set_mem_table([guest.memory.region()], [guest.memory.fd])
            peer.set_vring_call(0, writing)
            assert os.read(reading, 64) == struct.pack("<Q", 1)
            peer.set_vring_num(0, RING_SIZE)
            peer.set_vring_base(0, 0)
            guest.set_addresses(flags=0, log=LOG_ADDRESS_OF_UML)
            peer.set_vring_kick(0, guest.vring.kick_fd)
            peer.set_vring_enable(0, True)
            assert guest.read(9) == sector(9)
            assert os.read(reading, 64) == struct.pack("<Q", 1)
            peer.set_vring_enable(0, False)
    os.close(reading)
    os.close(writing)


def test_qemu_under_seabios_and_then_linux(export: ringplane.Export) -> None:
    """A second driver takes over on the same connection, with other features and addresses, and two queues."""
    with machine(export) as guest:
        peer = guest.peer
        peer.set_features(VHOST_USER_F_PROTOCOL_FEATURES | VIRTIO_F_VERSION_1)
        for index in range(QUEUES):
            # QEMU sets the call fd as soon as it has one; the ring is set up much later.
            peer.set_vring_call(index, guest.vring.call_fd)
        guest.start()
        # SeaBIOS does not use queue 1, but QEMU enables it.
        peer.set_vring_enable(1, True)
        assert guest.read(1) == sector(1)
        for index in range(QUEUES):
            peer.set_vring_enable(index, False)
            assert peer.get_vring_base(index) == (1 if index == 0 else 0)

        peer.set_features(VHOST_USER_F_PROTOCOL_FEATURES | OTHER_FEATURES)
        guest.place_ring(event_idx=True)
        guest.start()
        with closing(Machine(peer, index=1)) as second:
            peer.add_mem_reg(
                MemoryRegion(MEMORY_SIZE, MEMORY_SIZE, second.memory.address, 0),
                second.memory.fd,
            )
            second.ring.state["memory"] -= MEMORY_SIZE
            second.start()
            # With EVENT_IDX, which is now negotiated, the back end writes to avail_event where it wants the next kick.
            for number in range(5):
                assert guest.read(number) == sector(number)
                assert second.read(number) == sector(number)
            peer.set_vring_enable(1, False)
            assert peer.get_vring_base(1) == 5
        assert peer.get_vring_base(0) == 5


def test_regions_that_were_added_outlive_stop_and_start(export: ringplane.Export) -> None:
    with Machine(negotiated(export)) as guest:
        guest.peer.add_mem_reg(guest.memory.region(), guest.memory.fd)
        for _ in range(2):
            guest.start()
            assert guest.read(4) == sector(4)
            guest.peer.set_vring_enable(0, False)
            guest.peer.get_vring_base(0)


def test_ring_starts_at_any_base(export: ringplane.Export) -> None:
    """Like at the destination of a migration; the index wraps around meanwhile."""
    with machine(export) as guest:
        guest.start(base=65534)
        for number in range(4):
            assert guest.read(number) == sector(number)
        assert guest.peer.get_vring_base(0) == 2


def test_ring_is_started_by_the_kick_fd_without_protocol_features(export: ringplane.Export) -> None:
    """Such front ends have no SET_VRING_ENABLE: rings are enabled from the start."""
    with front_end(export) as peer:
        peer.set_features(DRIVER_FEATURES)
        peer.set_owner()
        with Machine(peer) as guest:
            guest.share_memory()
            peer.set_vring_num(0, RING_SIZE)
            peer.set_vring_base(0, 0)
            guest.set_addresses()
            peer.set_vring_kick(0, guest.vring.kick_fd)
            assert guest.read(6) == sector(6)
            assert peer.get_vring_base(0) == 1


def test_disabled_ring_is_not_served(export: ringplane.Export) -> None:
    with machine(export) as guest:
        guest.start()
        guest.peer.set_vring_enable(0, False)
        data, _ = guest.offer_read(8)
        guest.ring.publish()
        guest.vring.kick()
        # The reply to another message proves that the kick was there before.
        guest.peer.set_vring_call(0, guest.vring.call_fd)
        time.sleep(0.05)
        assert guest.used_idx == 0
        guest.peer.set_vring_enable(0, True)
        guest.reap()
        assert peek(data, SECTOR) == sector(8)


def test_requests_from_before_the_start_are_served_without_a_kick(export: ringplane.Export) -> None:
    with machine(export) as guest:
        guest.peer.set_vring_num(0, RING_SIZE)
        guest.set_addresses()
        data, _ = guest.offer_read(8)
        guest.ring.publish()
        guest.peer.set_vring_enable(0, True)
        guest.peer.set_vring_kick(0, guest.vring.kick_fd)
        guest.reap()
        assert peek(data, SECTOR) == sector(8)


# Connections that end prematurely


Step = Callable[[Machine], object]
HANDSHAKE: dict[str, Step] = {
    "GET_FEATURES": lambda guest: guest.peer.get_features(),
    "GET_PROTOCOL_FEATURES": lambda guest: guest.peer.get_protocol_features(),
    "SET_PROTOCOL_FEATURES": lambda guest: guest.peer.set_protocol_features(WANTED_PROTOCOL_FEATURES),
    "GET_QUEUE_NUM": lambda guest: guest.peer.get_queue_num(),
    "GET_MAX_MEM_SLOTS": lambda guest: guest.peer.get_max_mem_slots(),
    "SET_OWNER": lambda guest: guest.peer.set_owner(),
    "GET_CONFIG": lambda guest: guest.peer.get_config(0, 57),
    "SET_VRING_CALL early": lambda guest: guest.peer.set_vring_call(0, guest.vring.call_fd),
    "SET_VRING_ERR": lambda guest: guest.peer.set_vring_err(0, guest.vring.err_fd),
    "SET_FEATURES": lambda guest: guest.peer.set_features(VHOST_USER_F_PROTOCOL_FEATURES | DRIVER_FEATURES),
    "ADD_MEM_REG": lambda guest: guest.peer.add_mem_reg(guest.memory.region(), guest.memory.fd),
    "SET_VRING_NUM": lambda guest: guest.peer.set_vring_num(0, RING_SIZE),
    "SET_VRING_BASE": lambda guest: guest.peer.set_vring_base(0, 0),
    "SET_VRING_ADDR": lambda guest: guest.set_addresses(),
    "SET_VRING_KICK": lambda guest: guest.peer.set_vring_kick(0, guest.vring.kick_fd),
    "SET_VRING_CALL": lambda guest: guest.peer.set_vring_call(0, guest.vring.call_fd),
    "SET_VRING_ENABLE": lambda guest: guest.peer.set_vring_enable(0, True),
    "a read": lambda guest: guest.read(),
    "reads in flight": lambda guest: offer_reads_and_kick(guest),
    "SET_VRING_ENABLE 0": lambda guest: guest.peer.set_vring_enable(0, False),
    "GET_VRING_BASE": lambda guest: guest.peer.get_vring_base(0),
}


def offer_reads_and_kick(guest: Machine) -> None:
    for number in range(8):
        guest.offer_read(number, 256 * 1024)
    guest.ring.publish()
    guest.vring.kick()


@pytest.mark.parametrize("last", range(len(HANDSHAKE)), ids=list(HANDSHAKE))
def test_connection_cut_after_each_step_of_a_handshake(export: ringplane.Export, last: int) -> None:
    """The back end releases everything that it received: see `_nothing_leaks`."""
    with Machine(front_end(export)) as guest:
        for step in list(HANDSHAKE.values())[: last + 1]:
            step(guest)


@pytest.mark.parametrize("last", range(len(HANDSHAKE)), ids=list(HANDSHAKE))
def test_protocol_error_after_each_step_of_a_handshake(
    export: ringplane.Export, last: int, dropped: Callable[[], list[str]]
) -> None:
    with Machine(front_end(export)) as guest:
        for step in list(HANDSHAKE.values())[: last + 1]:
            step(guest)
        # The version is 1.
        guest.peer.sock.sendall(HEADER.pack(Request.GET_FEATURES, 2, 0))
        assert guest.peer.ended()
    assert len(dropped()) == 1


@pytest.mark.parametrize("length", [1, HEADER.size - 1, HEADER.size, HEADER.size + 7])
def test_connection_cut_inside_a_message_with_fds(
    export: ringplane.Export, length: int, dropped: Callable[[], list[str]]
) -> None:
    whole = encode_request(Request.SET_VRING_CALL, VringFd(0))
    call = os.eventfd(0)
    with negotiated(export) as peer:
        socket.send_fds(peer.sock, [whole[:length]], [call])
    os.close(call)
    wait_until(lambda: bool(dropped()))
    assert "inside" in dropped()[0]


@pytest.mark.parametrize("request_", [Request.GET_FEATURES, Request.SET_VRING_NUM, Request.SET_MEM_TABLE], ids=by_name)
def test_fds_with_a_message_that_takes_none_are_closed(export: ringplane.Export, request_: Request) -> None:
    payload = {Request.SET_VRING_NUM: VringState(0, 128), Request.SET_MEM_TABLE: MemoryTable()}.get(request_, Empty())
    fds = [os.eventfd(0) for _ in range(8)]
    with negotiated(export) as peer:
        socket.send_fds(peer.sock, [encode_request(request_, payload)], fds)
        assert peer.ended()
    for fd in fds:
        os.close(fd)


def test_message_in_pieces_of_one_byte_is_a_message(export: ringplane.Export) -> None:
    call = os.eventfd(0, os.EFD_NONBLOCK)
    whole = encode_request(Request.SET_VRING_CALL, VringFd(0))
    with negotiated(export) as peer:
        socket.send_fds(peer.sock, [whole[:1]], [call])
        for position in range(1, len(whole)):
            peer.sock.sendall(whole[position : position + 1])
        peer.get_features()
    assert os.eventfd_read(call) == 1
    os.close(call)


def test_many_messages_sent_at_once_are_answered_in_order(export: ringplane.Export) -> None:
    with negotiated(export) as peer:
        request = encode_request(Request.GET_CONFIG, Config.asking_for(0, 8))
        peer.sock.sendall(request * 100 + encode_request(Request.GET_QUEUE_NUM))
        replies = b""
        while len(replies) < 100 * len(request) + HEADER.size + 8:
            replies += peer.sock.recv(65536)
        assert replies[-8:] == struct.pack("<Q", QUEUES)


def test_waiting_front_end_is_served_when_the_first_one_disconnects(export: ringplane.Export) -> None:
    first = negotiated(export)
    with front_end(export) as second:
        second.transport.send(second.transport.connection.send(Request.GET_FEATURES))
        second.sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            second.transport.receive()
        second.sock.settimeout(SOON)
        first.close()
        answer = second.transport.receive()
        assert answer is not None
        assert isinstance(answer.payload, U64)


def test_front_end_that_does_not_read_its_replies_blocks_no_drain(own_export: ringplane.Export) -> None:
    with negotiated(own_export) as peer:
        request = encode_request(Request.GET_CONFIG, Config.asking_for(0, 256))
        peer.sock.setblocking(False)
        # Until both ends of the socket are full: the back end waits in a reply.
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            with suppress(BlockingIOError):
                peer.sock.send(request)
        drain = threading.Thread(target=own_export.drain)
        drain.start()
        drain.join(2)
        held_up = drain.is_alive()
    drain.join()
    assert not held_up
