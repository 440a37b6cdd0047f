"""How long a disk had requests in flight: compared with a model, counted by several threads, and of a real disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringplane.block.layers.delay import DelayPart
from ringplane.dataplane.disk_figures import read_figures
from ringplane.dataplane.io_time import TICK_NS, begin_tick, count_ticks
from ringplane.dataplane.queue import Device
from ringplane.dataplane.state import COUNTER, KINDS, QUEUE
from ringplane.native.structs import new

from .rig import IN, RigFactory, rig_factory
from .waiting import eventually

QUEUES = 3


class Ring:
    """A queue in which requests begin and end, as the loop sees it."""

    def __init__(self, device: Device, number: int) -> None:
        self.number, self._array, self._counters = number, new(QUEUE), new(COUNTER, len(KINDS))
        self.record, self.address = self._array[0], int(self._array.ctypes.data)
        self.record["device"], self.record["counters"] = device.address, self._counters.ctypes.data
        device.start(self)  # type: ignore[arg-type]

    def look(self, tick: int, completed: int = 0) -> None:
        """What the loop does for a queue that it looks at."""
        if self.record["tick"] != tick:
            begin_tick(self.address, tick, completed)

    @property
    def busy(self) -> bool:
        """Whether it has requests in flight, or some that have ended and that the driver does not see yet."""
        return bool(self.record["in_flight"] or self.record["unpublished"])

    def begin(self, tick: int) -> None:
        self.look(tick)
        self.record["in_flight"] += 1

    def end(self, tick: int) -> None:
        """`publish` follows, in the same turn of the loop."""
        if self.record["in_flight"]:
            self.record["unpublished"] = 1
            self.record["in_flight"] -= 1

    def publish(self, tick: int) -> None:
        if self.record["unpublished"]:
            self.look(tick, 1)
            self.record["unpublished"] = 0


class Disk:
    """It counts from tick 0 on."""

    def __init__(self) -> None:
        self.device = Device(1 << 20, read_only=False, block_size=512, serial="")
        self.device._record["tick"] = 0
        self.rings = [Ring(self.device, number) for number in range(QUEUES)]


# A thread that looks at a queue in vain, reads the counters, begins or ends a request, or has the driver see what has
# ended: after so many ticks.
steps = st.lists(
    st.tuples(
        st.sampled_from(["look", "read", "begin", "end", "publish"]), st.integers(0, QUEUES - 1), st.integers(0, 3)
    ),
    max_size=60,
)


@given(steps)
def test_the_ticks_at_whose_end_requests_were_in_flight(steps: list[tuple[str, int, int]]) -> None:
    disk = Disk()
    tick = busy = 0
    for what, number, later in steps:
        ring = disk.rings[number]
        busy += later * any(each.busy for each in disk.rings)
        tick += later
        if what == "read":
            count_ticks(disk.device.address, tick, 0)
            assert disk.device.busy_ticks == busy
        else:
            getattr(ring, what)(tick)
    count_ticks(disk.device.address, tick, 0)
    assert disk.device.busy_ticks == busy


def test_threads_that_count_at_once_never_count_more_than_the_time() -> None:
    """Of queues that always have something in flight; the kernel interrupts them anywhere."""
    disk = Disk()
    first, ticks = 5, 20_000
    disk.device._record["tick"] = first
    for ring in disk.rings:
        ring.record["in_flight"] = 1

    def count(ring: Ring) -> None:
        for tick in range(first, first + ticks + 1):
            ring.look(tick, tick % 2)

    threads = [threading.Thread(target=count, args=[ring]) for ring in disk.rings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert disk.device.busy_ticks == ticks


def test_a_thread_with_an_older_time_counts_nothing() -> None:
    disk = Disk()
    disk.rings[0].begin(10)
    disk.rings[1].begin(20)
    disk.rings[0].end(15)
    disk.rings[0].publish(15)
    assert disk.device.busy_ticks == 10


def test_a_scrape_between_the_end_of_a_request_and_its_count() -> None:
    """Nothing is in flight any more, but something was."""
    disk = Disk()
    disk.rings[0].begin(10)
    disk.rings[0].end(20)
    count_ticks(disk.device.address, 20, 0)
    disk.rings[0].publish(20)
    assert disk.device.busy_ticks == 10


@pytest.fixture(params=["aio", "io_uring", "memory"])
def make_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RigFactory]:
    with rig_factory(tmp_path, 1 << 20, engine=request.param) as factory:
        yield factory


def io_time(device: Device) -> int:
    """In nanoseconds."""
    return int(read_figures([device])["busy_ticks"][0]) * TICK_NS


def test_a_disk(make_rig: RigFactory) -> None:
    """Two queues on two threads, with requests of 40 ms at the same time, which a scrape sees before they end."""
    rig = make_rig(layers=[DelayPart(read=40_000_000)], workers=2)
    began = time.monotonic_ns()
    lines = [rig.line(worker).start() for worker in range(2)]
    assert io_time(rig.device) == 0
    for line in lines:
        for _ in range(3):
            line.put(IN, 0, b"", 512)
        line.kick()
    assert eventually(lambda: io_time(rig.device) > 0)
    for line in lines:
        line.wait()
    counted = io_time(rig.device)
    assert 40_000_000 - TICK_NS <= counted <= time.monotonic_ns() - began + TICK_NS
    assert io_time(rig.device) == counted
