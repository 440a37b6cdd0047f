"""benchmarks/nbd_floor.py and nbd_wakeups.py: a measurement ends, whatever the clock shows and the server does."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest

from ringplane.block.sources.nbd.protocol import CMD_WRITE, SIMPLE_SIZE

from . import benchmark
from .waiting import PATIENCE


@pytest.fixture(scope="module")
def floor() -> ModuleType:
    return benchmark.load("nbd_floor")


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Of a connection: ours and the server's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(PATIENCE)
        yield ours, theirs


def answer(server: socket.socket, request_size: int) -> None:
    """Reply to writes until the client has gone."""
    while server.recv(request_size, socket.MSG_WAITALL):
        server.sendall(bytes(SIMPLE_SIZE))


@pytest.mark.parametrize("step", [0.3, 1.0])
def test_it_ends_whenever_the_time_is_over(
    floor: ModuleType, ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    """Also before the first request, or between two looks at the clock, which shows more each time."""
    ours, theirs = ends
    times = itertools.count(step, step)
    monkeypatch.setattr(floor, "time", SimpleNamespace(monotonic=lambda: next(times), process_time=lambda: 0.0))
    size = 512
    serving = threading.Thread(target=answer, args=[theirs, floor.REQUEST.size + size])
    serving.start()
    try:
        rate, _ = floor.Client(ours, 8, CMD_WRITE, size).measure(1, 1.0)
        assert rate > 0
    finally:
        ours.shutdown(socket.SHUT_RDWR)
        serving.join(PATIENCE)


def test_a_server_that_closes_the_connection(floor: ModuleType, ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionError, match="closed the connection"):
        floor.Client(ours, 8, CMD_WRITE, 512).measure(1, 1.0)


@pytest.fixture(scope="module")
def wakeups(floor: ModuleType) -> ModuleType:
    return benchmark.load("nbd_wakeups")


def test_each_request_of_a_driver_is_passed_on(
    floor: ModuleType, wakeups: ModuleType, ends: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = ends
    ours.setblocking(True)
    serving = threading.Thread(target=answer, args=[theirs, floor.REQUEST.size + 512])
    serving.start()
    try:
        assert wakeups.measure(floor.Client(ours, 8, CMD_WRITE, 512), 2, 3) > 0
    finally:
        ours.shutdown(socket.SHUT_RDWR)
        serving.join(PATIENCE)


def test_a_server_that_closes_the_connection_of_a_back_end(
    floor: ModuleType, wakeups: ModuleType, ends: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = ends
    ours.setblocking(True)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionError, match="closed the connection"):
        wakeups.measure(floor.Client(ours, 8, CMD_WRITE, 512), 1, 3)
