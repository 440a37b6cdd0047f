"""Resources that all disks of a process share, or that outlive a front end: one front end must not use them up."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator

import pytest

from ringplane.driver.frontend import WANTED_PROTOCOL_FEATURES, FrontEnd, Refused
from ringplane.vhost_user.connection import encode_request
from ringplane.vhost_user.messages import ProtocolError, ProtocolFeature, Request
from ringplane.vhost_user.payloads import Inflight, MemoryRegion, VringFd
from unit.rig import PATIENCE, eventually

from .conftest import DISK, Target, Victim

PAGE = 4096
AREAS = WANTED_PROTOCOL_FEATURES | ProtocolFeature.LOG_SHMFD | ProtocolFeature.INFLIGHT_SHMFD
CHANNEL = WANTED_PROTOCOL_FEATURES | ProtocolFeature.BACKEND_REQ

# The address space of x86-64, of which half is for front ends, and an address far from those of the attacker's memory.
LARGEST = 1 << 46
FAR = 1 << 55


@contextlib.contextmanager
def sparse(size: int) -> Iterator[int]:
    fd = os.memfd_create("sparse", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    try:
        yield fd
    finally:
        os.close(fd)


# Address space.


def map_regions(front_end: FrontEnd, fd: int) -> None:
    """Map as much as is accepted: halves of halves, down to a page."""
    size, at = LARGEST, FAR
    while size >= PAGE:
        try:
            front_end.add_mem_reg(MemoryRegion(at, size, at, 0), fd)
            at += size
        except Refused:
            size //= 2


def map_log(front_end: FrontEnd, fd: int) -> None:
    with contextlib.suppress(Refused):
        front_end.set_log_base(LARGEST, 0, fd)


def map_area(front_end: FrontEnd, fd: int) -> None:
    with contextlib.suppress(Refused):
        front_end.set_inflight_fd(Inflight(LARGEST, 0, 2, 16), fd)


@pytest.mark.parametrize(
    "order", [(map_regions, map_log, map_area), (map_area, map_log, map_regions)], ids=["regions first", "areas first"]
)
def test_a_front_end_maps_as_much_as_it_can(target: Target, order: tuple[Callable[[FrontEnd, int], None], ...]) -> None:
    """A sparse file costs a front end nothing; others must still have room for their memory."""
    attacker = target.attacker(protocol_features=AREAS)
    with sparse(LARGEST) as fd:
        for use_up in order:
            use_up(attacker.front_end, fd)
        assert "of this disk's front end, which is" in target.logged()
        for _ in range(2):
            with contextlib.closing(target.attacker("read-only", guest_size=1 << 30)) as other:
                other.check_honest_ring(DISK)
        data = os.urandom(4096)
        target.victim.check_neighbour(data)
        attacker.check_honest_ring(DISK)


# The front end's own end of its connection.


@contextlib.contextmanager
def foreign_ends(target: Target, own: socket.socket) -> Iterator[list[socket.socket]]:
    """Sockets that are or may become connected to ringplane. If it keeps the first, the connection never ends."""
    listening, unconnected, other = (socket.socket(socket.AF_UNIX) for _ in range(3))
    with listening, unconnected, other, socket.socket(socket.AF_INET) as tcp:
        listening.bind("\0" + os.urandom(8).hex())
        listening.listen()
        other.connect(str(target.victim.folder / "read-only.sock"))
        yield [own, other, listening, unconnected, tcp]


HAND_OVER: dict[str, Callable[[FrontEnd, int], None]] = {
    "kick": lambda front_end, fd: front_end.send(Request.SET_VRING_KICK, VringFd(0), [fd]),
    "call": lambda front_end, fd: front_end.send(Request.SET_VRING_CALL, VringFd(0), [fd]),
    "error": lambda front_end, fd: front_end.send(Request.SET_VRING_ERR, VringFd(0), [fd]),
    "channel": lambda front_end, fd: front_end.send(Request.SET_BACKEND_REQ_FD, fds=[fd]),
    "region": lambda front_end, fd: front_end.add_mem_reg(MemoryRegion(FAR, PAGE, FAR, 0), fd),
    "table": lambda front_end, fd: front_end.set_mem_table([MemoryRegion(FAR, PAGE, FAR, 0)], [fd]),
    "log": lambda front_end, fd: front_end.set_log_base(PAGE, 0, fd),
    "area": lambda front_end, fd: front_end.set_inflight_fd(Inflight(PAGE, 0, 1, 16), fd),
}


def connected(target: Target) -> FrontEnd:
    front_end = FrontEnd(target.victim.socket, PATIENCE)
    front_end.negotiate(0, AREAS | CHANNEL)
    return front_end


def drops(target: Target) -> int:
    return target.logged().count("bad: front end dropped: an fd is a socket")


@pytest.mark.parametrize("how", HAND_OVER)
def test_connection_sockets_are_refused_as_fds(target: Target, how: str) -> None:
    """The front end is dropped, whoever owns them; `target` checks that the next one is served."""
    for number in range(5):
        with contextlib.closing(connected(target)) as front_end, foreign_ends(target, front_end.sock) as ends:
            with pytest.raises((ProtocolError, OSError)):
                HAND_OVER[how](front_end, ends[number].fileno())
            assert eventually(lambda count=number + 1: drops(target) == count)


def test_a_connection_socket_with_half_a_message_is_refused(target: Target) -> None:
    """The fds of half a message are kept until the rest arrives, which never happens here."""
    with contextlib.closing(connected(target)) as front_end:
        message = encode_request(Request.SET_VRING_CALL, VringFd(0))
        socket.send_fds(front_end.sock, [message[:5]], [front_end.sock.fileno()])


@pytest.mark.parametrize("how", ["call", "error", "channel"])
def test_a_socket_pair_is_accepted_as_a_notifier(target: Target, how: str) -> None:
    """User-mode Linux uses one; it gives no access to the connection."""
    attacker = target.attacker(protocol_features=CHANNEL)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        HAND_OVER[how](attacker.front_end, theirs.fileno())
        attacker.check_honest_ring(DISK)


# One that holds its own end where nobody can see it.


def hide(front_end: FrontEnd) -> None:
    """Queue the front end's own end on a socket of which this process holds the other end from now on."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        HAND_OVER["channel"](front_end, theirs.fileno())
        socket.send_fds(ours, [b"x"], [front_end.sock.fileno()])


def test_a_hidden_connection_needs_a_signal(victim: Victim) -> None:
    """The front end has gone, but its connection has not; the log says how the next one is served."""
    before = victim.resources()
    with contextlib.closing(FrontEnd(victim.socket, PATIENCE)) as front_end:
        front_end.negotiate(0, CHANNEL)
        hide(front_end)
    with contextlib.closing(FrontEnd(victim.socket, PATIENCE)) as following:
        assert eventually(lambda: "bad: a second front end (process " in victim.logged())
        assert "SIGUSR1 detaches the first one" in victim.logged()
        victim.process.send_signal(signal.SIGUSR1)
        assert following.get_features()
    victim.check()
    victim.wait_for_resources(before)


def test_a_signal_without_a_waiting_front_end_detaches_nobody(victim: Victim) -> None:
    with contextlib.closing(FrontEnd(victim.socket, PATIENCE)) as front_end:
        assert front_end.get_features()
        victim.process.send_signal(signal.SIGUSR1)
        assert eventually(lambda: "bad: front end (process " in victim.logged())
        assert "stays attached: no other one waits" in victim.logged()
        assert front_end.get_features()
    victim.check()
