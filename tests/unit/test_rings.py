"""The same tests for every combination of ring format and features: requests, laps, order, notifications, errors."""

from __future__ import annotations

import logging
import random
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringplane.block.transfer import BOUNCE_SIZE
from ringplane.dataplane import ring_rules
from ringplane.dataplane.loop import FIRST_TURN
from ringplane.virtio.blk import VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES

from .combinations import COMBINATIONS, INDIFFERENT, WITH_INDIRECT, WITHOUT_INDIRECT, Combination
from .rig import (
    DISCARD,
    FLUSH,
    GET_ID,
    GUEST_BASE,
    IN,
    INDIRECT,
    IOERR,
    NEXT,
    NO_ANSWER,
    OK,
    OUT,
    PATIENCE,
    SCSI_CMD,
    SERIAL,
    UNSUPP,
    WRITE,
    WRITE_ZEROES,
    Answer,
    Line,
    Pending,
    Piece,
    RigFactory,
    Ring,
    direct_rig,
    eventually,
    fetch_only,
    has_event,
    held,
    pattern,
    rig_factory,
    take_events,
    wait_for_event,
)
from .workload import CAPACITY, Workload

SIZE = CAPACITY * 512
DISK = pattern(SIZE)
RANGES = VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES

ENGINES = pytest.mark.parametrize("engine", ["aio", "io_uring", "memory"])


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[RigFactory]:
    """Make rigs with images that contain DISK; with Linux AIO by default."""
    with rig_factory(tmp_path, DISK) as factory:
        yield factory


@pytest.fixture(params=COMBINATIONS)
def combination(request: pytest.FixtureRequest) -> Combination:
    return dict(request.param)


@pytest.fixture
def line(make_rig: RigFactory, combination: Combination) -> Line:
    return make_rig().line().start(size=16, **combination)


def sectors(first: int, count: int = 1) -> bytes:
    return DISK[first * 512 : (first + count) * 512]


def framings(ring_size: int, indirect: bool, randomness: random.Random) -> dict[str, object]:
    """Framings of a read of one sector: the sizes of its descriptors, and which are in an indirect table."""
    pieces = randomness.randrange(1, min(8, ring_size // 2) + 1)
    writable = [512 // pieces] * (pieces - 1)
    direct = randomness.choice([None, 0, 1]) if indirect else None
    return {"writable": [*writable, 513 - sum(writable)], "direct": direct}


def read(line: Line, sector: int, randomness: random.Random) -> Pending:
    """Put a read of one sector into the ring with any framing."""
    return line.put(IN, sector, room=512, **framings(line.ring.size, line.ring.indirect, randomness))  # type: ignore[arg-type]


def assert_read(line: Line, pending: Pending, sector: int) -> None:
    assert line.answer(pending) == Answer(OK, 513, sectors(sector))


# Requests.


@pytest.mark.parametrize("indifferent", [0, sum(INDIFFERENT)], ids=["", "and-more"])
@ENGINES
def test_requests_of_each_kind(make_rig: RigFactory, combination: Combination, engine: str, indifferent: int) -> None:
    """With each framing: all direct, all in an indirect table, the header before a table."""
    rig = make_rig(engine=engine)
    line = rig.line().start(size=8, features=RANGES | indifferent, **combination)
    nothing = bytes([NO_ANSWER])
    disk = bytearray(DISK)
    for number, direct in enumerate([None, 0, 1] if combination["indirect"] else [None]):
        sector, data = 16 * number, pattern(4096, number)
        segment = struct.pack("<QII", sector + 8, 8, 0)
        assert line.do(IN, sector, room=4096, direct=direct) == Answer(OK, 4097, sectors(sector, 8))
        assert line.do(OUT, sector, data, direct=direct) == Answer(OK, 1, b"")
        assert line.do(IN, sector, room=4096, direct=direct) == Answer(OK, 4097, data)
        assert line.do(FLUSH, direct=direct) == Answer(OK, 1, b"")
        assert line.do(GET_ID, room=20, direct=direct) == Answer(OK, 21, SERIAL.encode().ljust(20, b"\0"))
        assert line.do(DISCARD, data=segment, direct=direct) == Answer(OK, 1, b"")
        assert line.do(IN, sector + 8, room=4096, direct=direct) == Answer(OK, 4097, bytes(4096))
        assert line.do(WRITE_ZEROES, data=segment, direct=direct) == Answer(OK, 1, b"")
        assert line.do(SCSI_CMD, room=512, direct=direct) == Answer(UNSUPP, 0, nothing * 512)
        assert line.do(IN, CAPACITY, room=512, direct=direct) == Answer(IOERR, 0, nothing * 512)
        disk[sector * 512 : sector * 512 + 8192] = data + bytes(4096)
    assert rig.content() == disk


def test_many_laps(make_rig: RigFactory, combination: Combination) -> None:
    """Chains of all lengths across the ring's end, single and several ones, from any place in any lap."""
    randomness = random.Random(1)
    line = make_rig().line()
    for size in (2, 4, 8, 64) if combination["ring_class"] is Ring else (2, 3, 4, 7, 33):
        line.rig.guest.free = 0
        line.start(size=size, base=combination["ring_class"].any_base(size, randomness), **combination)
        for _ in range(6 * size):
            places = randomness.sample(range(CAPACITY), max(1, size // 18))
            requests = [read(line, sector, randomness) for sector in places]
            line.kick()
            line.wait()
            for request, sector in zip(requests, places, strict=True):
                assert_read(line, request, sector)
        assert line.stop() == line.ring.base


@pytest.mark.parametrize("slots", [4, 64])
def test_a_full_ring(make_rig: RigFactory, combination: Combination, slots: int) -> None:
    """As many chains as fit into the ring, which are more than there are slots."""
    line = make_rig(slots=slots).line().start(size=32, **combination)
    randomness, requests = random.Random(2), []
    for _ in range(3):
        while line.ring.has_room(9):
            requests.append(read(line, len(requests) % 64, randomness))
        while line.ring.has_room(2):
            requests.append(line.put(IN, len(requests) % 64, room=512, writable=[513]))
        line.kick()
        line.wait()
    for number, request in enumerate(requests):
        assert_read(line, request, number % 64)


def test_queues_share_four_slots(make_rig: RigFactory, combination: Combination) -> None:
    """On a ring in order, requests that are done but wait for their turn keep their slots."""
    rig = make_rig(slots=4)
    lines = [rig.line().start(size=128, **combination) for _ in range(2)]
    reads = [[line.put(FLUSH if n % 5 == 0 else IN, n, room=512) for n in range(1, 41)] for line in lines]
    for line in lines:
        line.kick()
    for line, requests in zip(lines, reads, strict=True):
        line.wait()
        for number, request in enumerate(requests, 1):
            if number % 5:
                assert_read(line, request, number)
            else:
                assert line.answer(request).status == OK


# Any load agrees with the model.


@pytest.mark.parametrize(
    ("engine", "direct", "slots"),
    [
        pytest.param("aio", False, 64, id="aio"),
        pytest.param("aio", True, 5, id="aio-direct-few-slots"),
        pytest.param("io_uring", False, 5, id="io_uring-few-slots"),
        pytest.param("io_uring", True, 64, id="io_uring-direct"),
        pytest.param("memory", False, 64, id="memory"),
    ],
)
def test_any_load_agrees_with_the_model(
    make_rig: RigFactory, combination: Combination, engine: str, direct: bool, slots: int
) -> None:
    """Three queues on two workers; a missing kick or call would be a hang."""
    options = {"engine": engine, "slots": slots, "workers": 2, "guest_size": 16 << 20}
    rig = direct_rig(make_rig, **options) if direct else make_rig(**options)
    lines = [rig.line(number % 2) for number in range(3)]

    @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 2**32))
    def run(seed: int) -> None:
        Workload(rig, lines, combination, seed).run()

    run()


# Order.


def slow_first(line: Line, first: str) -> tuple[Pending, Answer]:
    """Put a request that is not done when its fetch returns."""
    if first == "flush":
        return line.put(FLUSH), Answer(OK, 1, b"")
    if first == "discard":
        return line.put(DISCARD, data=struct.pack("<QII", CAPACITY - 8, 8, 0)), Answer(OK, 1, b"")
    # Unaligned: with O_DIRECT it passes through a bounce buffer several times.
    size = 3 * BOUNCE_SIZE - 512
    return line.put(IN, 0, room=size, alignment=1), Answer(OK, size + 1, DISK[:size])


def quick_ones(line: Line) -> list[tuple[Pending, Answer]]:
    """Put requests that are done when their fetch returns."""
    nothing = bytes([NO_ANSWER])
    return [
        (line.put(SCSI_CMD), Answer(UNSUPP, 1, b"")),
        (line.put(IN, CAPACITY, room=512), Answer(IOERR, 0, nothing * 512)),
        (line.put(GET_ID, room=20), Answer(OK, 21, SERIAL.encode().ljust(20, b"\0"))),
    ]


def slow_kinds(engine: str) -> list[str]:
    """An image in memory has nothing to flush."""
    return ["flush"] * (engine != "memory") + ["discard", "large"]


def put_slow_and_quick(line: Line, first: str) -> list[tuple[Pending, Answer]]:
    """Have a held worker fetch them without submitting. (Repeated calls also cross the ring's end.)"""
    requests = [slow_first(line, first), *quick_ones(line)]
    line.kick()
    fetch_only(line.worker)
    return requests


@ENGINES
def test_completions_are_in_order_only_if_that_was_negotiated(
    make_rig: RigFactory, combination: Combination, engine: str
) -> None:
    """Without it they come as they are done: no request waits for an earlier one."""
    line = make_rig(engine=engine, direct=True).line().start(size=16, features=RANGES, **combination)
    for first in slow_kinds(engine) * 2:
        with held(line.worker):
            slow, *quick = put_slow_and_quick(line, first)
            in_flight = line.worker.call(lambda: line.queue.in_flight)
        answered = line.wait()
        assert in_flight.result() == (4 if combination["in_order"] else 1)
        expected = [slow, *quick] if combination["in_order"] else [*quick, slow]
        assert answered == [pending for pending, _ in expected]
        assert [line.answer(pending) for pending, _ in expected] == [answer for _, answer in expected]


@ENGINES
def test_a_drain_completes_requests_behind_a_slow_one(
    make_rig: RigFactory, combination: Combination, engine: str
) -> None:
    line = make_rig(engine=engine, direct=True).line().start(size=16, features=RANGES, **combination)
    for first in slow_kinds(engine) * 2:
        with held(line.worker):
            requests = put_slow_and_quick(line, first)
            drained = line.worker.stop_queue(line.queue)
            early = line.worker.call(drained.done)
        drained.result(PATIENCE)
        assert not early.result()
        assert line.queue.in_flight == 0
        assert len(line.ring.collect()) == len(requests)
        assert [line.answer(pending) for pending, _ in requests] == [answer for _, answer in requests]
        assert line.queue.base == line.ring.base
        line.resume(base=line.queue.base)
        assert line.do(IN, 3, room=512) == Answer(OK, 513, sectors(3))


def test_a_broken_ring_completes_earlier_requests(make_rig: RigFactory, combination: Combination) -> None:
    line = make_rig().line().start(size=16, **combination)
    with held(line.worker):
        requests = put_slow_and_quick(line, "flush")
        line.ring.put_bad_head()
        line.ring.publish()
        fetch_only(line.worker)
    wait_for_event(line.queue.err_fd, "the error")
    line.stop()
    assert len(line.ring.collect()) == len(requests)
    assert [line.answer(pending) for pending, _ in requests] == [answer for _, answer in requests]


def test_memory_is_replaced_under_completions_that_wait_for_their_turn(make_rig: RigFactory) -> None:
    line = make_rig().line().start(size=16, in_order=True)
    with held(line.worker):
        requests = put_slow_and_quick(line, "flush")
        line.worker.set_memory(line.queue, line.rig.guest.table())
        retired = line.worker.call(lambda: len(line.worker.rings.retired.tables))
    line.wait()
    assert retired.result() == 1
    assert [line.answer(pending) for pending, _ in requests] == [answer for _, answer in requests]
    assert eventually(lambda: not line.worker.rings.retired.tables)


# Stopping and resuming.


def test_stopping_and_resuming_at_every_place(make_rig: RigFactory, combination: Combination) -> None:
    randomness = random.Random(3)
    line = make_rig().line()
    for size in (4, 8) if combination["ring_class"] is Ring else (4, 5):
        line.start(size=size, base=combination["ring_class"].any_base(size, randomness), **combination)
        for number in range(4 * size):
            request = read(line, number, randomness)
            line.kick()
            line.wait()
            assert_read(line, request, number)
            base = line.stop()
            assert base == line.ring.base
            line.resume(base=base)
        line.stop()


def test_stop_waits_for_all_requests_in_flight(line: Line) -> None:
    with held(line.worker):
        reads = [line.put(IN, number, room=512, writable=[513]) for number in range(8)]
        line.kick()
        fetch_only(line.worker)
        in_flight = line.worker.call(lambda: line.queue.in_flight)
        drained = line.worker.stop_queue(line.queue)
        early = line.worker.call(drained.done)
    drained.result(PATIENCE)
    assert in_flight.result() == 8
    assert not early.result()
    assert line.queue.in_flight == 0
    assert len(line.ring.collect()) == 8
    assert line.queue.base == line.ring.base
    for number, request in enumerate(reads):
        assert_read(line, request, number)


def test_unfetched_requests_are_served_after_a_restart(make_rig: RigFactory, combination: Combination) -> None:
    """A stop in the middle of the available chains: the base is the next one that the device would fetch."""
    line = make_rig(slots=3).line().start(size=16, **combination)
    for number in range(6):
        line.do(IN, number, room=512)
    with held(line.worker):
        reads = [line.put(IN, number, room=512, writable=[513]) for number in range(8)]
        line.kick()
        fetch_only(line.worker)
        drained = line.worker.stop_queue(line.queue)
    drained.result(PATIENCE)
    assert len(line.ring.collect()) == 3
    line.resume(base=line.queue.base)
    line.wait()
    for number, request in enumerate(reads):
        assert_read(line, request, number)
    assert line.stop() == line.ring.base


def test_a_stopped_ring_is_not_touched_and_resumes_without_a_kick(line: Line) -> None:
    line.do(IN, room=512)
    base = line.stop()
    request = line.put(IN, 5, room=512)
    line.kick()
    line.rig.line().start().do(IN, room=512)
    assert not line.ring.collect()
    # Kick at the start: requests may be in the ring before it is served.
    assert take_events(line.kick_fd) == 1
    line.resume(base=base)
    line.wait()
    assert_read(line, request, 5)


# Calls.


def test_no_calls_if_the_driver_suppresses_them(line: Line) -> None:
    line.ring.disable_notifications()
    for number in range(5):
        line.put(IN, number, room=512)
        line.kick()
        line.finish_without_a_call()
        assert not has_event(line.call_fd)
    # Now there is one, because the driver waits for it.
    assert line.do(IN, room=512).status == OK


@pytest.mark.parametrize("several", [1, FIRST_TURN], ids=["one", "a turn"])
def test_a_driver_that_wants_calls_is_called_once_per_turn(line: Line, several: int) -> None:
    for _ in range(20):
        line.ring.enable_notifications()
        with held(line.worker):
            for _ in range(several):
                line.put(SCSI_CMD)
            line.kick()
        line.finish_without_a_call()
        assert take_events(line.call_fd) == 1


@pytest.mark.parametrize("at_once", [False, True], ids=["one-by-one", "at-once"])
def test_with_event_idx_only_the_requested_completion_is_called(
    make_rig: RigFactory, combination: Combination, at_once: bool
) -> None:
    """This holds over many laps; a driver without the feature is called for each completion."""
    randomness = random.Random(4)
    line = make_rig().line()
    for size in (16, 32) if combination["ring_class"] is Ring else (30, 33):
        line.start(size=size, base=combination["ring_class"].any_base(size, randomness), **combination)
        for _ in range(40):
            wanted = randomness.randrange(6)
            requests = [framings(6, combination["indirect"], randomness) for _ in range(randomness.randrange(1, 5))]
            lengths = [chain_length(**framing) for framing in requests]  # type: ignore[arg-type]
            if combination["event_idx"]:
                line.ring.set_used_event(line.ring.place_behind(lengths[:wanted] + [1] * (wanted - len(requests))))
            else:
                line.ring.enable_notifications()
            calls = [calls_for(line, batch) for batch in ([requests] if at_once else [[one] for one in requests])]
            if not combination["event_idx"]:
                assert all(calls)
            elif at_once:
                assert calls == [wanted < len(requests)]
            else:
                assert calls == [number == wanted for number in range(len(requests))]
        line.stop()


def chain_length(writable: list[int], direct: int | None) -> int:
    """The number of the chain's descriptors in the ring."""
    return 1 + len(writable) if direct is None else direct + 1


def calls_for(line: Line, framings: Sequence[dict[str, object]]) -> int:
    """How often the driver is called for these reads, which are submitted together."""
    with held(line.worker):
        for framing in framings:
            line.put(IN, room=512, **framing)  # type: ignore[arg-type]
        line.kick()
    line.finish_without_a_call()
    return take_events(line.call_fd)


# Kicks.


def test_kicks_are_off_while_the_worker_is_awake_and_on_before_it_sleeps(line: Line) -> None:
    for number in range(20):
        assert eventually(line.ring.asks_for_kick)
        with held(line.worker):
            requests = [line.put(IN, number, room=512)]
            line.kick()
            fetch_only(line.worker)
            asked = line.worker.call(line.ring.asks_for_kick)
            # It comes while the worker is awake, so it needs no kick.
            line.worker.call(lambda number=number, requests=requests: requests.append(line.put(IN, number, room=512)))
            kick = line.worker.call(line.ring.publish)
        assert not asked.result()
        assert not kick.result()
        line.wait()
        for request in requests:
            assert_read(line, request, number)


def test_a_worker_that_never_sleeps_needs_no_kick(make_rig: RigFactory, combination: Combination) -> None:
    line = make_rig(poll_us=None).line().start(size=16, **combination)
    assert line.do(IN, room=512).status == OK
    for number in range(20):
        request = line.put(IN, number, room=512)
        assert not line.ring.publish()
        line.wait()
        assert_read(line, request, number)


@pytest.mark.parametrize("poll_us", [0, 50])
def test_a_driver_that_kicks_only_if_requested_is_served(
    make_rig: RigFactory, combination: Combination, poll_us: int
) -> None:
    """At once, while the worker is about to sleep, and while it sleeps."""
    line = make_rig(poll_us=poll_us).line().start(size=16, **combination)
    randomness = random.Random(5)
    for number in range(60):
        requests = [read(line, number, randomness)]
        line.notify()
        if line.ring.has_room(9):
            requests.append(read(line, number, randomness))
            line.notify()
        line.wait()
        for request in requests:
            assert_read(line, request, number)
        if number % 3 == 0:
            assert eventually(line.ring.asks_for_kick)


# Rings that drivers break.

NOWHERE = 0xDEAD_0000_0000
HEADER, STATUS = Piece(0x1000, 16, False).descriptor, Piece(0x2000, 1, True).descriptor
TABLE = GUEST_BASE + 0x3000

# Descriptors of a chain (address, length, flags; NEXT if another one follows), and the rule that it breaks.
CHAINS = [
    # All descriptors of the ring, with a loop from the last one to the first.
    ([HEADER] * 15 + [(HEADER[0], 16, NEXT)], ring_rules.LOOP),
    ([(NOWHERE, 16, 0), STATUS], ring_rules.ADDRESS),
    ([HEADER, (NOWHERE, 1, WRITE)], ring_rules.ADDRESS),
    ([HEADER, (TABLE, 0, 0), STATUS], ring_rules.ZERO_LENGTH),
    ([HEADER, STATUS, HEADER], ring_rules.ORDER),
    ([(TABLE, 15, 0), STATUS], ring_rules.NO_HEADER),
    ([HEADER], ring_rules.NO_STATUS),
]
TABLES = [
    ([(TABLE, 0, INDIRECT)], ring_rules.INDIRECT_LENGTH),
    ([(TABLE, 17, INDIRECT)], ring_rules.INDIRECT_LENGTH),
    ([(TABLE, 16, INDIRECT), STATUS], ring_rules.INDIRECT_NEXT),
    ([(NOWHERE, 16, INDIRECT)], ring_rules.INDIRECT_ADDRESS),
    # The table refers to another table.
    ([HEADER, (TABLE, 16, INDIRECT)], ring_rules.INDIRECT_NESTED),
]


def assert_breaks(line: Line, other: Line, rule: int, caplog: pytest.LogCaptureFixture) -> None:
    """Check that this breaks the ring with an error event and a log line, not another queue, until a reset."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        line.kick()
        wait_for_event(line.queue.err_fd, "the error")
    assert not line.queue.record["running"]
    assert int(line.queue.record["broken"]) == rule
    assert f"{line.queue.name}: ring broken by the driver: {ring_rules.MESSAGES[rule]}" in caplog.text
    if line.ring.has_room(3):
        # Nothing that the driver does changes that.
        line.put(IN, room=512)
        line.kick()
    assert other.do(IN, 3, room=512) == Answer(OK, 513, sectors(3))
    assert not list(line.ring.take_used())
    line.stop()
    options = {name: getattr(line.ring, name) for name in ("event_idx", "indirect", "in_order")}
    line.start(ring_class=type(line.ring), size=16, **options)
    assert line.do(IN, 4, room=512) == Answer(OK, 513, sectors(4))
    assert not has_event(line.queue.err_fd)


def two_lines(make_rig: RigFactory, combination: Combination) -> list[Line]:
    """Two used lines of one worker. At TABLE is an indirect table that refers to another one, in both formats."""
    rig = make_rig()
    rig.guest.free = 0x4000
    rig.guest.write(TABLE - GUEST_BASE, struct.pack("<QIHH", TABLE, 16, INDIRECT, INDIRECT))
    lines = [rig.line().start(size=16, **combination) for _ in range(2)]
    for line in lines:
        assert line.do(IN, room=512).status == OK
    return lines


def test_a_bad_chain_breaks_its_ring_and_no_other(
    make_rig: RigFactory, combination: Combination, caplog: pytest.LogCaptureFixture
) -> None:
    line, other = two_lines(make_rig, combination)
    for chain, rule in CHAINS + (TABLES if combination["indirect"] else []):
        line.ring.put_available(line.ring.add_chain(chain).head)
        assert_breaks(line, other, rule, caplog)


@pytest.mark.parametrize("combination", WITHOUT_INDIRECT)
@pytest.mark.parametrize("direct", [0, 1])
def test_an_indirect_table_without_the_feature(
    make_rig: RigFactory, combination: Combination, caplog: pytest.LogCaptureFixture, direct: int
) -> None:
    line, other = two_lines(make_rig, combination)
    line.put(IN, room=512, direct=direct)
    assert_breaks(line, other, ring_rules.INDIRECT_NOT_NEGOTIATED, caplog)


def test_a_head_outside_the_ring(
    make_rig: RigFactory, combination: Combination, caplog: pytest.LogCaptureFixture
) -> None:
    line, other = two_lines(make_rig, combination)
    line.ring.put_bad_head()
    assert_breaks(line, other, ring_rules.HEAD_RANGE, caplog)
    assert "(chain 16)" in caplog.text or line.ring.layout().packed


def test_requests_before_a_bad_chain_are_served_and_later_ones_are_not(
    make_rig: RigFactory, combination: Combination, caplog: pytest.LogCaptureFixture
) -> None:
    line, other = two_lines(make_rig, combination)
    good = line.put(IN, 5, room=512)
    line.ring.put_available(line.ring.add_chain([(NOWHERE, 16, 0), STATUS]).head)
    line.put(IN, 6, room=512)
    line.kick()
    wait_for_event(line.queue.err_fd, "the error")
    assert other.do(IN, 3, room=512) == Answer(OK, 513, sectors(3))
    line.turn_is_over()
    line.stop()
    assert line.ring.collect() == [good]
    assert_read(line, good, 5)


@pytest.mark.parametrize("combination", WITH_INDIRECT)
def test_more_chains_in_flight_than_descriptors(
    make_rig: RigFactory, combination: Combination, caplog: pytest.LogCaptureFixture
) -> None:
    """A chain of a full ring is made available again while it is in flight."""
    line = make_rig().line().start(size=2, **combination)
    with held(line.worker):
        requests = [line.put(IN, number, room=512, direct=0) for number in range(2)]
        line.ring.publish()
        fetch_only(line.worker)
        line.ring.put_available(requests[0].head)
        # Published when the first two have been fetched.
        line.worker.call(line.ring.publish)
        fetch_only(line.worker)
    line.kick()
    wait_for_event(line.queue.err_fd, "the error")
    assert ring_rules.MESSAGES[ring_rules.TOO_MANY_IN_FLIGHT] in caplog.text
    line.stop()
    assert len(line.ring.collect()) == 2


def test_the_same_chain_twice_in_flight_completes_twice(line: Line) -> None:
    with held(line.worker):
        request = line.put(IN, 3, room=512)
        line.ring.put_available(request.head)
        line.kick()
        fetch_only(line.worker)
        in_flight = line.worker.call(lambda: line.queue.in_flight)
    line.stop()
    assert in_flight.result() == 2
    assert list(line.ring.take_used()) == [(request.head, 513)] * 2
    assert line.rig.guest.read(request.writable[0].offset, 512) == sectors(3)
