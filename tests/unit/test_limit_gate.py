"""Limits in the loop: what is left in the ring, what is counted, who is served meanwhile, and what ends the wait.

The tests control how full buckets are, not the clock: a bucket of a later time is over its limit until then.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringplane.compiler.jit import compiled
from ringplane.dataplane.limit_gate import GATE, LONGEST_HOLD, SHORTEST_HOLD, merge
from ringplane.dataplane.limit_gate import hold as hold_in_heap
from ringplane.dataplane.loop import ENGINE_TURNS, POLL_SLICE_NS, poll
from ringplane.dataplane.state import ALWAYS, POLL, QUEUE, WORKER
from ringplane.engines.choose_engine import make_engine
from ringplane.engines.common import ENGINE
from ringplane.guest_memory.regions import MemoryTable
from ringplane.limits.limiter import Limiter
from ringplane.limits.member import Member
from ringplane.limits.meters import TICKS
from ringplane.limits.shares import LIMITS
from ringplane.native.access import view
from ringplane.native.structs import new
from ringplane.options.limit_options import rates_of

from .on_structs import on_structs
from .packed_ring import PackedRing
from .rig import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    OK,
    OUT,
    PATIENCE,
    Line,
    Pending,
    RigFactory,
    Ring,
    eventually,
    pattern,
    rig_factory,
)
from .rig import held as worker_held
from .test_polling import give_only
from .test_ranges import segment

SIZE = 1 << 20
DISK = pattern(SIZE)
SECOND, HOUR = 10**9, 3600 * 10**9


@pytest.fixture(params=["aio", "io_uring", "memory"])
def make_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RigFactory]:
    with rig_factory(tmp_path, DISK, engine=request.param) as factory:
        yield factory


def limiter(*members: Member, later: int = 0, **limits: int) -> Limiter:
    """Whose buckets are empty in `later` nanoseconds."""
    keys = {name.replace("_", "-"): value for name, value in limits.items()}
    return Limiter(rates_of(keys), members, now=time.monotonic_ns() + later)


def limit(line: Line, member: Member, limits: Limiter | None) -> None:
    line.queue.make_gate(member)
    line.worker.limit([line.queue], limits).result(PATIENCE)


def held(line: Line) -> bool:
    """Whether the queue is held, and nothing of it is in flight."""
    found: list[bool] = []
    record = line.queue.record
    line.worker.call(
        lambda: found.append(bool(line.worker.state.record["held"]) and record["ready"] and not record["in_flight"])
    ).result(PATIENCE)
    return found[0]


def limit_more(line: Line, member: Member) -> None:
    """Give it other limits, which do not let it begin either."""
    limit(line, member, limiter(member, later=HOUR, total_iops_sec=2))


def hold(line: Line, member: Member, **limits: int) -> None:
    """Have the next request of this line wait for an hour: the first read passes, because its type is not known."""
    limit(line, member, limiter(member, later=HOUR, **limits))
    assert line.do(IN, 0, room=512).status == OK


@pytest.mark.parametrize("ring_class", [Ring, PackedRing])
def test_what_is_over_the_limit_stays_in_the_ring(make_rig: RigFactory, ring_class: type[Any]) -> None:
    line = make_rig().line().start(ring_class=ring_class)
    member = Member()
    hold(line, member, total_iops_sec=10)
    fetched = line.queue.base
    line.put(IN, 1, room=512)
    line.kick()
    line.turn_is_over()
    assert eventually(lambda: held(line))
    assert (line.queue.base, line.queue.in_flight) == (fetched, 0)
    assert not line.ring.asks_for_kick()
    limit(line, member, limiter(member, total_iops_sec=10))
    assert len(line.wait()) == 1


def test_a_limit_that_is_removed_ends_the_wait(make_rig: RigFactory) -> None:
    line = make_rig().line().start()
    member = Member()
    hold(line, member, read_bytes_sec=1)
    pending = line.put(IN, 1, room=512)
    line.kick()
    limit(line, member, None)
    line.wait()
    assert line.answer(pending).data == DISK[512:1024]


def test_others_on_the_thread_are_served_meanwhile(make_rig: RigFactory) -> None:
    rig = make_rig()
    limited, free = rig.line().start(), rig.line().start()
    hold(limited, Member(), total_iops_sec=1)
    limited.put(IN, 1, room=512)
    limited.kick()
    for sector in range(100):
        assert free.do(IN, sector, room=512).data == DISK[512 * sector :][:512]
    assert len(limited.ring.pending) == 1


def test_a_ring_stops_while_it_is_held(make_rig: RigFactory) -> None:
    """And resumes with what was left in it."""
    line = make_rig().line().start()
    member = Member()
    hold(line, member, total_iops_sec=1)
    pending = [line.put(IN, number, room=512) for number in range(5)]
    line.kick()
    assert eventually(lambda: held(line))
    base = line.stop()
    assert len(line.ring.pending) == 5
    limit(line, member, None)
    line.resume(base=base)
    line.wait()
    assert [line.answer(each).data for each in pending] == [DISK[512 * n : 512 * n + 512] for n in range(5)]


# What ends a hold before its time.
ENDS: dict[str, Callable[[Line, Member], object]] = {
    "it stops": lambda line, member: line.stop(),
    "its memory is removed": lambda line, member: line.worker.set_memory(line.queue, MemoryTable()).result(PATIENCE),
    "other limits": limit_more,
    "another ring starts": lambda line, member: line.rig.line().start(),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_time_until_a_hold_is_ended_counts(make_rig: RigFactory, end: str) -> None:
    line = make_rig().line().start()
    member = Member()
    hold(line, member, total_iops_sec=1)
    line.put(IN, 1, room=512)
    line.kick()
    assert eventually(lambda: held(line))
    before = member.throttled_ns
    ENDS[end](line, member)
    assert member.throttled_ns > before


def test_writes_are_not_held_because_of_reads(make_rig: RigFactory) -> None:
    rig = make_rig()
    reading, writing = rig.line().start(), rig.line().start()
    member = Member()
    limits = limiter(member, later=HOUR, read_iops_sec=1)
    for line in (reading, writing):
        limit(line, member, limits)
    assert reading.do(IN, 0, room=512).status == OK
    for sector in range(20):
        assert writing.do(OUT, sector, bytes(512)).status == OK
    assert eventually(lambda: held(reading))


def test_flushes_and_identification_are_not_limited(make_rig: RigFactory) -> None:
    line = make_rig().line().start()
    limit(line, (member := Member()), limiter(member, later=HOUR, total_iops_sec=1, total_bytes_sec=1))
    for _ in range(10):
        assert line.do(FLUSH).status == OK
        assert line.do(GET_ID, room=20).status == OK


REQUESTS: dict[str, tuple[tuple[Any, ...], int, int]] = {
    # What is put into the ring; how many bytes and requests are counted, of 4096 bytes each.
    "read": ((IN, 0, b"", 512), 512, 4096),
    "large read": ((IN, 0, b"", 6144), 6144, 6144),
    "write": ((OUT, 0, bytes(8192)), 8192, 8192),
    "discard": ((DISCARD, 0, segment(0, 64) + segment(128, 8)), 72 * 512, 72 * 512),
    "flush": ((FLUSH,), 0, 0),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_what_a_request_costs(make_rig: RigFactory, name: str) -> None:
    """1.5 requests for 6144 bytes, if 4096 are one."""
    request, size, counted = REQUESTS[name]
    line = make_rig().line().start(features=1 << 13)
    rates = {"total_bytes_sec": 1000, "total_iops_sec": 1000, "size_iops_sec": 4096}
    bursts = {"total_bytes_sec_max": 10**9, "total_iops_sec_max": 10**9}
    limits = limiter(member := Member(), later=HOUR, **rates, **bursts)
    before = [level.empty_at for level in limits.levels.values()]
    limit(line, member, limits)
    assert line.do(*request).status == OK
    after = [level.empty_at for level in limits.levels.values()]
    of_bytes, of_requests = (now - then for now, then in zip(after, before, strict=True))
    assert of_bytes == pytest.approx(size * TICKS * SECOND / 1000, rel=1e-6)
    assert of_requests == pytest.approx(counted * TICKS * SECOND / 4096 / 1000, rel=1e-6)


def test_the_limit_holds(make_rig: RigFactory) -> None:
    """Without an upper bound: a slow machine may take any time. A tenth of a second passes at once."""
    line = make_rig().line().start()
    limit(line, (member := Member()), limiter(member, total_iops_sec=200))
    start = time.monotonic_ns()
    for number in range(40):
        line.put(IN, number, room=512)
    line.kick()
    assert len(line.wait()) == 40
    assert time.monotonic_ns() - start >= (40 - 21) * SECOND // 200
    assert member.throttled > 0


@pytest.mark.parametrize("workers", [1, 2])
def test_queues_of_a_disk_take_turns(make_rig: RigFactory, workers: int) -> None:
    """Those on one thread: the one that was served first of all comes next.

    They are kicked while the threads stand still, so that none begins earlier. A thread that is late finds room for
    more than one request at a time, and a queue may begin 2 in its first turn, 4 in its next one, and then the rest.
    """
    rig = make_rig(workers=workers)
    lines = [rig.line(number % workers).start() for number in range(3 * workers)]
    limits = limiter(member := Member(), later=SECOND // 10, total_iops_sec=300)
    for line in lines:
        limit(line, member, limits)
        for number in range(12):
            line.put(IN, number, room=512)
    with contextlib.ExitStack() as standing_still:
        for worker in rig.workers:
            standing_still.enter_context(worker_held(worker))
        for line in lines:
            line.kick()
    done = dict.fromkeys(range(len(lines)), 0)

    def first_is_done() -> bool:
        for number, line in enumerate(lines):
            done[number] += len(line.ring.collect())
        return max(done.values()) == 12

    assert eventually(first_is_done)
    first = max(done, key=done.__getitem__)
    # Others were counted before it, perhaps long before.
    first_is_done()
    assert min(count for number, count in done.items() if number % workers == first % workers) >= 4
    for line in lines:
        line.wait()


@pytest.mark.parametrize("more", [0, 1])
def test_a_disk_waits_in_its_group_if_there_is_more_in_its_ring(make_rig: RigFactory, more: int) -> None:
    """When it is held after a request, and not only when it has asked in vain: the others would pass it meanwhile."""
    line = make_rig().line().start()
    limit(line, (member := Member()), limiter(member, later=HOUR, total_iops_sec=1))
    pending = [line.put(IN, number, room=512) for number in range(1 + more)]
    line.kick()
    done: list[Pending] = []
    assert eventually(lambda: done.extend(line.ring.collect()) or pending[0] in done)
    line.turn_is_over()
    assert (int(member._record["waits_until"][0]) > time.monotonic_ns() * TICKS) == bool(more)


def test_a_disk_waits_in_its_group_while_one_of_its_queues_does(make_rig: RigFactory) -> None:
    """Whatever another one has begun meanwhile."""
    rig = make_rig()
    waiting, other = rig.line().start(), rig.line().start()
    member = Member()
    limits = limiter(member, Member(), later=HOUR, total_iops_sec=1)
    for line in (waiting, other):
        limit(line, member, limits)
    for number in range(2):
        waiting.put(IN, number, room=512)
    waiting.kick()
    assert eventually(lambda: held(waiting))
    assert other.do(IN, 0, room=512).status == OK
    other.turn_is_over()
    assert int(member._record["waits_until"][0]) > time.monotonic_ns() * TICKS


class Gates:
    """Of queues of a worker that have the same limits. Times are in nanoseconds."""

    def __init__(self, count: int) -> None:
        self._records = [new(layout) for layout in (WORKER, QUEUE, LIMITS)]
        self._gates = new(GATE, count)
        self._gates["limits"] = self._records[2].ctypes.data

    def hold(self, number: int, now: int, until: int, served: int = 0) -> int:
        """Hold a queue that was served at this time; returns until when it is held."""
        worker, queue, gate = self._records[0][0], self._records[1][0], self._gates[number]
        worker["now"], gate["served"] = now, served
        on_structs(hold_in_heap)(worker, queue, gate, until)
        return int(gate["until"])

    def take(self) -> int:
        """The number of the first one, which is held no longer."""
        worker = self._records[0][0]
        number = (int(worker["held"]) - self._gates.ctypes.data) // GATE.itemsize
        gate = self._gates[number]
        worker["held"] = on_structs(merge)(int(gate["left"]), int(gate["right"]))
        return number


@pytest.mark.parametrize(("wait", "held"), [(1, SHORTEST_HOLD), (10**6, 10**6), (HOUR, LONGEST_HOLD)])
def test_how_long_a_queue_is_held(wait: int, held: int) -> None:
    """Not so short that each request needs a wake-up."""
    assert Gates(1).hold(0, SECOND, SECOND + wait) == SECOND + held


def test_queues_with_the_same_limits_are_released_together() -> None:
    """Otherwise the one that was held first, because it was served, would always be the first again."""
    gates = Gates(3)
    end = gates.hold(0, SECOND, SECOND + 1, served=SECOND)
    assert gates.hold(1, SECOND + 10_000, SECOND + 10_001, served=SECOND - 2) == end
    assert gates.hold(2, SECOND + 20_000, SECOND + 20_001, served=SECOND - 1) == end
    assert [gates.take() for _ in range(3)] == [1, 2, 0]
    assert gates.hold(0, end, end + 1) == end + SHORTEST_HOLD


TIMES = st.integers(0, 30)


@given(st.lists(st.one_of(st.none(), st.tuples(TIMES, TIMES)), max_size=100))
def test_the_first_of_the_held_queues_is_released_first(steps: list[tuple[int, int] | None]) -> None:
    """Held and released in any order: by time, and at the same time the one that was served longer ago."""
    gates, expected = Gates(len(steps)), list[tuple[int, int, int]]()
    for number, step in enumerate(steps):
        if step is not None:
            wait, served = step
            until = gates.hold(number, SECOND, SECOND + SHORTEST_HOLD + wait, served)
            expected.append((until, served, number))
        elif expected:
            first = min(expected)
            taken = gates.take()
            assert (taken, *first[:2]) in [(each[2], *each[:2]) for each in expected]
            expected = [each for each in expected if each[2] != taken]


@pytest.mark.parametrize("poll_us", [0, None])
def test_a_wait_ends_by_itself(make_rig: RigFactory, poll_us: int | None) -> None:
    """Whether the thread sleeps or polls; the disk that is held is the only one."""
    line = make_rig(poll_us=poll_us).line().start()
    limit(line, (member := Member()), limiter(member, later=SECOND // 5, total_iops_sec=100))
    for number in range(5):
        assert line.do(IN, number, room=512).data == DISK[512 * number :][:512]


def polled(line: Line) -> int:
    """For how many nanoseconds its thread has polled rings."""
    return int(line.worker.state.record["polled"])


def test_a_thread_does_not_poll_rings_that_are_held(make_rig: RigFactory) -> None:
    """It would use a CPU for nothing: what comes into them has to wait. A ring that is not held is polled."""
    rig = make_rig()
    give_only(rig.workers[0], POLL)
    limited, free = rig.line().start(), rig.line().start()
    hold(limited, Member(), total_iops_sec=1)
    limited.put(IN, 1, room=512)
    limited.kick()
    # It sleeps, or would after it has polled the other ring.
    record = rig.workers[0].state.record
    assert eventually(lambda: held(limited) and not record["quiet"] and not record["expects_kicks"])
    before = polled(limited)
    for _ in range(20):
        limited.turn_is_over()
    assert polled(limited) == before
    assert eventually(lambda: free.do(IN, 1, room=512).status == OK and polled(limited) > before)


@compiled
def poll_until(worker, engine, time):
    return poll(view(worker, WORKER), view(engine, ENGINE), time)


def test_polling_ends_when_a_hold_does() -> None:
    """Also that of a thread that never sleeps."""
    with contextlib.closing(make_engine("aio", 8)) as engine:
        worker = new(WORKER)
        worker["poll_ns"] = ALWAYS
        assert on_structs(poll_until)(worker.ctypes.data, engine.address, time.monotonic_ns())
        assert worker["polled"] == 0


def test_holds_do_not_make_polling_longer() -> None:
    """Otherwise a ring that was served once would be polled for ever beside short holds."""
    with contextlib.closing(make_engine("aio", 8)) as engine:
        worker = new(WORKER)
        worker["poll_ns"] = HOUR
        ends = set()
        for _ in range(3):
            assert on_structs(poll_until)(worker.ctypes.data, engine.address, time.monotonic_ns())
            ends.add(int(worker["poll_end"][0]))
        assert len(ends) == 1
        worker["poll_end"] = time.monotonic_ns()
        assert not on_structs(poll_until)(worker.ctypes.data, engine.address, time.monotonic_ns())
        assert worker["poll_end"] == 0


@pytest.mark.parametrize("asked", [True, False])
def test_holds_do_not_keep_the_engine_from_being_asked(asked: bool) -> None:
    """Some of its events, such as kicks, it does not indicate: it is asked as often as without holds."""
    with contextlib.closing(make_engine("aio", 8)) as engine:
        worker, now = new(WORKER), time.monotonic_ns()
        worker["poll_ns"], worker["ask_at"] = ALWAYS, now if asked else now + HOUR
        assert on_structs(poll_until)(worker.ctypes.data, engine.address, now)
        assert (worker["turns"] >= ENGINE_TURNS) == asked
        assert worker["ask_at"] >= now + POLL_SLICE_NS


@pytest.mark.parametrize("poll_us", [0, 50])
def test_a_wait_that_others_interrupt_ends_by_itself(make_rig: RigFactory, poll_us: int) -> None:
    """The thread has slept until the same time before."""
    rig = make_rig(poll_us=poll_us)
    limited, free = rig.line().start(), rig.line().start()
    limit(limited, (member := Member()), limiter(member, later=SECOND // 2, total_iops_sec=10))
    pending = [limited.put(IN, number, room=512) for number in range(2)]
    limited.kick()
    for sector in range(20):
        assert free.do(IN, sector, room=512).status == OK
    limited.wait()
    assert [limited.answer(each).data for each in pending] == [DISK[:512], DISK[512:1024]]


def test_a_driver_that_kicks_does_not_end_a_wait(make_rig: RigFactory) -> None:
    line = make_rig().line().start()
    hold(line, Member(), total_iops_sec=1)
    line.put(IN, 1, room=512)
    for _ in range(100):
        line.kick()
    line.turn_is_over()
    assert eventually(lambda: held(line))
    assert len(line.ring.pending) == 1


def test_a_request_without_data_is_counted(make_rig: RigFactory) -> None:
    """A driver cannot escape a limit of requests with such that fail."""
    line = make_rig().line().start()
    limits = limiter(member := Member(), total_iops_sec=10, total_iops_sec_max=10**6)
    level = limits.levels["total-iops-sec"]
    before = level.empty_at
    limit(line, member, limits)
    assert line.do(IN, SIZE, room=512).status != OK
    assert level.empty_at - before >= TICKS * SECOND // 10
