"""Bad messages of a front end are refused or end the connection; nothing leaks, and the next front end is accepted."""

from __future__ import annotations

import os
import random
import resource
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest

from ringplane.driver.frontend import FrontEnd, Refused
from ringplane.vhost_user.connection import encode_request
from ringplane.vhost_user.message_rules import RULES
from ringplane.vhost_user.messages import HEADER, MAX_OPAQUE_SIZE, NEED_REPLY, REPLY, VERSION, ProtocolError, Request
from ringplane.vhost_user.payloads import U64, Payload, VringAddr, VringState
from unit.rig import PATIENCE, USER_BASE, eventually, new_eventfd

from .conftest import DISK, Target, Victim

WRONG_INDICES = (2, 3, 255, 256, 1 << 16, 1 << 31, (1 << 32) - 1)
VRING_FDS = (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR)


@pytest.fixture
def connection(target: Target) -> Iterator[socket.socket]:
    """A connection on which nothing was sent yet."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(target.victim.socket))
        yield sock


def dropped(target: Target, sock: socket.socket) -> str:
    """Wait for the end of the connection; returns the reason that the log gives."""
    with suppress(ConnectionResetError):
        while sock.recv(4096):
            pass
    assert eventually(lambda: "front end dropped: " in target.logged())
    return target.logged().split("front end dropped: ")[-1].splitlines()[0]


def fds(count: int) -> list[int]:
    return [new_eventfd() for _ in range(count)]


def send(sock: socket.socket, data: bytes, count: int = 0) -> None:
    """Send the data with so many fds; the other end may have closed the connection."""
    attached = fds(count)
    try:
        with suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(sock, [data], attached)
    finally:
        for fd in attached:
            os.close(fd)


def open_fds(victim: Victim) -> int:
    return victim.resources()[0]


# Indices.


def with_index(front_end: FrontEnd, index: int) -> dict[str, Callable[[], object]]:
    def sender(request: Request, payload: Payload) -> Callable[[], object]:
        return lambda: front_end.send(request, payload)

    return {
        "num": sender(Request.SET_VRING_NUM, VringState(index, 16)),
        "base": sender(Request.SET_VRING_BASE, VringState(index, 0)),
        "addr": sender(Request.SET_VRING_ADDR, VringAddr(index, 0, USER_BASE, USER_BASE, USER_BASE, 0)),
        "enable": sender(Request.SET_VRING_ENABLE, VringState(index, 1)),
    }


@pytest.mark.row("wrong queue index or file descriptors in a message")
@pytest.mark.parametrize("index", WRONG_INDICES)
def test_a_ring_that_does_not_exist(target: Target, index: int) -> None:
    """The message is refused; where the protocol has no reply for that, the connection ends."""
    attacker = target.attacker()
    for send in with_index(attacker.front_end, index).values():
        with pytest.raises(Refused):
            send()
        assert f"queue {index} does not exist; there are 2" in target.logged().splitlines()[-1]
    attacker.check_honest_ring(DISK)
    with pytest.raises(ProtocolError):
        attacker.front_end.get_vring_base(index)
    assert f"front end dropped: GET_VRING_BASE: queue {index} does not exist" in target.logged()


@pytest.mark.row("wrong queue index or file descriptors in a message")
def test_a_flood_of_fds_for_rings(target: Target) -> None:
    """For rings that do not exist, and repeatedly for one that does: only the last one is kept."""
    attacker = target.attacker()
    front_end = attacker.front_end
    front_end.get_features()
    before = open_fds(target.victim)
    for number in range(300):
        for request in VRING_FDS:
            fd = new_eventfd()
            try:
                with suppress(Refused):
                    front_end._set_vring_fd(request, (0, 2, 255)[number % 3], fd)
            finally:
                os.close(fd)
    # The fd of the last message is closed after the reply.
    assert eventually(lambda: open_fds(target.victim) == before)
    assert target.logged().count("queue 255 does not exist") == 300
    attacker.check_honest_ring(DISK)


@pytest.mark.row("wrong queue index or file descriptors in a message")
@pytest.mark.parametrize("value", [0x200, 0x1_0000_0000, 0x8000_0000_0000_0000, (1 << 64) - 1])
def test_a_ring_index_above_8_bits(target: Target, connection: socket.socket, value: int) -> None:
    """The low byte is the index of an existing ring."""
    send(connection, encode_request(Request.SET_VRING_CALL, U64(value)), 1)
    assert "only bits 0 to 8 may be set" in dropped(target, connection)


@pytest.mark.row("wrong queue index or file descriptors in a message")
@pytest.mark.parametrize("count", [1, 2, 8, 9, 32, 253])
def test_fds_with_messages_that_take_none(target: Target, count: int) -> None:
    """Each message type, with up to as many fds as one message can carry: all of them are closed."""
    for request, rule in RULES.items():
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(target.victim.socket))
            if count > max(rule.max_fds, 0):
                size = rule.payload.sizes[-1] if request is not Request.GET_CONFIG else 12
                send(sock, HEADER.pack(request, VERSION, size) + bytes(size), count)
                assert "fds" in dropped(target, sock), request.name
    target.victim.wait_for_resources(target.victim.at_rest)


@pytest.mark.row("wrong queue index or file descriptors in a message")
def test_messages_without_their_fds(target: Target) -> None:
    for request, rule in RULES.items():
        if rule.min_fds or request in VRING_FDS:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(PATIENCE)
                sock.connect(str(target.victim.socket))
                size = rule.payload.sizes[-1]
                send(sock, HEADER.pack(request, VERSION, size) + bytes(size))
                assert f"{request.name}: 0 fds came with it" in dropped(target, sock)


@pytest.mark.row("wrong queue index or file descriptors in a message")
def test_the_process_runs_out_of_fds(target: Target, connection: socket.socket) -> None:
    """With room for no fd or only one, no new front end is served and the others are; afterwards all are served."""
    victim = target.victim
    limits = resource.prlimit(victim.process.pid, resource.RLIMIT_NOFILE)
    assert eventually(lambda: open_fds(victim) > victim.at_rest[0])
    try:
        allow_more_fds(victim, 0)
        send(connection, encode_request(Request.SET_VRING_CALL, U64(0)), 8)
        assert "fds were lost" in dropped(target, connection)
        victim.wait_for_resources(victim.at_rest)
        for more, complaint in [(0, "cannot accept a front end"), (1, "cannot serve a front end")]:
            allow_more_fds(victim, more)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(victim.socket))
                expected = f"bad: {complaint}: [Errno 24] Too many open files"
                assert eventually(lambda expected=expected: expected in target.logged())
                assert eventually(victim.is_idle)
                victim.neighbour.write(0, DISK[:4096])
                assert victim.neighbour.read(0, 4096) == DISK[:4096]
    finally:
        resource.prlimit(victim.process.pid, resource.RLIMIT_NOFILE, limits)


def allow_more_fds(victim: Victim, count: int) -> None:
    """Limit the process to so many more fds than it has open."""
    used = set(map(int, os.listdir(f"/proc/{victim.process.pid}/fd")))
    lowest = [number for number in range(len(used) + count + 1) if number not in used][count]
    _, hard = resource.prlimit(victim.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(victim.process.pid, resource.RLIMIT_NOFILE, (lowest, hard))


# The stream of bytes.


SLOW = "malformed byte stream on the socket"


@pytest.mark.row(SLOW)
def test_replies_that_nobody_reads(target: Target, connection: socket.socket) -> None:
    """A front end sends until its socket is full; nobody else waits for it."""
    connection.setblocking(False)
    message = encode_request(Request.GET_FEATURES)
    sent = 0
    with suppress(BlockingIOError):
        while True:
            sent += connection.send(message * 100)
    assert sent > 10_000
    assert eventually(target.victim.is_idle)
    other = target.attacker("read-only")
    other.check_honest_ring(DISK)
    connection.setblocking(True)


@pytest.mark.row(SLOW)
@pytest.mark.parametrize(("size", "count"), [(1, 0), (11, 1), (12, 0), (12, 1), (19, 1)])
def test_half_a_message(target: Target, connection: socket.socket, size: int, count: int) -> None:
    """A front end pauses inside a message, while nobody else waits, and then disconnects."""
    send(connection, encode_request(Request.SET_VRING_CALL, U64(0))[:size], count)
    target.attacker("read-only").check_honest_ring(DISK)
    assert eventually(target.victim.is_idle)
    connection.shutdown(socket.SHUT_WR)
    assert "the peer closed the connection inside" in dropped(target, connection)


@pytest.mark.row(SLOW)
def test_payload_sizes_that_a_type_does_not_allow(target: Target) -> None:
    # GET_CONFIG has its own test.
    for request in set(Request) - {Request.GET_CONFIG}:
        sizes = RULES[request].payload.sizes
        for size in (sizes[-1] + 1, sizes[-1] + 4096, 1 << 31, (1 << 32) - 1, *([sizes[0] - 1] if sizes[0] else [])):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(PATIENCE)
                sock.connect(str(target.victim.socket))
                send(sock, HEADER.pack(request, VERSION, size) + bytes(64))
                assert f"{request.name}: its payload's size is {size} bytes" in dropped(target, sock)


@pytest.mark.row(SLOW)
def test_invalid_config_ranges(target: Target) -> None:
    """Sizes in the header and in the payload, and offsets, that do not match."""
    attacker = target.attacker()
    for offset, size in [(0, 256), (1, 256), (256, 1), ((1 << 32) - 1, 2), ((1 << 32) - 8, 16)]:
        with suppress(ProtocolError):
            assert len(attacker.front_end.get_config(offset, size)) == size == 256 > offset
    for announced, carried in [(8, 9), (1 << 31, 8), ((1 << 32) - 1, 0)]:
        with closing(FrontEnd(target.victim.folder / "read-only.sock", PATIENCE)) as front_end:
            front_end.negotiate(0)
            front_end.sock.sendall(
                HEADER.pack(Request.GET_CONFIG, VERSION, 12 + carried)
                + struct.pack("=III", 0, announced, 0)
                + bytes(carried)
            )
            assert "GET_CONFIG: its config size is" in dropped(target, front_end.sock)


@pytest.mark.row(SLOW)
@pytest.mark.parametrize("number", [0, 44, 255, 1 << 16, (1 << 32) - 1])
def test_an_unknown_type(target: Target, number: int) -> None:
    """With NEED_REPLY the message is refused and the connection continues; without it the front end is dropped.

    A front end that does not ask would believe that the message took effect.
    """
    attacker = target.attacker()
    sock = attacker.front_end.sock
    for size in (0, 8, MAX_OPAQUE_SIZE):
        send(sock, HEADER.pack(number, VERSION | NEED_REPLY, size) + bytes(size), 8)
        assert struct.unpack("=IIIQ", sock.recv(64)) == (number, VERSION | REPLY, 8, 1)
    assert f"request number {number} is not in the specification" in target.logged()
    attacker.check_honest_ring(DISK)
    send(sock, HEADER.pack(number, VERSION, 8) + bytes(8), 8)
    assert f"request number {number}" in dropped(target, sock)


@pytest.mark.row(SLOW)
def test_an_unknown_type_that_is_too_long(target: Target, connection: socket.socket) -> None:
    send(connection, HEADER.pack(99, VERSION | NEED_REPLY, MAX_OPAQUE_SIZE + 1) + bytes(4096))
    assert "its payload's size is 4097 bytes" in dropped(target, connection)


@pytest.mark.row(SLOW)
@pytest.mark.parametrize("flags", [0, 2, 3, VERSION | REPLY, 0xFFFF_FFFF])
def test_invalid_flags(target: Target, connection: socket.socket, flags: int) -> None:
    send(connection, HEADER.pack(Request.GET_FEATURES, flags, 0))
    dropped(target, connection)


@pytest.mark.row(SLOW)
def test_garbage(target: Target) -> None:
    """Random bytes, an HTTP request, and single bytes."""
    randomness = random.Random(1)
    for number in range(40):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(target.victim.socket))
            data = (
                b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
                if number == 0
                else randomness.randbytes(randomness.randrange(12, 4096))
            )
            with suppress(OSError):
                for start in range(0, len(data), 1 if number % 2 else 4096):
                    send(sock, data[start : start + (1 if number % 2 else 4096)], randomness.choice([0, 0, 0, 1, 8]))
            sock.shutdown(socket.SHUT_WR)
            dropped(target, sock)


@pytest.mark.row(SLOW)
def test_front_ends_that_connect_and_disconnect(target: Target) -> None:
    """Many at once: one is served, the others wait in the listening socket's queue until they disconnect."""
    for _ in range(3):
        waiting = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for _ in range(200)]
        for sock in waiting:
            with suppress(BlockingIOError):
                sock.connect(str(target.victim.socket))
        assert eventually(target.victim.is_idle)
        for sock in waiting:
            sock.close()
