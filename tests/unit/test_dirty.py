"""Every page that the device writes during a migration is marked in the dirty log, after it was written.

A front end copies all of guest memory, then repeatedly the pages that the device has marked and those that the driver
has written, as QEMU does. When the rings are drained, the copy must equal the memory: a page differs if it was not
marked, or if it was marked before it was written.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringplane.block.layers.delay import DelayPart
from ringplane.dataplane.queue import DirtyLog
from ringplane.guest_memory.regions import Mapping
from ringplane.inflight.area import InflightRegion
from ringplane.inflight.tracking import region_bytes

from .combinations import COMBINATIONS, Combination
from .rig import GUEST_BASE, Guest, Line, Rig, RigFactory, direct_rig, eventually, held, pattern, rig_factory
from .workload import CAPACITY, Workload

DISK = pattern(CAPACITY * 512)
PAGE = 4096
MS = 1_000_000


def shared(size: int) -> Mapping:
    """A new mapping of so many zeros, for front end and device."""
    fd = os.memfd_create("shared")
    os.ftruncate(fd, size)
    mapping = Mapping(fd, size, 0)
    os.close(fd)
    return mapping


class WatchedGuest(Guest):
    """Guest memory whose areas begin at pages, so that each has marks of its own. It knows what the driver writes."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._written: set[int] = set()
        self._lock = threading.Lock()

    def allocate(self, size: int, alignment: int = 1) -> int:
        return super().allocate(size, max(alignment, PAGE))

    def write(self, offset: int, content: bytes) -> None:
        super().write(offset, content)
        self._note(offset, len(content))

    def store16(self, offset: int, value: int) -> None:
        super().store16(offset, value)
        self._note(offset, 2)

    def _note(self, offset: int, size: int) -> None:
        with self._lock:
            self._written.update(range(offset // PAGE, (offset + size - 1) // PAGE + 1))

    def take_written(self) -> set[int]:
        """The pages that the driver has written since the last call."""
        with self._lock:
            written, self._written = self._written, set()
        return written


class Migration:
    """The front end's side of a migration."""

    def __init__(self, rig: Rig) -> None:
        assert isinstance(rig.guest, WatchedGuest)
        self._rig, self._guest = rig, rig.guest
        self._logs: list[tuple[DirtyLog, mmap.mmap]] = []
        self._over = threading.Event()

    def new_log(self) -> DirtyLog:
        """A log for all of guest memory. Earlier ones stay in use until each ring has been restarted."""
        mapping = shared((GUEST_BASE + self._guest.size) // PAGE // 8)
        self._logs.append((log := DirtyLog(mapping), mmap.mmap(mapping.fd, mapping.size)))
        return log

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Copy until the block ends, in which all rings must have been drained. Then the copy must be right."""
        self._guest.take_written()
        self._copy = bytearray(self._guest.memory[:])
        copying = threading.Thread(target=self._copy_until_over)
        copying.start()
        try:
            yield
        finally:
            self._over.set()
            copying.join()
        self._copy_dirty_pages()
        for _, log in self._logs:
            log.close()
        differing = [page for page in range(self._guest.size // PAGE) if self._content(page) != self._copied(page)]
        assert not differing, "these pages were not marked, or before they were written"

    def _copy_until_over(self) -> None:
        while not self._over.is_set():
            self._copy_dirty_pages()

    def _copy_dirty_pages(self) -> None:
        """Workers stand still meanwhile, because Python cannot read and clear bits at once; I/O in flight continues."""
        with contextlib.ExitStack() as standing:
            for worker in self._rig.workers:
                standing.enter_context(held(worker))
            for page in self._guest.take_written() | self._take_marked():
                self._copy[page * PAGE : (page + 1) * PAGE] = self._content(page)

    def _take_marked(self) -> set[int]:
        found: set[int] = set()
        for _, log in self._logs:
            first = GUEST_BASE // PAGE // 8
            bits = np.unpackbits(np.frombuffer(log[first:], np.uint8), bitorder="little")
            log[first:] = bytes(len(log) - first)
            found |= set(np.flatnonzero(bits).tolist())
        return found

    def _content(self, page: int) -> bytes:
        return self._guest.read(page * PAGE, PAGE)

    def _copied(self, page: int) -> bytes:
        return bytes(self._copy[page * PAGE : (page + 1) * PAGE])


class MigratedWorkload(Workload):
    """Random requests, while the log, the memory table, or both are replaced with requests in flight."""

    def __init__(self, rig: Rig, lines: list[Line], combination: Combination, seed: int) -> None:
        super().__init__(rig, lines, combination, seed)
        self.migration = Migration(rig)
        if self.random.random() < 0.5:
            for line in lines:
                mapping = shared(region_bytes(line.ring.size, packed=line.ring.layout().packed))
                line.ring.inflight = InflightRegion(mapping.address, mapping)
        self.use_new_log()

    def use_new_log(self) -> None:
        log = self.migration.new_log()
        for line in self.lines:
            base = line.stop()
            line.ring.log = log
            line.resume(base=base)

    def serve(self) -> None:
        for line in self.lines:
            line.notify()
        if self.random.random() < 0.3:
            self.use_new_log()
        if self.random.random() < 0.3:
            line = self.random.choice(self.lines)
            line.worker.set_memory(line.queue, self.rig.guest.table())
        super().serve()

    def run(self) -> None:
        with self.migration.under_way():
            super().run()


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[RigFactory]:
    with rig_factory(tmp_path, DISK, guest_size=16 << 20) as factory:
        yield factory


def watched(rig: Rig) -> Rig:
    rig.guest.close()
    rig.guest = WatchedGuest(16 << 20)
    return rig


@pytest.fixture(params=COMBINATIONS)
def combination(request: pytest.FixtureRequest) -> Combination:
    return dict(request.param)


def test_whether_a_ring_wants_kicks_is_marked(make_rig: RigFactory, combination: Combination) -> None:
    """A ring without requests: nothing else is written."""
    rig = watched(make_rig())
    migration, line = Migration(rig), rig.line()
    ring_class = combination.pop("ring_class")
    line.ring = ring_class(rig.guest, 8, start=ring_class.any_base(8, random.Random(1)), **combination)
    line.ring.log = migration.new_log()
    with migration.under_way():
        line.resume()
        assert eventually(line.ring.asks_for_kick)
        line.stop()


@pytest.mark.parametrize(
    ("engine", "direct", "delayed"),
    [
        ("aio", True, False),
        ("io_uring", False, True),
        ("io_uring", True, False),
        ("memory", False, False),
    ],
)
def test_a_copy_of_memory_equals_it_in_the_end(
    make_rig: RigFactory, combination: Combination, engine: str, direct: bool, delayed: bool
) -> None:
    """Two queues on two workers, which mark pages in the same bytes of the log."""
    layers = [DelayPart(read=2 * MS, write=MS)] if delayed else []
    options = {"engine": engine, "workers": 2, "layers": layers}
    rig = watched(direct_rig(make_rig, **options) if direct else make_rig(**options))
    lines = [rig.line(number) for number in range(2)]

    @settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 2**32))
    def run(seed: int) -> None:
        MigratedWorkload(rig, lines, combination, seed).run()

    run()
