"""How a worker sleeps, polls and is woken: no kick and no call is lost, and an idle worker costs nothing."""

from __future__ import annotations

import os
import select
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ringplane.block.stack import Stack
from ringplane.compiler.jit import compiled
from ringplane.dataplane.loop import ENGINE_TURNS
from ringplane.dataplane.queue import Queue, RingLayout
from ringplane.dataplane.state import COALESCE, NEVER, POLL, SLEEP
from ringplane.dataplane.worker import SLOTS, Worker
from ringplane.driver.virtqueue import (
    QUEUE,
    SEGMENT,
    SEGMENT_SIZE,
    Ring,
    add,
    disable_notifications,
    enable_notifications,
    publish,
    take_used,
    used_count,
)
from ringplane.native.access import load8, relax, store8, view
from ringplane.native.epoll import EPOLL_EVENT
from ringplane.native.io_uring import IORING_ENTER_EXT_ARG
from ringplane.native.syscalls import epoll_wait, monotonic_ns, write
from ringplane.system.syscall_numbers import NUMBERS
from ringplane.virtio.features import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC

from .rig import (
    GUEST_BASE,
    IN,
    OK,
    PATIENCE,
    USER_BASE,
    Line,
    Rig,
    RigFactory,
    eventually,
    new_eventfd,
    rig_factory,
)

SIZE = 1 << 20
# The duration of each search for lost wake-ups: short in the test suite; minutes by hand find more.
HUNT_SECONDS = float(os.environ.get("RINGPLANE_HUNT_SECONDS", "0.3"))
# The compiled driver's timeout, in nanoseconds.
HANG = 5_000_000_000


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[RigFactory]:
    with rig_factory(tmp_path, bytes(SIZE)) as factory:
        yield lambda engine, **options: factory(engine=engine, **options)


KERNEL_ENGINES = pytest.mark.parametrize("engine", ["aio", "io_uring"])


# A driver that kicks and is called only on request. It is compiled, so that it is as fast as a guest, and its requests
# come while the worker's thread is awake, about to sleep, and asleep.

DRIVER = np.dtype(
    [
        (name, "<i8")
        for name in (
            "ring",  # ringplane.driver.virtqueue.QUEUE
            "segments",
            "header",
            "data",
            "status",  # one byte for each of `depth` requests
            "free",  # a stack of the numbers of free requests
            "free_count",
            "depth",
            "kick_fd",
            "epoll_fd",  # watches the call fd
            "event",
            "one",  # the address of the number 1
            "pause",  # at most so many nanoseconds between batches
            "sleeps",  # whether it waits for calls, or looks at the ring
            "random",
            "until",  # CLOCK_MONOTONIC
            "requests",
            "kicks",
            "calls",
            "errors",
            "hung",
        )
    ]
)


@compiled
def next_random(driver, below):
    # Lehmer's generator with the factor and modulus of C++'s minstd_rand.
    driver.random = driver.random * 48271 % 2147483647
    return driver.random * below >> 31


@compiled
def offer_batch(driver, ring):
    count = min(driver.free_count, 1 + next_random(driver, driver.depth))
    for _ in range(count):
        driver.free_count -= 1
        # From the bottom of the stack: the order does not matter, and they are put back on top.
        number = load8(driver.free + driver.free_count)
        store8(driver.status + number, 0xEE)
        view(driver.segments + 2 * SEGMENT_SIZE, SEGMENT).address = driver.status + number
        add(ring, driver.segments, 3, 0, number)
    driver.requests += count
    if publish(ring):
        driver.kicks += 1
        write(driver.kick_fd, driver.one, 8)


@compiled
def wait_for_used(driver, ring):
    """Returns False after a timeout."""
    end = monotonic_ns() + HANG
    while used_count(ring) == 0:
        if monotonic_ns() > end:
            return False
        if driver.sleeps:
            enable_notifications(ring)
            if used_count(ring) == 0:
                if epoll_wait(driver.epoll_fd, driver.event, 1, HANG // 1_000_000) == 0:
                    return False
                driver.calls += 1
            disable_notifications(ring)
        else:
            relax()
    return True


@compiled
def take_all(driver, ring):
    while used_count(ring):
        number, _ = take_used(ring)
        if load8(driver.status + number) != 0:
            driver.errors += 1
        store8(driver.free + driver.free_count, number)
        driver.free_count += 1


@compiled
def drive(address):
    driver = view(address, DRIVER)
    ring = view(driver.ring, QUEUE)
    while monotonic_ns() < driver.until:
        offer_batch(driver, ring)
        # Sometimes one batch after the other without waiting, mostly until nothing is in flight.
        patient = next_random(driver, 4) > 0
        while driver.free_count < driver.depth and (patient or driver.free_count == 0):
            if not wait_for_used(driver, ring):
                driver.hung = 1
                return
            take_all(driver, ring)
        if driver.pause:
            end = monotonic_ns() + next_random(driver, driver.pause)
            while monotonic_ns() < end:
                relax()
    while driver.free_count < driver.depth:
        if not wait_for_used(driver, ring):
            driver.hung = 1
            return
        take_all(driver, ring)


class Drive:
    """A queue with a compiled driver in a separate thread."""

    def __init__(
        self,
        rig: Rig,
        worker: Worker,
        seed: int,
        *,
        event_idx: bool,
        sleeps: bool,
        depth: int = 8,
        pause_us: int = 200,
        base: int = 65000,
    ) -> None:
        guest, size = rig.guest, 32
        self.worker, self.depth = worker, depth
        self.queue = Queue(rig.device, len(rig.device.started), Stack(rig.source.part(SLOTS)))
        self.kick_fd, self.call_fd = new_eventfd(), new_eventfd()
        self.epoll = select.epoll()
        self.epoll.register(self.call_fd, select.EPOLLIN | select.EPOLLET)
        start = guest.address + guest.allocate(Ring.bytes_needed(size) + 64, 64)
        self.ring = Ring(guest.address - GUEST_BASE, start, size, event_idx)
        self.ring.reset(base)
        # Private memory, as in real drivers.
        self.segments = np.zeros(3, SEGMENT)
        self.free = np.arange(depth, dtype=np.uint8)
        self.event = np.zeros(1, EPOLL_EVENT)
        self.one = np.ones(1, np.int64)
        header, data, status = (guest.address + guest.allocate(size, 64) for size in (16, 512, 64))
        store32_in_python(header, IN)
        self.segments[0], self.segments[1], self.segments[2] = (header, 16, 0), (data, 512, 1), (status, 1, 1)
        self._record: npt.NDArray[np.void] = np.zeros(1, DRIVER)
        self.record = self._record[0]
        for name, value in {
            "ring": self.ring.address,
            "segments": self.segments.ctypes.data,
            "status": status,
            "free": self.free.ctypes.data,
            "free_count": depth,
            "depth": depth,
            "kick_fd": self.kick_fd,
            "epoll_fd": self.epoll.fileno(),
            "event": self.event.ctypes.data,
            "one": self.one.ctypes.data,
            "pause": 1000 * pause_us,
            "sleeps": sleeps,
            "random": seed + 1,
        }.items():
            self.record[name] = value
        layout = RingLayout(
            size,
            *(place - guest.address + USER_BASE for place in (self.ring.desc, self.ring.avail, self.ring.used)),
            base,
            event_idx * VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC,
            False,
        )
        worker.set_call_fd(self.queue, self.call_fd).result(PATIENCE)
        worker.start_queue(self.queue, layout, guest.table(), self.kick_fd).result(PATIENCE)
        self.thread = threading.Thread(target=lambda: drive(int(self._record.ctypes.data)), daemon=True)

    def start(self, seconds: float) -> None:
        self.record["until"] = time.monotonic_ns() + int(seconds * 1e9)
        self.thread.start()

    def stop(self) -> None:
        self.record["until"] = 0
        self.finish()

    def finish(self) -> None:
        """Wait until the driver ends, check its results, and stop the queue."""
        self.thread.join()
        try:
            seen = {name: int(self.record[name]) for name in ("requests", "kicks", "calls", "errors", "hung")}
            assert not self.record["hung"], f"a wake-up was lost: {seen}, {self.state()}"
            assert self.record["errors"] == 0
            assert self.queue.counters["requests"].sum() == self.record["requests"]
        finally:
            self.close()

    def state(self) -> dict[str, int]:
        names = ("running", "ready", "quiet", "in_flight", "last_avail", "next_used", "signalled_used")
        return {name: int(self.queue.record[name]) for name in names} | {
            "avail": int(self.ring.state["next_avail"]),
            "taken": int(self.ring.state["last_used"]),
        }

    def close(self) -> None:
        self.worker.stop_queue(self.queue).result(PATIENCE)
        self.epoll.close()
        os.close(self.kick_fd)
        os.close(self.call_fd)


def store32_in_python(address: int, value: int) -> None:
    import ctypes

    ctypes.c_uint32.from_address(address).value = value


@pytest.fixture(scope="module", autouse=True)
def _compile_the_driver(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compile it here, so that the first test does not include that time."""
    nothing: npt.NDArray[np.void] = np.zeros(1, DRIVER)
    drive(int(nothing.ctypes.data))


def give_only(worker: Worker, policy: int) -> None:
    """Let the worker have one policy."""

    def change() -> None:
        record = worker.state.record
        record["policy"], record["policies"], record["sample_end"] = policy, 1 << policy, NEVER

    worker.call(change).result(PATIENCE)


# Each policy by itself, the worker's choice, and never sleeping.
POLICIES_AND_TIMES = pytest.mark.parametrize(
    ("policy", "poll_us"),
    [(SLEEP, 50), (COALESCE, 50), (POLL, 50), (None, 50), (None, 0), (None, None)],
    ids=["sleep", "nap", "poll", "tuned", "tuned-without-polling", "always"],
)


@POLICIES_AND_TIMES
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
@pytest.mark.parametrize("engine", ["aio", "io_uring", "memory"])
def test_no_kick_and_no_call_is_lost(
    make_rig: RigFactory, engine: str, event_idx: bool, policy: int | None, poll_us: int | None
) -> None:
    """Three queues with six slots: one driver sleeps until it is called, one polls its ring, one never pauses."""
    rig = make_rig(engine, poll_us=poll_us, slots=6)
    if policy is not None:
        give_only(rig.workers[0], policy)
    seed = time.monotonic_ns() % 1_000_000
    drives = [
        Drive(rig, rig.workers[0], seed, event_idx=event_idx, sleeps=True),
        Drive(rig, rig.workers[0], seed + 1, event_idx=event_idx, sleeps=False, depth=2),
        Drive(rig, rig.workers[0], seed + 2, event_idx=event_idx, sleeps=True, pause_us=0),
    ]
    for each in drives:
        each.start(HUNT_SECONDS)
    for each in drives:
        each.finish()


@POLICIES_AND_TIMES
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
@pytest.mark.parametrize("engine", ["aio", "io_uring", "memory"])
def test_a_single_request_is_never_lost(
    make_rig: RigFactory, engine: str, event_idx: bool, policy: int | None, poll_us: int | None
) -> None:
    """One queue and one request at a time, at any moment of falling asleep; nothing else would wake the worker."""
    rig = make_rig(engine, poll_us=poll_us, slots=2)
    if policy is not None:
        give_only(rig.workers[0], policy)
    seed = time.monotonic_ns() % 1_000_000
    alone = Drive(rig, rig.workers[0], seed, event_idx=event_idx, sleeps=True, depth=1)
    alone.start(HUNT_SECONDS / 2)
    alone.finish()


# The cost of sleeping and polling.


def switches(worker: Worker) -> int:
    """How often the worker's thread went to sleep."""
    status = Path(f"/proc/self/task/{worker._thread.native_id}/status").read_text()
    return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])


def ticks(worker: Worker) -> int:
    """The CPU time of the worker's thread, in hundredths of a second."""
    fields = Path(f"/proc/self/task/{worker._thread.native_id}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def is_asleep(worker: Worker) -> bool:
    """Whether the worker sleeps, without a time limit, until an fd becomes readable: its system call (proc(5))."""
    words = Path(f"/proc/self/task/{worker._thread.native_id}/syscall").read_text().split()
    if words[0] == "running":
        return False
    number, arguments = int(words[0]), [int(word, 16) for word in words[1:7]]
    if number == NUMBERS["io_uring_enter"]:
        return arguments[2] > 0 and not arguments[3] & IORING_ENTER_EXT_ARG
    if number == NUMBERS["epoll_pwait"]:
        return arguments[3] & 0xFFFF_FFFF == 0xFFFF_FFFF
    return number == NUMBERS["epoll_pwait2"] and arguments[3] == 0


@pytest.mark.parametrize("poll_us", [0, 50, 20_000])
@KERNEL_ENGINES
def test_an_idle_worker_does_not_wake_up(make_rig: RigFactory, engine: str, poll_us: int) -> None:
    rig = make_rig(engine, poll_us=poll_us)
    worker = rig.workers[0]
    line = rig.line().start()
    rig.line().start()
    for burst in range(2):
        if burst:
            busy = Drive(rig, worker, 1, event_idx=True, sleeps=True, pause_us=20)
            busy.start(0.1)
            busy.finish()
        assert line.do(IN, room=512).status == OK
        assert eventually(lambda: is_asleep(worker))


@KERNEL_ENGINES
def test_each_polling_policy_is_tried_on_a_busy_worker(make_rig: RigFactory, engine: str) -> None:
    """The machine determines which one it chooses; tests/unit/test_tune.py tests the choice."""
    rig = make_rig(engine, poll_us=200)
    state, tallies = rig.workers[0].state.record, rig.workers[0].state.tallies
    busy = Drive(rig, rig.workers[0], 3, event_idx=True, sleeps=False, pause_us=50, depth=1)
    busy.start(PATIENCE)
    assert eventually(lambda: bool(tallies["completed"].all()) and int(state["until_trial"]) > 0)
    busy.stop()


@KERNEL_ENGINES
def test_polling_ends_without_requests(make_rig: RigFactory, engine: str) -> None:
    rig = make_rig(engine, poll_us=200)
    worker = rig.workers[0]
    give_only(worker, POLL)
    rare = Drive(rig, worker, 4, event_idx=True, sleeps=False, pause_us=80_000, depth=1)
    rare.start(PATIENCE)
    assert eventually(lambda: int(worker.state.record["policy"]) == SLEEP)
    rare.stop()


def calls_per_request(rig: Rig, policy: int) -> float:
    """Calls per request for a driver that always wants calls, although it polls the ring."""
    worker = rig.workers[0]
    give_only(worker, policy)
    busy = Drive(rig, worker, 7, event_idx=False, sleeps=False, pause_us=0, depth=1)
    busy.start(0.3)
    busy.thread.join()
    calls, requests = os.eventfd_read(busy.call_fd), int(busy.record["requests"])
    busy.finish()
    return calls / requests


def test_a_coalescing_worker_calls_once_for_many_requests(make_rig: RigFactory) -> None:
    rig = make_rig("memory")
    assert calls_per_request(rig, SLEEP) > 0.9
    assert calls_per_request(rig, COALESCE) < 0.7


def test_a_held_call_is_made_before_the_calls_of_the_control_plane(make_rig: RigFactory) -> None:
    """This makes it safe to change a call fd or to stop a queue at any time."""
    rig = make_rig("aio")
    worker = rig.workers[0]
    give_only(worker, COALESCE)
    line = rig.line().start()
    for _ in range(30):
        line.put(IN, room=512)
        line.kick()
        assert eventually(lambda: line.ring.device_used_idx() == line.ring.avail_idx)
        assert worker.call(lambda: int(worker.state.record["unnotified"])).result(PATIENCE) == 0
        assert os.eventfd_read(line.call_fd) == 1


def put_silently(line: Line) -> None:
    """Publish a request without a kick."""
    line.put(IN, room=512)
    line.ring.publish()


@KERNEL_ENGINES
def test_poll_always_never_sleeps_and_needs_no_kick(make_rig: RigFactory, engine: str) -> None:
    rig = make_rig(engine, poll_us=None)
    worker = rig.workers[0]
    served, never_served = rig.line().start(), rig.line().start()
    assert served.do(IN, room=512).status == OK
    before, used = switches(worker), ticks(worker)
    assert eventually(lambda: ticks(worker) >= used + 20)
    assert int(worker.state.record["poll_end"]) > 0, "it is not looking at the rings"
    assert switches(worker) == before
    for line in (served, never_served):
        put_silently(line)
        line.wait()
        assert struct.unpack_from("<H", rig.guest.memory, line.ring.used)[0] == 1, "kicks are asked for"


@pytest.mark.parametrize("poll_us", [50, None])
@KERNEL_ENGINES
def test_calls_of_the_control_plane_run_at_once(make_rig: RigFactory, engine: str, poll_us: int | None) -> None:
    """While one queue is busy: calls, new queues, drains, memory changes."""
    rig = make_rig(engine, poll_us=poll_us)
    worker = rig.workers[0]
    busy = Drive(rig, worker, 5, event_idx=True, sleeps=False, pause_us=20)
    busy.start(0.6)
    took = []
    for number in range(15):
        begin = time.monotonic()
        line = rig.line().start(event_idx=number % 2 == 0)
        assert line.do(IN, room=512).status == OK
        worker.set_memory(line.queue, rig.guest.table()).result(PATIENCE)
        assert line.do(IN, room=512).status == OK
        base = line.stop()
        line.resume(base=base)
        assert line.do(IN, room=512).status == OK
        line.stop()
        took.append(time.monotonic() - begin)
    busy.finish()
    # The median: three threads that never sleep share the CPUs here.
    assert sorted(took)[len(took) // 2] < 0.5


def turns_until(worker: Worker, line: Line) -> int:
    """The number of the worker's turns between a kick and the completion."""
    line.put(IN, room=512)
    before = int(worker.state.record["turns"])
    line.kick()
    line.wait()
    return int(worker.state.record["turns"]) - before


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
@KERNEL_ENGINES
def test_a_kicked_queue_is_served_beside_one_that_is_polled(make_rig: RigFactory, engine: str, event_idx: bool) -> None:
    rig = make_rig(engine, poll_us=50)
    worker = rig.workers[0]
    line = rig.line().start(event_idx=event_idx)
    busy = Drive(rig, worker, 6, event_idx=event_idx, sleeps=False, pause_us=10, depth=1)
    busy.start(PATIENCE)
    turns = []
    for _ in range(20):
        served = int(busy.record["requests"])
        assert eventually(lambda served=served: int(busy.record["requests"]) > served + 100)
        turns.append(turns_until(worker, line))
    busy.stop()
    # The median, and a multiple of the usual number: this thread and the driver's may be off the CPU for long.
    assert sorted(turns)[len(turns) // 2] < 50 * ENGINE_TURNS


@pytest.mark.parametrize("what", ["kick", "call"])
@KERNEL_ENGINES
def test_a_long_poll_delays_no_other_queue(make_rig: RigFactory, engine: str, what: str) -> None:
    """The worker polls one ring for up to 4 s, and finds a request there every second."""
    rig = make_rig(engine, poll_us=4_000_000)
    worker = rig.workers[0]
    line, beside, stop = rig.line().start(), rig.line().start(), threading.Event()
    for each in (line, beside):
        assert each.do(IN, room=512).status == OK
    # From now on `line` is kicked, until it has been served once.
    assert eventually(lambda: is_asleep(worker) and not line.queue.record["quiet"])
    pending = line.put(IN, room=512)
    free = rig.guest.free

    def now_and_then() -> None:
        while not stop.wait(1):
            beside.do(IN, room=512)
            rig.guest.free = free

    thread = threading.Thread(target=now_and_then)
    give_only(worker, POLL)
    thread.start()
    try:
        assert eventually(lambda: int(worker.state.record["poll_end"]) > 0)
        assert not line.queue.record["quiet"]
        begin = time.monotonic()
        if what == "kick":
            line.kick()
            line.wait()
        else:
            worker.call(lambda: None).result(PATIENCE)
        took = time.monotonic() - begin
        line.kick()
        line.wait()
    finally:
        stop.set()
        thread.join()
    assert line.answer(pending).status == OK
    # Far less than until the next request in the ring that it polls.
    assert took < 0.4
