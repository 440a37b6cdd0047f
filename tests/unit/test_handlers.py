"""Every request of the specification: its reply, its rejection, and what it needs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest

import ringplane
from ringplane.driver.frontend import Refused, SharedMemory
from ringplane.vhost_user.connection import encode_request
from ringplane.vhost_user.message_rules import RULES
from ringplane.vhost_user.messages import HEADER, NEED_REPLY, VERSION, ProtocolError, ProtocolFeature, Request
from ringplane.vhost_user.payloads import (
    U64,
    Config,
    DeviceState,
    Empty,
    Inflight,
    Iotlb,
    LogRegion,
    MemoryTable,
    Opaque,
    Payload,
    SingleMemoryRegion,
    VringAddr,
    VringFd,
    VringState,
)

from .protocol_rig import OFFERED_PROTOCOL_FEATURES, QUEUES, Peer, by_name, front_end, negotiated, region

pytestmark = pytest.mark.usefixtures("nothing_leaks")


# The requests that this back end supports; it refuses all others of the specification.
HANDLED = {
    Request.GET_FEATURES,
    Request.SET_FEATURES,
    Request.SET_OWNER,
    Request.RESET_OWNER,
    Request.SET_MEM_TABLE,
    Request.SET_VRING_NUM,
    Request.SET_VRING_ADDR,
    Request.SET_VRING_BASE,
    Request.GET_VRING_BASE,
    Request.SET_VRING_KICK,
    Request.SET_VRING_CALL,
    Request.SET_VRING_ERR,
    Request.GET_PROTOCOL_FEATURES,
    Request.SET_PROTOCOL_FEATURES,
    Request.GET_QUEUE_NUM,
    Request.SET_VRING_ENABLE,
    Request.SET_BACKEND_REQ_FD,
    Request.GET_CONFIG,
    Request.RESET_DEVICE,
    Request.GET_MAX_MEM_SLOTS,
    Request.ADD_MEM_REG,
    Request.REM_MEM_REG,
    Request.SET_STATUS,
    Request.GET_STATUS,
    Request.GET_INFLIGHT_FD,
    Request.SET_INFLIGHT_FD,
    Request.SET_LOG_BASE,
    Request.SET_LOG_FD,
}
# Requests that do not apply; the reply is an error without an fd.
ANSWERED_NO: dict[Request, Payload] = {
    Request.GET_SHARED_OBJECT: Opaque(),
    Request.SET_DEVICE_STATE_FD: U64(1 | VringFd.NO_FD),
    Request.CHECK_DEVICE_STATE: U64(1),
}
OTHERS = set(RULES) - HANDLED - set(ANSWERED_NO)
# Other requests whose reply is more than an acknowledgement: they can only be refused by ending the connection.
ANSWERED_OTHERWISE = {request for request in OTHERS if RULES[request].reply is not None}
NEED_A_FEATURE = {request for request in HANDLED if RULES[request].feature is not None}


def example(request: Request, memory: SharedMemory) -> tuple[Payload, int]:
    """A valid payload of the request, and its number of fds."""
    rule = RULES[request]
    payloads: dict[type[Payload], Payload] = {
        Empty: Empty(),
        U64: U64(0),
        VringState: VringState(0, 1),
        VringAddr: VringAddr(0, 0, 0, 0, 0, 0),
        VringFd: VringFd(0),
        MemoryTable: MemoryTable((region(memory, 2),)),
        SingleMemoryRegion: SingleMemoryRegion(region(memory, 0 if request is Request.REM_MEM_REG else 1)),
        LogRegion: LogRegion(4096, 0),
        Iotlb: Iotlb(0, 4096, 0, 3, 2),
        Config: Config(0, 8, 0, bytes(8)),
        Inflight: Inflight(4096, 0, 1, 128),
        DeviceState: DeviceState(0, 0),
        Opaque: Opaque(bytes(16)),
    }
    payload = payloads[rule.payload]
    if request is Request.SET_PROTOCOL_FEATURES:
        payload = U64(int(OFFERED_PROTOCOL_FEATURES))
    return payload, rule.min_fds if payload.fd_count is None else payload.fd_count


def fd_for(request: Request, memory: SharedMemory) -> int:
    if RULES[request].payload in (MemoryTable, SingleMemoryRegion, Inflight, LogRegion):
        return os.dup(memory.fd)
    if request is Request.SET_BACKEND_REQ_FD:
        return socket.socketpair()[0].detach()
    return os.eventfd(0, os.EFD_CLOEXEC)


@pytest.fixture
def send_example(memory: SharedMemory) -> Iterator[Callable[..., Payload | None]]:
    fds: list[int] = []

    def send(peer: Peer, request: Request, *, need_reply: bool) -> Payload | None:
        payload, count = example(request, memory)
        fds.extend(fd_for(request, memory) for _ in range(count))
        answer = peer.transport.call(request, payload, fds, need_reply=need_reply)
        return None if answer is None else answer.payload

    yield send
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("request_", [r for r in RULES if r in HANDLED], ids=by_name)
def test_handled_request_gets_its_reply(
    export: ringplane.Export, memory: SharedMemory, request_: Request, send_example: Callable[..., Payload | None]
) -> None:
    with negotiated(export) as peer:
        peer.add_mem_reg(region(memory, 0), memory.fd)
        answer = send_example(peer, request_, need_reply=True)
        expected = RULES[request_].reply
        assert isinstance(answer, expected or U64)
        assert expected is not None or answer == U64(0)
        assert peer.get_features()


@pytest.mark.parametrize("request_", [r for r in RULES if r in HANDLED], ids=by_name)
def test_handled_request_without_need_reply_gets_no_reply(
    export: ringplane.Export, memory: SharedMemory, request_: Request, send_example: Callable[..., Payload | None]
) -> None:
    with negotiated(export, OFFERED_PROTOCOL_FEATURES & ~ProtocolFeature.REPLY_ACK) as peer:
        peer.add_mem_reg(region(memory, 0), memory.fd)
        assert (send_example(peer, request_, need_reply=False) is None) == (RULES[request_].reply is None)
        # The connection treats any unexpected reply as a protocol error.
        assert peer.get_features()


@pytest.mark.parametrize("request_", sorted(OTHERS - ANSWERED_OTHERWISE), ids=by_name)
def test_other_request_with_need_reply_is_refused(
    export: ringplane.Export, request_: Request, send_example: Callable[..., Payload | None]
) -> None:
    with negotiated(export) as peer:
        answer = send_example(peer, request_, need_reply=True)
        assert isinstance(answer, U64)
        assert answer.value != 0
        assert peer.get_features()


@pytest.mark.parametrize("request_", sorted(OTHERS - ANSWERED_OTHERWISE), ids=by_name)
def test_other_request_without_reply_ends_the_connection(
    export: ringplane.Export,
    request_: Request,
    send_example: Callable[..., Payload | None],
    dropped: Callable[[], list[str]],
) -> None:
    with negotiated(export) as peer:
        send_example(peer, request_, need_reply=False)
        assert peer.ended()
    (line,) = dropped()
    assert request_.name in line


@pytest.mark.parametrize("request_", sorted(ANSWERED_OTHERWISE), ids=by_name)
@pytest.mark.parametrize("need_reply", [False, True])
def test_other_request_that_needs_a_payload_in_reply_ends_the_connection(
    export: ringplane.Export,
    request_: Request,
    need_reply: bool,
    send_example: Callable[..., Payload | None],
    dropped: Callable[[], list[str]],
) -> None:
    with negotiated(export) as peer, pytest.raises(ProtocolError, match="the peer closed the connection"):
        send_example(peer, request_, need_reply=need_reply)
    (line,) = dropped()
    assert request_.name in line


@pytest.mark.parametrize("request_", sorted(ANSWERED_NO), ids=by_name)
def test_requests_that_do_not_apply_get_an_error_reply(
    export: ringplane.Export, request_: Request, send_example: Callable[..., Payload | None]
) -> None:
    with negotiated(export) as peer:
        assert send_example(peer, request_, need_reply=False) == ANSWERED_NO[request_]
        assert peer.get_features()


def test_a_channel_that_is_not_a_socket_is_refused(export: ringplane.Export, memory: SharedMemory) -> None:
    with negotiated(export) as peer, pytest.raises(Refused):
        peer.send(Request.SET_BACKEND_REQ_FD, fds=[memory.fd])


@pytest.mark.parametrize("request_", sorted(NEED_A_FEATURE), ids=by_name)
def test_request_whose_protocol_feature_was_not_negotiated_is_refused(
    export: ringplane.Export, request_: Request, send_example: Callable[..., Payload | None]
) -> None:
    with front_end(export) as peer:
        peer.set_protocol_features(ProtocolFeature.REPLY_ACK)
        if request_ is Request.GET_CONFIG:
            assert send_example(peer, request_, need_reply=False) == Empty()
        elif request_ is Request.SET_LOG_BASE:
            assert send_example(peer, request_, need_reply=False) == U64(1)
        elif request_ is Request.GET_INFLIGHT_FD:
            assert send_example(peer, request_, need_reply=False) == Inflight(0, 0, 0, 0)
        elif RULES[request_].reply:
            with pytest.raises(ProtocolError):
                send_example(peer, request_, need_reply=False)
        else:
            answer = send_example(peer, request_, need_reply=True)
            assert isinstance(answer, U64)
            assert answer.value != 0


def test_need_reply_is_ignored_before_reply_ack_is_negotiated(export: ringplane.Export) -> None:
    with front_end(export) as peer:
        peer.sock.sendall(encode_request(Request.SET_OWNER, need_reply=True))
        # An acknowledgement would come first, instead of the expected reply.
        assert peer.get_features()


@pytest.mark.parametrize("number", [0, 44, 200, (1 << 32) - 1])
def test_unknown_request_is_refused_or_ends_the_connection(
    export: ringplane.Export, number: int, dropped: Callable[[], list[str]]
) -> None:
    with negotiated(export) as peer:
        peer.sock.sendall(HEADER.pack(number, VERSION | NEED_REPLY, 8) + bytes(8))
        request, _, size = HEADER.unpack(peer.sock.recv(HEADER.size))
        assert (request, size) == (number, 8)
        assert peer.sock.recv(8) != bytes(8)
        peer.sock.sendall(HEADER.pack(number, VERSION, 8) + bytes(8))
        assert peer.ended()
    assert len(dropped()) == 2


def test_queue_num_is_the_number_of_queues(export: ringplane.Export) -> None:
    with negotiated(export) as peer:
        assert peer.get_queue_num() == QUEUES
