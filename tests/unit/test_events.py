"""Layers that keep I/Os, and fds that layers wait for: what is resumed, what waits for it, and what does not."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from errno import EIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ringplane
from ringplane.block.events import Event
from ringplane.block.io import BLOCK_IO, CHANNEL, WRITE, io_at, put
from ringplane.block.stack import CONTINUE, KEEP, LayerPart, resume, turn_round
from ringplane.compiler.units import unit
from ringplane.control import handing_over, opening
from ringplane.control.handover import HandoverError
from ringplane.dataplane.queue import NO_MEMORY
from ringplane.dataplane.ring_states import RingState
from ringplane.dataplane.state import COALESCE, KIND_READ, POLL, SLEEP
from ringplane.driver.virtqueue import peek, poke
from ringplane.engines.common import MAX_TOKENS
from ringplane.guest_memory.regions import Mapping
from ringplane.inflight.area import InflightRegion, create_area
from ringplane.native.access import address_of, view
from ringplane.native.structs import new, struct
from ringplane.native.syscalls import read, write
from ringplane.vhost_user.payloads import Inflight
from ringplane.virtio.blk import HEADER as BLK_HEADER
from ringplane.virtio.blk import HEADER_SIZE, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_OUT

from .gate import Gate, GateModule
from .packed_ring import PackedRing
from .protocol_rig import (
    DRIVER_FEATURES,
    OFFERED_PROTOCOL_FEATURES,
    RING_SIZE,
    SECTOR,
    Machine,
    Peer,
    machine,
    wait_until,
)
from .rig import (
    IN,
    IOERR,
    OK,
    OUT,
    PATIENCE,
    Answer,
    Line,
    Pending,
    RigFactory,
    Ring,
    eventually,
    held,
    new_eventfd,
    pattern,
    rig_factory,
)
from .test_polling import give_only

SIZE = 1 << 20
DISK = pattern(SIZE)
MANY = 1 << 20
# Nanoseconds: longer than a turn of the loop.
LONG = 100_000_000
TESTS = Path(__file__).parents[1]

RINGS = pytest.mark.parametrize("ring_class", [Ring, PackedRing])


@pytest.fixture
def gates() -> Iterator[list[Gate]]:
    made = [Gate(), Gate()]
    yield made
    for gate in made:
        os.close(gate.fd)


@pytest.fixture(params=["aio", "io_uring", "memory"])
def make_rig(request: pytest.FixtureRequest, tmp_path: Path, gates: list[Gate]) -> Iterator[RigFactory]:
    """The queues stop before the gates are closed."""
    with rig_factory(tmp_path, DISK, engine=request.param) as factory:
        yield factory


@pytest.fixture
def gate(gates: list[Gate], make_rig: RigFactory) -> Iterator[Gate]:
    """It is open when the rigs are closed."""
    yield gates[0]
    gates[0].let(MANY)


def data_of(place: int) -> bytes:
    """Other data than that of the disk."""
    return pattern(512, 1 + place)


def put_write(line: Line, place: int) -> Pending:
    """A write of one sector, which is adjacent to no other one."""
    return line.put(OUT, 2 * place, data_of(place), direct=0)


def written(line: Line, place: int) -> bool:
    return line.rig.content()[1024 * place :][:512] == data_of(place)


def collect(line: Line, done: list[Pending], count: int) -> list[Pending]:
    """Poll the ring until so many requests are completed in all; `done` are those that were before."""

    def are_done() -> bool:
        done.extend(line.ring.collect())
        return len(done) >= count

    assert eventually(are_done)
    return done


# A layer keeps I/Os and resumes them.


@RINGS
def test_kept_writes_continue_in_their_order(make_rig: RigFactory, gate: Gate, ring_class: type[Any]) -> None:
    """So many as were let through; reads pass them."""
    line = make_rig(layers=[gate]).line().start(ring_class=ring_class)
    writes = [put_write(line, place) for place in range(6)]
    requests = [line.put(IN, 1, room=512)]
    line.kick()
    done = collect(line, [], 1)
    assert done == requests
    assert gate.kept == 6
    assert not any(written(line, place) for place in range(6))
    for count, passed in ((1, 1), (2, 3), (1, 4)):
        gate.let(count)
        collect(line, done, 1 + passed)
        line.turn_is_over()
        assert set(map(id, done)) == set(map(id, requests + writes[:passed]))
        assert gate.kept == 6 - passed == line.queue.in_flight
        assert [written(line, place) for place in range(6)] == [place < passed for place in range(6)]
    gate.let(2)
    line.wait()
    assert all(line.answer(each) == Answer(OK, 1, b"") for each in writes)


@RINGS
def test_a_ring_in_order_waits_for_a_kept_write(make_rig: RigFactory, gate: Gate, ring_class: type[Any]) -> None:
    line = make_rig(layers=[gate]).line().start(ring_class=ring_class, in_order=True)
    first, second = put_write(line, 0), line.put(IN, 1, room=512)
    line.kick()
    assert eventually(lambda: gate.kept == 1)
    line.turn_is_over()
    assert line.ring.collect() == []
    gate.let(1)
    assert line.wait() == [first, second]


# A layer that keeps each I/O on its way down or up, and what is done with it when the eventfd is written.
KEEPER = struct("fd", "number", "keeps", "does", "first = -1", "last", "kept", "downs", "ups")
NUMBER, KEPT = (KEEPER.fields[name][1] for name in ("number", "first"))  # type: ignore[index]
NOTHING, DOWN, UP = range(3)
PASS, FAIL, AGAIN = range(3)


@unit
def keep_down(layer, channel, io_address):
    keeper = view(layer, KEEPER)
    keeper.downs += 1
    if keeper.keeps != DOWN:
        return CONTINUE
    keeper.kept += 1
    put(view(channel, CHANNEL), layer + KEPT, view(io_address, BLOCK_IO))
    return KEEP


@unit
def keep_up(layer, channel, io_address):
    keeper = view(layer, KEEPER)
    keeper.ups += 1
    if keeper.keeps != UP:
        return CONTINUE
    keeper.kept += 1
    put(view(channel, CHANNEL), layer + KEPT, view(io_address, BLOCK_IO))
    return KEEP


@unit
def ready(state, channel_address):
    keeper, channel = view(state, KEEPER), view(channel_address, CHANNEL)
    read(keeper.fd, state + NUMBER, 8)
    # What is sent down again passes.
    keeper.keeps = NOTHING
    while keeper.first >= 0:
        io = io_at(channel, keeper.first)
        keeper.first = io.next
        if keeper.does == FAIL:
            turn_round(io, -EIO)
        elif keeper.does == AGAIN:
            io.upward = 0
        resume(channel, io)
    return 0


class Keeper(LayerPart):
    def __init__(self, keeps: int = NOTHING, does: int = PASS) -> None:
        self.fd = new_eventfd()
        self.record = new(KEEPER)
        self.record["fd"], self.record["keeps"], self.record["does"] = self.fd, keeps, does
        self.state = int(self.record.ctypes.data)
        self.down, self.up = keep_down.address(), keep_up.address()
        self.events = (Event(self.fd, ready.address(), self.state),)

    def __getitem__(self, name: str) -> int:
        return int(self.record[name][0])


@pytest.mark.parametrize(
    ("keeps", "does", "status", "calls"),
    [
        # How often `down` and `up` are called: of the layer above, of this layer, of the layer below.
        (DOWN, PASS, OK, [(1, 1), (1, 1), (1, 1)]),
        (DOWN, FAIL, IOERR, [(1, 1), (1, 0), (0, 0)]),
        (UP, PASS, OK, [(1, 1), (1, 1), (1, 1)]),
        (UP, FAIL, IOERR, [(1, 1), (1, 1), (1, 1)]),
        (UP, AGAIN, OK, [(1, 1), (1, 2), (2, 2)]),
    ],
    ids=["down", "down-fail", "up", "up-fail", "up-again"],
)
def test_a_kept_io_continues_like_any_other(
    make_rig: RigFactory, keeps: int, does: int, status: int, calls: list[tuple[int, int]]
) -> None:
    layers = [Keeper(), Keeper(keeps, does), Keeper()]
    line = make_rig(layers=layers).line().start()
    reads = [line.put(IN, 3 * place, room=512) for place in range(3)]
    line.kick()
    assert eventually(lambda: layers[1]["kept"] == 3)
    os.eventfd_write(layers[1].fd, 1)
    line.wait()
    assert [line.answer(each).status for each in reads] == [status] * 3
    if status == OK:
        assert [line.answer(each).data for each in reads] == [DISK[1536 * place :][:512] for place in range(3)]
    assert [(each["downs"], each["ups"]) for each in layers] == [(3 * down, 3 * up) for down, up in calls]
    line.stop()
    for each in layers:
        os.close(each.fd)


def test_the_time_for_which_an_io_is_kept_counts(make_rig: RigFactory) -> None:
    """Also if it ends without a completion of storage: the layer keeps it on its way up."""
    keeper = Keeper(UP)
    line = make_rig(layers=[keeper]).line().start()
    line.put(IN, 1, room=512)
    line.kick()
    assert eventually(lambda: keeper["kept"] == 1)
    line.turn_is_over()
    kept_at = time.monotonic_ns()
    assert eventually(lambda: time.monotonic_ns() > kept_at + LONG)
    os.eventfd_write(keeper.fd, 1)
    line.wait()
    line.stop()
    assert line.queue.counters["nanoseconds"][KIND_READ] >= LONG
    os.close(keeper.fd)


# A layer that lets one I/O at a time pass, without any event: the next one is resumed when one has ended.
TURNSTILE = struct("busy", "most", "first = -1", "last")
QUEUE: int = TURNSTILE.fields["first"][1]  # type: ignore[index]


@unit
def enter(layer, channel, io_address):
    turnstile = view(layer, TURNSTILE)
    if turnstile.busy:
        put(view(channel, CHANNEL), layer + QUEUE, view(io_address, BLOCK_IO))
        return KEEP
    turnstile.busy = 1
    return CONTINUE


@unit
def leave(layer, channel_address, io_address):
    turnstile, channel = view(layer, TURNSTILE), view(channel_address, CHANNEL)
    turnstile.busy = 0
    if turnstile.first >= 0:
        io = io_at(channel, turnstile.first)
        turnstile.first = io.next
        turnstile.busy = 1
        resume(channel, io)
    return CONTINUE


class Turnstile(LayerPart):
    def __init__(self) -> None:
        self.record = new(TURNSTILE)
        self.state = int(self.record.ctypes.data)
        self.down, self.up = enter.address(), leave.address()


# How many I/Os are below this layer, now and at most.
CROWD = struct("now", "most")


@unit
def count_in(layer, channel, io_address):
    crowd = view(layer, CROWD)
    crowd.now += 1
    crowd.most = max(crowd.most, crowd.now)
    return CONTINUE


@unit
def count_out(layer, channel, io_address):
    view(layer, CROWD).now -= 1
    return CONTINUE


class Crowd(LayerPart):
    def __init__(self) -> None:
        self.record = new(CROWD)
        self.state = int(self.record.ctypes.data)
        self.down, self.up = count_in.address(), count_out.address()


def test_a_layer_resumes_one_io_when_another_one_has_ended(make_rig: RigFactory) -> None:
    waiting, inside = Crowd(), Crowd()
    line = make_rig(layers=[waiting, Turnstile(), inside]).line().start()
    with held(line.worker):
        requests = [put_write(line, place) if place % 2 else line.put(IN, 2 * place, room=512) for place in range(40)]
        line.kick()
    line.wait()
    assert {line.answer(each).status for each in requests} == {OK}
    assert int(waiting.record["most"][0]) > 1
    assert int(inside.record["most"][0]) == 1
    assert all(written(line, place) for place in range(1, 40, 2))


# What waits for a kept I/O, and what does not.


@RINGS
def test_a_drain_waits_for_what_is_kept(make_rig: RigFactory, gate: Gate, ring_class: type[Any]) -> None:
    """The stack and its event stay until then, and the queue can be started again."""
    line = make_rig(layers=[gate]).line().start(ring_class=ring_class)
    requests = [put_write(line, place) for place in range(3)]
    line.kick()
    assert eventually(lambda: gate.kept == 3)
    drained = line.worker.stop_queue(line.queue)
    for passed in range(3):
        line.turn_is_over()
        assert not drained.done()
        assert line.queue.in_flight == 3 - passed
        gate.let(1)
        assert eventually(lambda left=2 - passed: line.queue.in_flight == left)  # type: ignore[misc]
    drained.result(PATIENCE)
    assert {id(each) for each in line.ring.collect()} == {id(each) for each in requests}
    line.resume()
    again = put_write(line, 7)
    line.kick()
    gate.let(1)
    assert line.wait() == [again]


def test_gates_of_two_stacks_and_a_plain_disk_on_one_thread(
    make_rig: RigFactory, gate: Gate, gates: list[Gate]
) -> None:
    """Each gate holds only its own disk."""
    rig = make_rig()
    lines = [rig.line(layers=[each]).start() for each in gates]
    plain = rig.line().start()
    for place, line in enumerate(lines):
        put_write(line, place)
        line.kick()
    assert eventually(lambda: [each.kept for each in gates] == [1, 1])
    for place in range(2, 100):
        assert plain.do(OUT, 2 * place, data_of(place)) == Answer(OK, 1, b"")
        assert plain.do(IN, 2 * place, room=512) == Answer(OK, 513, data_of(place))
    gates[1].let(1)
    lines[1].wait()
    assert [line.queue.in_flight for line in (*lines, plain)] == [1, 0, 0]
    assert not written(plain, 0)
    # One of the two is taken away, and the other one is still watched.
    lines[1].stop()
    gate.let(1)
    lines[0].wait()
    assert all(written(plain, place) for place in range(100))


# Events.


@pytest.mark.parametrize("policy", [SLEEP, COALESCE, POLL, None], ids=["sleep", "coalesce", "poll", "always"])
@pytest.mark.parametrize("engine", ["aio", "io_uring"])
def test_each_polling_policy_notices_events(tmp_path: Path, gates: list[Gate], engine: str, policy: int | None) -> None:
    """Alone, and while another queue is busy. None: a worker that never sleeps."""
    with rig_factory(tmp_path, DISK, engine=engine) as make:
        rig = make(poll_us=50 if policy is not None else None)
        line, other = rig.line(layers=gates[:1]).start(), rig.line().start()
        if policy is not None:
            give_only(line.worker, policy)
        for place in range(20):
            request = put_write(line, place)
            line.kick()
            assert eventually(lambda: gates[0].kept == 1)
            busy = [other.put(IN, 64, room=512) for _ in range(place % 3)]
            other.kick()
            gates[0].let(1)
            assert line.wait() == [request]
            assert len(other.wait()) == len(busy)


# A layer that writes to the eventfd of another I/O thread's gate whenever a write has ended.
BELL = struct("fd", "one")
ONE: int = BELL.fields["one"][1]  # type: ignore[index]


@unit
def ring_bell(layer, channel, io_address):
    if view(io_address, BLOCK_IO).operation == WRITE:
        bell = view(layer, BELL)
        write(bell.fd, address_of(bell) + ONE, 8)
    return CONTINUE


class Bell(LayerPart):
    def __init__(self, fd: int) -> None:
        self.record = new(BELL)
        self.record["fd"], self.record["one"] = fd, 1
        self.state = int(self.record.ctypes.data)
        self.up = ring_bell.address()


def test_another_io_thread_wakes_a_layer(make_rig: RigFactory, gate: Gate) -> None:
    """A limit that several threads share needs this."""
    rig = make_rig(workers=2)
    kept, bell = rig.line(0, [gate]).start(), rig.line(1, [Bell(gate.fd)]).start()
    writes = [put_write(kept, place) for place in range(50)]
    kept.kick()
    assert eventually(lambda: gate.kept == 50)
    done: list[Pending] = []
    for place in range(50):
        assert bell.do(OUT, 200 + 2 * place, pattern(512)).status == OK
        assert bell.do(IN, 200 + 2 * place, room=512).status == OK
        collect(kept, done, place + 1)
    assert {id(each) for each in done} == {id(each) for each in writes}


def test_an_event_from_before_the_start_is_not_lost(make_rig: RigFactory, gate: Gate) -> None:
    """And an fd is not watched when no queue uses the stack."""
    gate.let(1)
    line = make_rig(layers=[gate]).line()
    assert gate.calls == 0
    line.start()
    assert line.do(OUT, 0, data_of(0)) == Answer(OK, 1, b"")
    line.stop()
    line.turn_is_over()
    calls = gate.calls
    gate.let(1)
    line.turn_is_over()
    line.turn_is_over()
    assert gate.calls == calls
    line.start()
    assert line.do(OUT, 2, data_of(1)) == Answer(OK, 1, b"")
    assert gate.calls > calls


class WithEvents(LayerPart):
    """A layer that does nothing but wait for these."""

    state = 0

    def __init__(self, *events: Event) -> None:
        self.events = events


COUNT = struct("calls")


@unit
def count_call(state, channel):
    view(state, COUNT).calls += 1
    return 0


def test_more_events_than_are_reported_at_once(make_rig: RigFactory) -> None:
    fds = [new_eventfd() for _ in range(3 * MAX_TOKENS)]
    counts = new(COUNT, len(fds))
    state = int(counts.ctypes.data)
    events = [Event(fd, count_call.address(), state + counts.itemsize * number) for number, fd in enumerate(fds)]
    line = make_rig(layers=[WithEvents(*events)]).line().start()
    with held(line.worker):
        for fd in fds:
            os.eventfd_write(fd, 1)
    assert eventually(lambda: bool((counts["calls"] == 1).all()))
    line.stop()
    for fd in fds:
        os.close(fd)


def test_a_socket_that_becomes_writable(make_rig: RigFactory) -> None:
    """As a source can await it: by an epoll instance of its own, which is armed only when the socket was full."""
    near, far = socket.socketpair()
    counts = new(COUNT)
    with near, far, select.epoll() as epoll:
        near.setblocking(False)
        epoll.register(near, 0)
        event = Event(epoll.fileno(), count_call.address(), int(counts.ctypes.data))
        line = make_rig(layers=[WithEvents(event)]).line().start()
        for _ in range(2):
            with contextlib.suppress(BlockingIOError):
                while True:
                    near.send(bytes(4096))
            epoll.modify(near, select.EPOLLOUT | select.EPOLLONESHOT)
            line.turn_is_over()
            # While the socket becomes emptier the kernel may report the epoll instance more than once.
            calls = int(counts["calls"][0])
            while near not in select.select([], [near], [], 0)[1]:
                far.recv(1 << 20)
            assert eventually(lambda calls=calls: counts["calls"][0] > calls)  # type: ignore[misc]
            epoll.poll(0)
        line.stop()


def test_a_ring_does_not_start_with_an_fd_that_cannot_be_watched(
    make_rig: RigFactory, gate: Gate, tmp_path: Path
) -> None:
    """Nothing is left of the attempt."""
    rig = make_rig()
    with open(tmp_path / "file", "w") as file:
        line = rig.line(layers=[gate, WithEvents(Event(file.fileno(), count_call.address(), 0))])
        with pytest.raises(OSError, match="not permitted"):
            line.start()
    assert line.queue.state is RingState.STOPPED
    assert (line.queue.memory, line.queue.layout, line.queue.kick_fd) == (NO_MEMORY, None, -1)
    gate.let(1)
    line.turn_is_over()
    line.turn_is_over()
    assert gate.calls == 0
    # The gate can be watched by another stack.
    other = rig.line(layers=[gate]).start()
    assert other.do(OUT, 0, data_of(0)) == Answer(OK, 1, b"")


# A process is killed while I/Os are kept.


def start_tracked(line: Line, ring: Any, region: InflightRegion) -> None:
    line.ring = ring
    layout = replace(ring.layout(), base=0, inflight=region)
    line.worker.set_call_fd(line.queue, line.call_fd).result(PATIENCE)
    line.worker.start_queue(line.queue, layout, line.rig.guest.table(), line.kick_fd).result(PATIENCE)


@RINGS
def test_what_is_kept_is_resubmitted_by_the_next_process(
    make_rig: RigFactory, gate: Gate, gates: list[Gate], ring_class: type[Any]
) -> None:
    """The process that was killed is a worker whose gate stays closed: it does nothing any more."""
    rig = make_rig(workers=2)
    killed, successor = rig.line(0, [gate]), rig.line(1, gates[1:])
    ring = ring_class(rig.guest, 16)
    sizes, fd = create_area(1, 16)
    region = InflightRegion((mapping := Mapping(fd, sizes.size, sizes.offset)).address, mapping)
    os.close(fd)
    start_tracked(killed, ring, region)
    requests = [put_write(killed, place) for place in range(6)]
    killed.kick()
    gate.let(2)
    done = collect(killed, [], 2)
    assert eventually(lambda: gate.kept == 4)
    killed.turn_is_over()
    start_tracked(successor, ring, region)
    assert eventually(lambda: gates[1].kept == 4)
    more = put_write(successor, 6)
    successor.kick()
    gates[1].let(5)
    done += successor.wait()
    assert {id(each) for each in done} == {id(each) for each in (*requests, more)}
    assert all(successor.answer(each) == Answer(OK, 1, b"") for each in requests[2:])
    assert all(written(successor, place) for place in range(7))


@contextlib.contextmanager
def gated_process(image: Path, path: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A process that serves the image with a gate, whose standard input lets writes through."""
    command = [sys.executable, "-m", "unit.gate", str(image), str(path)]
    with subprocess.Popen(
        command, cwd=TESTS, env=os.environ | variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "listening\n"
            yield process
        finally:
            process.kill()


def offer_write(guest: Machine, number: int, data: bytes) -> int:
    """Put a write into the ring, without a kick; returns the place of its status."""
    header, content, status = (guest.memory.allocate(size) for size in (HEADER_SIZE, len(data), 1))
    poke(header, np.array([(VIRTIO_BLK_T_OUT, 0, number)], BLK_HEADER).tobytes())
    poke(content, data)
    poke(status, b"\xff")
    guest.ring.add([(header, HEADER_SIZE, False), (content, len(data), False), (status, 1, True)], 1)
    return status


def kick(guest: Machine) -> None:
    guest.ring.publish()
    guest.vring.kick()


def connect(path: Path) -> Peer:
    peer = Peer(path, timeout=PATIENCE)
    peer.negotiate(DRIVER_FEATURES, OFFERED_PROTOCOL_FEATURES)
    return peer


def start_with_area(guest: Machine, described: Inflight, fd: int) -> None:
    """Start the ring where the in-flight area and the used ring say, and wait until it has been fetched from.

    A read that follows the writes is not kept; when it has ended, they have all been fetched.
    """
    peer, before = guest.peer, guest.used_idx
    guest.share_memory()
    peer.set_inflight_fd(described, fd)
    peer.set_vring_num(0, RING_SIZE)
    peer.set_vring_base(0, before)
    guest.set_addresses()
    peer.set_vring_kick(0, guest.vring.kick_fd)
    peer.set_vring_enable(0, True)
    data, _ = guest.offer_read(1)
    kick(guest)
    wait_until(lambda: guest.used_idx == before + 1)
    assert peek(data, SECTOR) == DISK[512:1024]


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_kept_writes_survive_kill_9(tmp_path: Path, interpreted: str) -> None:
    """Two processes are killed one after the other, and the third one writes."""
    image, path = tmp_path / "image", tmp_path / "socket"
    image.write_bytes(DISK)
    with gated_process(image, path, RINGPLANE_INTERPRET=interpreted):
        guest = Machine(connect(path))
        guest.ring.reset(0)
        area = guest.peer.get_inflight_fd(1, RING_SIZE)
        statuses = [offer_write(guest, 2 * place, data_of(place)) for place in range(5)]
        start_with_area(guest, *area)
    for kills in (1, 2):
        guest.peer.close()
        with gated_process(image, path, RINGPLANE_INTERPRET=interpreted) as process:
            guest.peer = connect(path)
            start_with_area(guest, *area)
            assert image.read_bytes() == DISK
            if kills == 2:
                print(5, file=process.stdin, flush=True)
                wait_until(lambda guest=guest: guest.used_idx == 8)  # type: ignore[misc]
    assert [peek(status, 1)[0] for status in statuses] == [VIRTIO_BLK_S_OK] * 5
    content = image.read_bytes()
    assert all(content[1024 * place :][:512] == data_of(place) for place in range(5))
    os.close(area[1])
    guest.peer.close()
    guest.close()


# A served disk.


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> GateModule:
    """Disks that are served in this process have a gate."""
    made = GateModule()
    monkeypatch.setattr(opening, "LAYERS", (made,))
    return made


@contextlib.contextmanager
def gated(tmp_path: Path, module: GateModule) -> Iterator[tuple[ringplane.Export, Gate]]:
    with ringplane.serve(tmp_path / "disk", tmp_path / "socket", create=SIZE, num_queues=1, upgradable=True) as export:
        yield export, module.layers[-1].gates[0]


def in_background(function: Any) -> Future[Any]:
    """Call it in another thread."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def keep_two(guest: Machine, gate: Gate) -> list[int]:
    guest.start()
    statuses = [offer_write(guest, 2 * place, data_of(place)) for place in range(2)]
    kick(guest)
    wait_until(lambda: gate.kept == 2)
    return statuses


def is_draining(export: ringplane.Export) -> bool:
    return export.disk.queues[0].state is RingState.DRAINING


def test_get_vring_base_waits_for_what_is_kept(tmp_path: Path, module: GateModule) -> None:
    with gated(tmp_path, module) as (export, gate), machine(export) as guest:
        statuses = keep_two(guest, gate)
        base = in_background(lambda: guest.peer.get_vring_base(0))
        wait_until(lambda: is_draining(export))
        gate.let(1)
        wait_until(lambda: guest.used_idx == 1)
        assert not base.done()
        assert is_draining(export)
        gate.let(1)
        assert base.result(PATIENCE) == 2
        assert [peek(status, 1)[0] for status in statuses] == [VIRTIO_BLK_S_OK] * 2


def test_an_upgrade_waits_for_what_is_kept(tmp_path: Path, module: GateModule) -> None:
    """The old process ends it, and the new one has a gate of its own."""
    with gated(tmp_path, module) as (export, gate), machine(export) as guest:
        keep_two(guest, gate)
        upgrade = in_background(
            lambda: ringplane.serve(tmp_path / "disk", tmp_path / "socket", num_queues=1, upgrade=True)
        )
        wait_until(lambda: is_draining(export))
        assert not upgrade.done()
        gate.let(2)
        with upgrade.result(PATIENCE):
            assert export.wait(PATIENCE)
            assert guest.used_idx == 2
            successor = module.layers[-1].gates[0]
            assert successor is not gate
            offer_write(guest, 8, data_of(4))
            kick(guest)
            wait_until(lambda: successor.kept == 1)
            successor.let(1)
            wait_until(lambda: guest.used_idx == 3)


def test_an_upgrade_is_refused_if_something_is_kept_too_long(
    tmp_path: Path, module: GateModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for I/Os that storage works on: the running process continues at once, and serves other requests meanwhile."""
    monkeypatch.setattr(handing_over, "DRAIN_PATIENCE", 0.1)
    with gated(tmp_path, module) as (export, gate), machine(export) as guest:
        keep_two(guest, gate)
        with pytest.raises(HandoverError, match=r"disk: requests in flight took longer than 0\.1 seconds"):
            ringplane.serve(tmp_path / "disk", tmp_path / "socket", num_queues=1, upgrade=True)
        guest.read()
        assert (guest.used_idx, export.in_flight) == (1, 2)
        offer_write(guest, 8, data_of(4))
        kick(guest)
        gate.let(3)
        wait_until(lambda: guest.used_idx == 4)
