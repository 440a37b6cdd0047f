"""The back end's side of a connection: all messages, the orders that front ends use, starts, stops, disconnections."""

from __future__ import annotations

import copy
import fcntl
import gc
import logging
import mmap
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

import ringplane
from ringplane.dataplane.ring_states import RingState
from ringplane.driver.driver import Driver
from ringplane.driver.frontend import WANTED_PROTOCOL_FEATURES, FrontEnd, Refused, SharedMemory, Vring
from ringplane.driver.load import Load, Result, run_load
from ringplane.driver.virtqueue import Ring, peek, poke
from ringplane.driver.warm import warm_up
from ringplane.guest_memory.regions import Mapping
from ringplane.vhost_user.connection import encode_request
from ringplane.vhost_user.messages import (
    HEADER,
    NEED_REPLY,
    RULES,
    U64,
    VERSION,
    VHOST_F_LOG_ALL,
    VHOST_USER_F_PROTOCOL_FEATURES,
    Config,
    DeviceState,
    Empty,
    Inflight,
    Iotlb,
    LogRegion,
    MemoryRegion,
    MemoryTable,
    Opaque,
    Payload,
    ProtocolError,
    ProtocolFeature,
    Request,
    SingleMemoryRegion,
    VringAddr,
    VringFd,
    VringState,
)
from ringplane.virtio.blk import CONFIG, HEADER_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN
from ringplane.virtio.blk import HEADER as BLK_HEADER
from ringplane.virtio.features import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_RESET,
    VIRTIO_F_VERSION_1,
)
from ringplane.virtio.split import AVAIL_IDX, USED_IDX

from .rig import NOTIFIERS, full_notifier

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

# Sector s of the image holds the number s, 64 times.
CONTENT = np.repeat(np.arange(IMAGE_SIZE // SECTOR, dtype="<u8"), SECTOR // 8).tobytes()


def by_name(request: Request) -> str:
    return request.name


def serve_in(folder: Path) -> ringplane.Export:
    image = folder / "image"
    image.write_bytes(CONTENT)
    return ringplane.serve(image, folder / "socket", num_queues=QUEUES)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ringplane.Export]:
    with serve_in(tmp_path_factory.mktemp("session")) as export:
        yield export


@pytest.fixture
def own_export(tmp_path: Path) -> Iterator[ringplane.Export]:
    """A separate export for tests that would break all later ones if they found an error."""
    with serve_in(tmp_path) as export:
        yield export


@pytest.fixture(autouse=True)
def _nothing_leaks(export: ringplane.Export, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """After each test the back end waits for the next front end, without additional fds or mappings."""
    fds, mappings = open_fds(), shared_mappings()
    yield
    wait_until(lambda: export.state == "listening")
    # The exceptions in there refer to frames, and these to memory tables.
    caplog.get_records("call").clear()
    gc.collect(0)
    if shared_mappings() > mappings or open_fds() != fds:
        gc.collect()
    # Fewer after a test that failed, whose frames were kept.
    assert open_fds().items() <= fds.items()
    assert shared_mappings() <= mappings
    assert export.in_flight == 0
    with front_end(export) as following:
        assert following.get_features() & VHOST_USER_F_PROTOCOL_FEATURES
    wait_until(lambda: export.state == "listening")


def open_fds() -> dict[str, str]:
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return {number: target for number, target in found.items() if not target.endswith("/fd")}


def shared_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.001)


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


# Every request of the specification


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    memory = SharedMemory(MEMORY_SIZE)
    yield memory
    memory.close()
    # pytest keeps the object for a while; the mapping is removed now.
    vars(memory).clear()


def region(memory: SharedMemory, number: int) -> MemoryRegion:
    """One MiB of the memory."""
    return MemoryRegion(number * MIB, MIB, memory.address + number * MIB, number * MIB)


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


@pytest.fixture
def dropped(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The log lines of the back end in this test, from level warning on."""
    caplog.set_level(logging.INFO, "ringplane")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


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


# Features and configuration space


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


@pytest.mark.parametrize("size", [8, 16, 52, 57, 60, 96, 255, 256])
def test_config_reply_has_exactly_the_requested_size(export: ringplane.Export, size: int) -> None:
    with negotiated(export) as peer:
        config = peer.get_config(0, size)
    assert len(config) == size
    assert int.from_bytes(config[:8], "little") == IMAGE_SIZE // SECTOR


def test_config_from_an_offset_is_a_part_of_the_whole(export: ringplane.Export) -> None:
    with negotiated(export) as peer:
        whole = peer.get_config(0, 256)
        assert [peer.get_config(offset, 4) for offset in (0, 20, 252)] == [whole[:4], whole[20:24], whole[252:]]
    space = np.frombuffer(whole[: CONFIG.itemsize], CONFIG)[0]
    assert (space["num_queues"], space["blk_size"]) == (QUEUES, SECTOR)
    assert space["seg_max"] > 0


@pytest.mark.parametrize(("offset", "size"), [(1, 256), (256, 1), (249, 8), ((1 << 32) - 1, 8)])
def test_config_beyond_the_space_is_refused_with_an_empty_payload(
    export: ringplane.Export, offset: int, size: int
) -> None:
    with negotiated(export) as peer:
        answer = peer.transport.call(Request.GET_CONFIG, Config.asking_for(offset, size))
        assert answer is not None
        assert answer.payload == Empty()
        assert peer.get_config(0, 8)


def test_config_request_longer_than_the_space_ends_the_connection(export: ringplane.Export) -> None:
    with negotiated(export) as peer:
        peer.sock.sendall(HEADER.pack(Request.GET_CONFIG, VERSION, 12 + 257) + struct.pack("=III", 0, 257, 0))
        assert peer.ended()


def test_queue_num_is_the_number_of_queues(export: ringplane.Export) -> None:
    with negotiated(export) as peer:
        assert peer.get_queue_num() == QUEUES


# Invalid rings


@pytest.mark.parametrize("size", [0, 3, 100, 65535, 65536, (1 << 32) - 1])
def test_invalid_ring_size_is_refused(export: ringplane.Export, size: int) -> None:
    with negotiated(export) as peer:
        with pytest.raises(Refused):
            peer.set_vring_num(0, size)
        peer.set_vring_num(0, 128)


@pytest.mark.parametrize(("name", "wrong"), [("desc", 8), ("avail", 1), ("used", 2), ("desc", 1), ("used", 3)])
def test_misaligned_ring_address_is_refused(export: ringplane.Export, name: str, wrong: int) -> None:
    places = {"desc": 0x1000, "avail": 0x2000, "used": 0x3000}
    with negotiated(export) as peer:
        with pytest.raises(Refused):
            peer.set_vring_addr(0, **(places | {name: places[name] + wrong}))
        peer.set_vring_addr(0, **places)


@pytest.mark.parametrize("index", [QUEUES, 255])
def test_queue_that_does_not_exist_is_refused(export: ringplane.Export, index: int) -> None:
    attempts: list[Callable[[Peer], object]] = [
        lambda peer: peer.set_vring_num(index, 128),
        lambda peer: peer.set_vring_addr(index, 0, 0, 0),
        lambda peer: peer.set_vring_base(index, 0),
        lambda peer: peer.set_vring_enable(index, True),
        lambda peer: peer.set_vring_kick(index, fd),
        lambda peer: peer.set_vring_call(index, fd),
        lambda peer: peer.set_vring_err(index, fd),
    ]
    fd = os.eventfd(0)
    with negotiated(export) as peer:
        for attempt in attempts:
            with pytest.raises(Refused):
                attempt(peer)
        with pytest.raises(ProtocolError, match="closed"):
            peer.get_vring_base(index)
    os.close(fd)


@pytest.mark.parametrize("name", ["desc", "avail", "used"])
@pytest.mark.parametrize("end", ["before the memory", "across its end"])
def test_ring_outside_the_memory_is_refused_and_can_be_corrected(export: ringplane.Export, name: str, end: str) -> None:
    with machine(export) as guest:
        ring = guest.ring
        edge = guest.memory.address + (0 if end == "before the memory" else MEMORY_SIZE)
        wrong = {"desc": ring.desc, "avail": ring.avail, "used": ring.used} | {name: edge - 16}
        guest.peer.set_vring_num(0, RING_SIZE)
        guest.peer.set_vring_addr(0, **wrong)
        guest.peer.set_vring_kick(0, guest.vring.kick_fd)
        with pytest.raises(Refused):
            guest.peer.set_vring_enable(0, True)
        guest.peer.get_vring_base(0)
        guest.start()
        assert guest.read(5) == sector(5)


def test_ring_cannot_be_moved_or_resized_while_it_runs(export: ringplane.Export) -> None:
    with machine(export) as guest:
        guest.start()
        ring = guest.ring
        with pytest.raises(Refused):
            guest.peer.set_vring_num(0, RING_SIZE * 2)
        with pytest.raises(Refused):
            guest.peer.set_vring_addr(0, ring.desc + 4096, ring.avail, ring.used)
        with pytest.raises(Refused):
            guest.peer.set_vring_base(0, 7)
        assert guest.read(5) == sector(5)


def test_polled_ring_is_refused(export: ringplane.Export) -> None:
    with machine(export) as guest, pytest.raises(Refused):
        guest.peer.set_vring_kick(0, None)


def test_kick_fd_that_cannot_be_watched_starts_no_ring(own_export: ringplane.Export) -> None:
    """epoll_ctl(2) rejects a regular file. The ring is then not served, whatever happens to the other rings."""
    with machine(own_export) as guest, open("/proc/self/exe", "rb") as file:
        guest.peer.set_vring_num(0, RING_SIZE)
        guest.set_addresses()
        guest.peer.set_vring_enable(0, True)
        with pytest.raises(Refused):
            guest.peer.set_vring_kick(0, file.fileno())
        guest.offer_read(3)
        guest.ring.publish()
        with closing(Machine(guest.peer, index=1)) as other:
            guest.peer.add_mem_reg(
                MemoryRegion(1 << 40, MEMORY_SIZE, other.memory.address, 0),
                other.memory.fd,
            )
            other.start()
            time.sleep(0.05)
            assert guest.used_idx == 0


def test_kick_fd_that_blocks_does_not_stop_the_thread(own_export: ringplane.Export) -> None:
    """O_NONBLOCK belongs to the open file, so the front end can clear it: reading an empty eventfd would block."""
    kick = os.eventfd(0)
    with machine(own_export) as guest:
        guest.start()
        guest.peer.set_vring_kick(0, kick)
        os.set_blocking(kick, True)
        stop = threading.Thread(target=guest.peer.get_vring_base, args=[0])
        stop.start()
        stop.join(2)
        stuck = stop.is_alive()
        # Unblocks any reader.
        os.eventfd_write(kick, 1)
        stop.join()
    os.close(kick)
    assert not stuck


@pytest.mark.parametrize("kind", NOTIFIERS)
@pytest.mark.parametrize("end", ["stop", "replace", "leave", "process"])
def test_notifier_that_is_full_does_not_stop_the_thread(own_export: ringplane.Export, kind: str, end: str) -> None:
    """It blocks a thread that serves only this front end, but not when the thread is needed for something else.

    eventfd(2) has no RWF_NOWAIT for writes. For threads that serve several disks the kernel signals the eventfd, which
    never blocks (dataplane/signaller.py; hostile/test_notifiers.py); here that would cost 0.7 us per call.
    """
    with full_notifier(kind) as call:
        with machine(own_export) as guest:
            guest.start()
            guest.peer.set_vring_call(0, call)
            os.set_blocking(call, True)
            guest.read()
            if end == "stop":
                assert guest.peer.get_vring_base(0) == 1
            elif end == "replace":
                guest.peer.set_vring_call(0, guest.vring.call_fd)
                guest.read()
            elif end == "process":
                own_export.stop()
        if end == "leave":
            with machine(own_export) as other:
                other.start()
                other.read()


# Broken rings, and features that change.


def break_ring(guest: Machine) -> None:
    """Offer a head that does not exist."""
    guest.ring.offer(RING_SIZE)
    guest.ring.publish()
    guest.vring.kick()
    wait_until(lambda: bool(select.select([guest.vring.err_fd], [], [], 0)[0]))


def test_broken_ring_stays_stopped_until_it_is_reset(own_export: ringplane.Export) -> None:
    with machine(own_export) as guest:
        guest.start()
        guest.read()
        break_ring(guest)
        own_export.drain()
        guest.peer.set_vring_enable(0, False)
        guest.peer.set_vring_enable(0, True)
        queue = own_export.disk.queues[0]
        assert queue.state is RingState.STOPPED_BROKEN
        guest.peer.get_vring_base(0)
        guest.place_ring()
        guest.start()
        assert queue.state is RingState.RUNNING
        guest.read()


def test_features_that_change_reach_a_running_ring(own_export: ringplane.Export) -> None:
    """After a driver gives up the flush feature, each of its writes is stable when it is completed."""
    with machine(own_export) as guest:
        guest.start()
        guest.read()
        queue = own_export.disk.queues[0]
        before = bool(queue.record["write_through"])
        offered = guest.peer.get_features()
        guest.peer.set_features(offered & ~VIRTIO_BLK_F_FLUSH)
        without = bool(queue.record["write_through"])
        guest.peer.set_features(offered & ~VIRTIO_F_EVENT_IDX)
        assert (before, without, bool(queue.record["write_through"])) == (before, True, False)
        assert queue.state is RingState.RUNNING


@pytest.mark.parametrize(
    "request_", [Request.SET_VRING_CALL, Request.SET_VRING_ERR, Request.SET_VRING_KICK], ids=by_name
)
def test_unusable_fd_is_refused_and_closed(export: ringplane.Export, request_: Request, tmp_path: Path) -> None:
    """An O_PATH fd has no flags that can be set, so it cannot be made non-blocking."""
    fd = os.open(tmp_path, os.O_PATH)
    with machine(export) as guest:
        guest.peer.set_vring_num(0, RING_SIZE)
        guest.set_addresses()
        guest.peer.set_vring_enable(0, True)
        for _ in range(3):
            with pytest.raises(Refused):
                guest.peer.send(request_, VringFd(0), [fd])
    os.close(fd)


# VIRTIO_F_RING_RESET, as front ends implement it


def test_one_ring_is_reset_while_the_other_runs(export: ringplane.Export) -> None:
    """It is stopped, moved, resized and started again; the other ring is not affected."""
    with machine(export) as guest:
        guest.peer.set_features(DRIVER_FEATURES | VIRTIO_F_RING_RESET | VHOST_USER_F_PROTOCOL_FEATURES)
        other = copy.copy(guest)
        del other.vring
        other.index = 1
        other.place_ring()
        other.start()
        guest.start()
        for size in (16, 128, 64):
            other.offer_read(7)
            guest.offer_read(8)
            guest.ring.publish()
            guest.vring.kick()
            assert guest.peer.get_vring_base(0) == 1
            guest.reap()
            other.ring.publish()
            other.vring.kick()
            other.reap()
            guest.place_ring(size)
            guest.start()
            assert other.read(9) == sector(9)
        other.vring.close()


# Migration: written pages are marked


def marked(log: mmap.mmap) -> set[int]:
    """The numbers of the pages whose bits are set; the bits are cleared, as a front end does after reading them."""
    bits = np.unpackbits(np.frombuffer(log[:], np.uint8), bitorder="little")
    log[:] = bytes(len(log))
    return set(np.flatnonzero(bits).tolist())


@pytest.fixture
def log() -> Iterator[tuple[mmap.mmap, int]]:
    """A dirty log for the whole memory of a Machine, and its fd."""
    fd = os.memfd_create("log")
    size = MEMORY_SIZE // 4096 // 8
    os.ftruncate(fd, size)
    with mmap.mmap(fd, size) as mapping:
        yield mapping, fd
    os.close(fd)


def pages(guest: Machine, *places: tuple[int, int]) -> set[int]:
    """The numbers of the pages of these addresses and sizes."""
    found: set[int] = set()
    for address, size in places:
        start = guest.memory.guest(address)
        found |= set(range(start >> 12, (start + size - 1 >> 12) + 1))
    return found


def test_pages_that_requests_write_are_marked(export: ringplane.Export, log: tuple[mmap.mmap, int]) -> None:
    """Like in QEMU, the log, the features and the addresses are set while the ring runs."""
    mapping, fd = log
    with machine(export) as guest:
        guest.start()
        guest.read()
        assert marked(mapping) == set()
        guest.peer.set_log_base(len(mapping), 0, fd)
        guest.peer.set_features(guest.peer.features | VHOST_F_LOG_ALL)
        guest.set_addresses(flags=1, log=guest.memory.guest(guest.ring.used))
        data, status = guest.offer_read(9, 3 * 4096)
        guest.ring.publish()
        guest.vring.kick()
        guest.reap()
        ring = (guest.ring.used, 6 + 8 * RING_SIZE)
        assert marked(mapping) == pages(guest, (data, 3 * 4096), (status, 1), ring)
        # The log only covers the beginning of the memory; pages beyond its end are not marked.
        guest.peer.set_log_base(1, 0, fd)
        guest.read()
        assert all(page < 8 for page in marked(mapping))
        guest.peer.set_features(guest.peer.features & ~VHOST_F_LOG_ALL)
        guest.read()
        assert marked(mapping) == set()


@pytest.mark.parametrize(("size", "offset"), [(0, 0), (1 << 63, 0), (4096, 1 << 63), (1 << 20, 0), (256, 1 << 20)])
def test_an_invalid_log_is_refused(
    export: ringplane.Export, log: tuple[mmap.mmap, int], size: int, offset: int
) -> None:
    """CVE-2020-10722, CVE-2019-14835: sizes and offsets that are not checked against the mapping."""
    with machine(export) as guest:
        with pytest.raises(Refused):
            guest.peer.set_log_base(size, offset, log[1])
        guest.start()
        assert guest.read() == sector(3)


# In-flight areas


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


# Device status


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


# Message orders of real front ends


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


# Notifiers


def test_call_fd_is_signalled_when_it_is_set(export: ringplane.Export) -> None:
    call = os.eventfd(0, os.EFD_NONBLOCK)
    with negotiated(export) as peer:
        for times in range(1, 4):
            peer.set_vring_call(1, call)
            assert os.eventfd_read(call) == 1, times
        peer.set_vring_call(1, None)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(call)
    os.close(call)


def test_only_the_last_call_fd_is_signalled(export: ringplane.Export) -> None:
    first, second = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
    with machine(export) as guest:
        guest.start()
        for fd in (first, second):
            guest.peer.set_vring_call(0, fd)
            os.eventfd_read(fd)
        guest.read()
        wait_until(lambda: second in select_readable(second))
        assert not select_readable(first)
    os.close(first)
    os.close(second)


def select_readable(fd: int) -> list[int]:
    import select

    return select.select([fd], [], [], 0)[0]


def test_full_call_pipe_blocks_nothing(export: ringplane.Export) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with machine(export) as guest:
        guest.start()
        guest.peer.set_vring_call(0, writing)
        for number in range(600):
            guest.read(number)
    os.close(reading)
    os.close(writing)


def test_broken_ring_signals_the_error_fd_and_works_again_after_a_restart(
    export: ringplane.Export, dropped: Callable[[], list[str]]
) -> None:
    with machine(export) as guest:
        guest.start()
        guest.ring.poke16(guest.ring.avail + AVAIL_IDX, RING_SIZE + 1)
        guest.vring.kick()
        wait_until(lambda: bool(select_readable(guest.vring.err_fd)))
        assert any("queue 0" in line for line in dropped())
        guest.peer.get_vring_base(0)
        os.eventfd_read(guest.vring.err_fd)
        guest.start()
        assert guest.read(2) == sector(2)


# Memory


def test_invalid_memory_is_refused(export: ringplane.Export, memory: SharedMemory) -> None:
    good = region(memory, 0)
    bad = [
        MemoryRegion(0, 0, good.user_address, 0),
        MemoryRegion(0, MEMORY_SIZE + 4096, good.user_address, 0),
        MemoryRegion(0, MIB, good.user_address, MEMORY_SIZE),
        MemoryRegion((1 << 64) - MIB, MIB, good.user_address, 0),
        MemoryRegion(0, MIB, (1 << 64) - MIB, 0),
        MemoryRegion(0, MIB, good.user_address, (1 << 64) - MIB),
        MemoryRegion(0, (1 << 64) - 1, 0, 0),
    ]
    with negotiated(export) as peer:
        for one in bad:
            with pytest.raises(Refused):
                peer.set_mem_table([one], [memory.fd])
            with pytest.raises(Refused):
                peer.add_mem_reg(one, memory.fd)
        with pytest.raises(Refused):
            peer.set_mem_table([good, good], [memory.fd, memory.fd])
        with pytest.raises(Refused):
            peer.rem_mem_reg(good)
        peer.add_mem_reg(good, memory.fd)
        with pytest.raises(Refused):
            peer.add_mem_reg(good, memory.fd)
        peer.rem_mem_reg(good)


def test_fd_that_cannot_be_mapped_is_refused(export: ringplane.Export, memory: SharedMemory) -> None:
    fd = os.eventfd(0)
    with negotiated(export) as peer, pytest.raises(Refused):
        peer.add_mem_reg(region(memory, 0), fd)
    os.close(fd)


def test_region_can_be_removed_with_an_unneeded_fd(export: ringplane.Export, memory: SharedMemory) -> None:
    """libblkio sends one."""
    with negotiated(export) as peer:
        peer.add_mem_reg(region(memory, 0), memory.fd)
        peer.send(Request.REM_MEM_REG, SingleMemoryRegion(region(memory, 0)), [memory.fd])


def test_the_largest_number_of_regions(export: ringplane.Export, memory: SharedMemory) -> None:
    with negotiated(export) as peer:
        slots = peer.get_max_mem_slots()
        regions = [MemoryRegion(n * 4096, 4096, memory.address + n * 4096, n * 4096) for n in range(slots + 1)]
        for one in regions[:-1]:
            peer.add_mem_reg(one, memory.fd)
        with pytest.raises(Refused):
            peer.add_mem_reg(regions[-1], memory.fd)
        peer.rem_mem_reg(regions[0])
        peer.add_mem_reg(regions[-1], memory.fd)


def test_removed_memory_is_no_longer_used(export: ringplane.Export, memory: SharedMemory) -> None:
    with machine(export) as guest:
        extra = MemoryRegion(MEMORY_SIZE, MIB, memory.address, 0)
        guest.peer.add_mem_reg(extra, memory.fd)
        guest.start()
        guest.peer.rem_mem_reg(extra)
        guest.ring.poke_desc(0, MEMORY_SIZE, HEADER_SIZE, 0)
        guest.ring.offer(0)
        guest.ring.publish()
        guest.vring.kick()
        wait_until(lambda: bool(select_readable(guest.vring.err_fd)))


def test_ring_whose_memory_is_removed_stops_with_an_error(export: ringplane.Export) -> None:
    with machine(export) as guest:
        guest.start()
        guest.peer.set_mem_table([], [])
        wait_until(lambda: bool(select_readable(guest.vring.err_fd)))
        guest.share_memory()
        guest.peer.get_vring_base(0)
        os.eventfd_read(guest.vring.err_fd)
        guest.start()
        assert guest.read(2) == sector(2)


class Loaded:
    """A driver with a load of reads, each verified against the image, that lasts as long as the `with`."""

    def __init__(self, export: ringplane.Export) -> None:
        assert export.socket_path is not None
        self.export = export
        self.driver = Driver(export.socket_path, queues=QUEUES, queue_size=128, memory_size=MEMORY_SIZE * 4)
        self.results: list[Result] = []
        self.load = Load(block_size=[4096, 65536], depth=16, queues=QUEUES, seconds=0.2)
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        """How long the messages take depends on the machine, so the load is repeated until they have been sent."""
        while not self.ending.is_set():
            self.results.append(run_load(self.driver, self.load))

    def __enter__(self) -> Driver:
        # Compiling is not part of the load.
        warm_up()
        before = self.export.counters["read"].requests
        self.thread.start()
        try:
            wait_until(lambda: self.export.counters["read"].requests > before)
        except BaseException:
            self._end()
            raise
        return self.driver

    def _end(self) -> None:
        self.ending.set()
        self.thread.join()
        self.driver.close()

    def __exit__(self, kind: object, *_: object) -> None:
        failed = not self.thread.is_alive()
        self._end()
        if kind is None:
            assert not failed, "the load has ended with an exception"
            assert [(each.errors, each.wrong_lengths) for each in self.results] == [(0, 0)] * len(self.results)


def test_memory_table_is_replaced_under_load(export: ringplane.Export) -> None:
    with Loaded(export) as driver:
        for _ in range(50):
            driver.front_end.set_mem_table([driver.memory.region()], [driver.memory.fd])


def test_regions_are_added_and_removed_under_load(export: ringplane.Export, memory: SharedMemory) -> None:
    with Loaded(export) as driver:
        for _ in range(50):
            extra = MemoryRegion(1 << 40, MEMORY_SIZE, memory.address, 0)
            driver.front_end.add_mem_reg(extra, memory.fd)
            driver.front_end.rem_mem_reg(extra)


def test_rings_are_disabled_and_enabled_under_load(export: ringplane.Export) -> None:
    with Loaded(export) as driver:
        for _ in range(20):
            for index in range(QUEUES):
                driver.front_end.set_vring_enable(index, False)
                driver.front_end.set_vring_enable(index, True)


def test_notifiers_are_set_again_under_load(export: ringplane.Export) -> None:
    with Loaded(export) as driver:
        for _ in range(20):
            for vring in driver.queues:
                driver.front_end.set_vring_call(vring.index, vring.call_fd)
                driver.front_end.set_vring_err(vring.index, vring.err_fd)
                driver.front_end.set_vring_kick(vring.index, vring.kick_fd)
                # The check when a ring starts makes up for a kick that went to the old fd.


def test_mappings_stay_until_their_requests_in_flight_end(export: ringplane.Export) -> None:
    """All memory except the ring's is removed while large reads into it are in flight."""
    with machine(export) as guest:
        guest.start()
        ring_only = MemoryRegion(0, MIB, guest.memory.address, 0)
        places = [guest.offer_read(0, MIB) for _ in range(4)]
        guest.ring.publish()
        guest.vring.kick()
        wait_until(lambda: export.in_flight > 0 or guest.used_idx > 0)
        guest.peer.set_mem_table([ring_only], [guest.memory.fd])
        guest.peer.set_mem_table([ring_only], [guest.memory.fd])
        fetched = guest.peer.get_vring_base(0)
        assert guest.used_idx == fetched
        for data, status in places[:fetched]:
            assert peek(status, 1)[0] == VIRTIO_BLK_S_OK
            assert peek(data, MIB) == CONTENT[:MIB]


# Stopping


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
