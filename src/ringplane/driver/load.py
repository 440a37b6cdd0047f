"""A load generator for a disk: random or sequential requests with a queue depth, timed, and verified bit by bit.

One Python thread per queue runs `drive`, which keeps `depth` requests in flight without the GIL and returns to Python
about every TURN_NS. With verification, the content of each written sector is computed from a seed, the sector's number
and its generation (how often it was written). A model of all generations says what each read must return.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ringplane.driver.content import Model, origin
from ringplane.driver.driver import Driver
from ringplane.driver.frontend import Vring
from ringplane.driver.generator import BROKEN, DONE, EVENTS, FOREVER, RUN, SLOT, drive
from ringplane.driver.process import cpu_ns
from ringplane.driver.virtqueue import SEGMENT
from ringplane.metrics import histogram
from ringplane.native.epoll import EPOLL_EVENT
from ringplane.virtio.blk import SECTOR, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT
from ringplane.virtio.split import DESC_SIZE

__all__ = ["Load", "Model", "Progress", "Result", "check", "fill", "run_load"]

# How long `drive` runs at most before Python checks flags again, and how often progress is reported.
TURN_NS = 100_000_000
SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to do to a disk. Sizes in bytes, times in seconds."""

    block_size: int | Sequence[int] = 4096  # if there are several, each request takes one at random
    depth: int = 1  # requests in flight on each queue
    queues: int = 1
    pattern: Literal["random", "sequential"] = "random"
    read_percent: int = 100
    flush_every: int = 0  # a flush after this many writes, 0: none
    seconds: float | None = None
    warm_up: float = 0.0  # not measured, before `seconds` or `requests`
    requests: int | None = None  # of all queues together; the limit that is reached first ends the run
    passes: int | None = None  # only sequential: how many times the region is covered
    verify: bool = False
    model: Model | None = None  # of what earlier runs wrote; without it only what this run wrote is verified
    busy_poll: bool = False  # poll the ring instead of waiting for notifications
    seed: int = 1
    region: tuple[int, int] | None = None  # offset and length; default: the whole disk
    stop_at_error: bool = False  # submit nothing more, on all queues, after a request has failed
    timeout: float = 30.0  # the longest time without any completion while requests are in flight

    @property
    def sizes(self) -> list[int]:
        """All block sizes."""
        return [self.block_size] if isinstance(self.block_size, int) else list(self.block_size)


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run: all numbers since its start, without the warm-up."""

    seconds: float
    requests: int
    bytes: int
    errors: int
    mismatches: int


@dataclass(frozen=True, slots=True)
class Result:
    """The results of a run. Latency is from just before the kick until the driver saw the used chain, in microseconds.

    `errors` are requests that ended with a status other than OK (`first_error` describes one), `mismatches` are sectors
    whose content was not as expected (`first_mismatch` describes one), out of `sectors_checked`. `wrong_lengths` are
    used elements whose length was not what the device wrote. CPU times are of whole processes, user and system; None if
    the back end's process is not visible.
    """

    requests: int
    seconds: float
    bytes: int
    errors: int
    first_error: str | None
    mismatches: int
    first_mismatch: str | None
    sectors_checked: int
    wrong_lengths: int
    mean_us: float
    p50_us: float
    p99_us: float
    p999_us: float
    backend_cpu_us: float | None
    driver_cpu_us: float
    histogram: npt.NDArray[np.int64]

    @property
    def iops(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds if self.seconds else 0.0

    @property
    def mb_per_second(self) -> float:
        """Data read and written, in 10^6 bytes per second."""
        return self.bytes / self.seconds / 1e6 if self.seconds else 0.0

    @property
    def backend_cpu_per_io_us(self) -> float | None:
        """CPU time of the back end per request."""
        return None if self.backend_cpu_us is None else self.backend_cpu_us / max(1, self.requests)

    @property
    def driver_cpu_per_io_us(self) -> float:
        """CPU time of this process per request."""
        return self.driver_cpu_us / max(1, self.requests)


# One queue


class _Worker:
    """The RUN of one queue, the arrays that it points to, and the function of its thread."""

    def __init__(
        self,
        disk: Driver,
        vring: Vring,
        load: Load,
        part: tuple[int, int],
        model: Model | None,
        stop: npt.NDArray[np.int64],
    ) -> None:
        """`stop` is one number for all queues: when it is not 0, nothing more is submitted."""
        self.disk, self.vring, self.load, self._stop = disk, vring, load, stop
        self.failure: BaseException | None = None
        self._runs: npt.NDArray[np.void] = np.zeros(1, RUN)
        self.run = self._runs[0]
        self.address = int(self._runs.ctypes.data)
        self._owned: list[npt.NDArray[np.generic]] = []
        self._blocks: list[int] = []
        try:
            self._fill_in(part, model)
            self._make_slots()
        except BaseException:
            self.free()
            raise

    def _own(self, array: npt.NDArray[np.generic]) -> int:
        """Keep an array alive; returns its address."""
        self._owned.append(array)
        return int(array.ctypes.data)

    def _fill_in(self, part: tuple[int, int], model: Model | None) -> None:
        load, vring, run = self.load, self.vring, self.run
        sizes = np.array([size // SECTOR for size in load.sizes], np.int64)
        values = {
            "ring": vring.ring.address,
            "depth": load.depth,
            "free": self._own(np.arange(load.depth, dtype=np.int64)),
            "free_count": load.depth,
            "segments": self._own(np.zeros(3, SEGMENT)),
            "sizes": self._own(sizes),
            "size_count": len(sizes),
            "align": math.gcd(*sizes.tolist()),
            "first": part[0],
            "cursor": part[0],
            "end": part[1],
            "sequential": load.pattern == "sequential",
            "read_percent": load.read_percent,
            "flush_every": load.flush_every,
            "verify": model is not None,
            "busy_poll": load.busy_poll,
            "seed": model.seed if model else load.seed,
            "random": load.seed * 0x10001 + vring.index,
            "model": model.address_of_sector_0 if model else 0,
            "kick_fd": vring.kick_fd,
            "call_fd": vring.call_fd,
            "epoll_fd": vring.epoll.fileno(),
            "events": self._own(np.zeros(EVENTS, EPOLL_EVENT)),
            "one": self._own(np.ones(1, np.int64)),
            "stop": self._own(self._stop),
            "stops_at_error": load.stop_at_error,
            "budget": FOREVER,
        }
        for name, value in values.items():
            run[name] = value

    def _make_slots(self) -> None:
        """Give each slot its own header, status and buffer, and an indirect table if that was negotiated."""
        slots = np.zeros(self.load.depth, SLOT)
        self.run["slots"] = self._own(slots)
        size = max(self.load.sizes)
        for slot in slots:
            slot["header"] = self._allocate(64)
            slot["status"] = slot["header"] + 32
            slot["table"] = self._allocate(3 * DESC_SIZE) if self.disk.indirect else 0
            slot["data"] = self._allocate(size)
            _touch(int(slot["data"]), size)

    def _allocate(self, size: int) -> int:
        block = self.disk.memory.allocate(size)
        self._blocks.append(block)
        return block

    def free(self) -> None:
        """Free the shared memory, unless requests are still in flight."""
        if self.run["free_count"] == self.load.depth:
            while self._blocks:
                self.disk.memory.free(self._blocks.pop())

    def work(self) -> None:
        """The thread's function: drive the load until it is done; an exception is kept for the thread that joins."""
        try:
            if self.load.busy_poll:
                self.vring.ring.disable_notifications()
            while self._turn() != DONE:
                pass
        except BaseException as failure:
            self.failure = failure

    def _turn(self) -> int:
        outcome = int(drive(self.address, time.monotonic_ns() + TURN_NS))
        if outcome == BROKEN:
            raise ConnectionError(f"the back end used a chain of ring {self.vring.index} that is not in flight")
        if outcome != DONE:
            self.vring.check()
            self._check_time()
        return outcome

    def _check_time(self) -> None:
        run = self.run
        waiting = run["free_count"] < self.load.depth
        if waiting and time.monotonic_ns() - int(run["last_progress"]) > self.load.timeout * SECOND_NS:
            raise TimeoutError(
                f"the back end completed nothing on ring {self.vring.index} for {self.load.timeout:g} s with "
                f"{self.load.depth - int(run['free_count'])} requests in flight"
            )


def _touch(address: int, size: int) -> None:
    """Allocate every page before the measurement, with non-zero data: some storage treats zeros as holes."""
    from ctypes import memset

    memset(address, 0xA5, size)


# A run


def run_load(
    disk: Driver,
    load: Load,
    progress: Callable[[Progress], None] | None = None,
    backend_pid: int | None = None,
) -> Result:
    """Run a load on a disk that is not used otherwise meanwhile; `progress` is called about every 100 ms.

    `backend_pid` is the process whose CPU time is measured, if it is not the one that listened on the socket.

    Raises ValueError for a load that the disk or the rings do not support, MemoryError if `memory_size` is too small,
    RingBroken, ConnectionError, and TimeoutError. After one of the last three the driver must `reconnect`.
    """
    _check_load(disk, load)
    region = load.region or (0, disk.capacity)
    model = load.model or (Model(region, load.seed) if load.verify else None)
    workers: list[_Worker] = []
    stop = np.zeros(1, np.int64)
    try:
        for vring, part in zip(disk.queues, _parts(load, region), strict=False):
            workers.append(_Worker(disk, vring, load, part, model if load.verify else None, stop))
        return _run(workers, load, stop, progress, disk.backend_pid if backend_pid is None else backend_pid)
    finally:
        for worker in workers:
            worker.free()
        if model:
            model.forget_requests()


def _check_load(disk: Driver, load: Load) -> None:
    for size in load.sizes:
        if size <= 0 or size % disk.block_size:
            raise ValueError(f"a block size of {size} bytes is not a multiple of the disk's {disk.block_size}")
    if not load.sizes or load.depth < 1 or load.queues < 1 or not 0 <= load.read_percent <= 100:
        raise ValueError("a load needs a block size, a queue, a depth of at least 1, and 0 to 100 % of reads")
    if load.queues > len(disk.queues):
        raise ValueError(f"the load uses {load.queues} queues, but the driver has {len(disk.queues)}")
    needed = load.depth * (1 if disk.indirect else 3)
    if needed > disk.queue_size:
        raise ValueError(f"a depth of {load.depth} needs {needed} descriptors, but the ring has {disk.queue_size}")
    if load.passes is not None and (load.pattern != "sequential" or len(load.sizes) != 1):
        raise ValueError("only a sequential load with one block size can have passes")
    if (load.seconds, load.requests, load.passes) == (None, None, None):
        raise ValueError("a load needs a limit: seconds, requests or passes")
    region = load.region or (0, disk.capacity)
    if region[0] % disk.block_size or region[1] % disk.block_size:
        raise ValueError(f"a region of {region[1]} bytes at {region[0]} is not whole blocks of {disk.block_size} bytes")
    if region[0] < 0 or region[0] + region[1] > disk.capacity:
        raise ValueError(f"a region of {region[1]} bytes at {region[0]} is not inside the disk of {disk.capacity}")
    if load.model and not load.model.covers(region):
        raise ValueError("the model does not cover the load's region")


def _parts(load: Load, region: tuple[int, int]) -> list[tuple[int, int]]:
    """The disjoint part of the region for each queue: its first sector and the one after its last."""
    offset, length = region
    align = math.gcd(*load.sizes)
    share = length // load.queues // align * align
    if share < max(load.sizes):
        raise ValueError(
            f"a region of {length} bytes at {offset} is too small for blocks of {max(load.sizes)} bytes "
            f"on each of {load.queues} queues"
        )
    starts = [offset + index * share for index in range(load.queues)]
    # The remainder belongs to the last part: a sequential load must cover everything.
    ends = [*starts[1:], offset + length]
    return [(start // SECTOR, end // SECTOR) for start, end in zip(starts, ends, strict=True)]


def _set_limits(workers: Sequence[_Worker], load: Load, start: int) -> None:
    measure_from = start + int(load.warm_up * SECOND_NS)
    size = load.sizes[0] // SECTOR
    for index, worker in enumerate(workers):
        run = worker.run
        run["measure_from"] = measure_from
        run["deadline"] = FOREVER if load.seconds is None else measure_from + int(load.seconds * SECOND_NS)
        if load.requests is not None:
            run["budget"] = load.requests // len(workers) + (index < load.requests % len(workers))
        if load.passes is not None:
            run["budget"] = load.passes * -(-int(run["end"] - run["first"]) // size)


class _CpuClock:
    """CPU time of the back end and of this process, over the measured part of a run."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._started: tuple[int | None, int] | None = None
        self._ended: tuple[int | None, int] | None = None

    def _now(self) -> tuple[int | None, int]:
        backend = None
        if self._pid:
            with suppress(ProcessLookupError):
                backend = cpu_ns(self._pid)
        return backend, time.process_time_ns()

    def start(self) -> None:
        self._started = self._started or self._now()

    def stop(self) -> None:
        self._ended = self._ended or self._now()

    def spent_us(self) -> tuple[float | None, float]:
        """CPU time of the back end and of this process in microseconds."""
        before, after = self._started or self._now(), self._ended or self._now()
        backend = None if before[0] is None or after[0] is None else (after[0] - before[0]) / 1000
        return backend, (after[1] - before[1]) / 1000


def _run(
    workers: Sequence[_Worker],
    load: Load,
    stop: npt.NDArray[np.int64],
    progress: Callable[[Progress], None] | None,
    backend_pid: int,
) -> Result:
    _compile(workers[0])
    threads = [threading.Thread(target=worker.work, name=f"load-{worker.vring.index}") for worker in workers]
    clock = _CpuClock(backend_pid)
    start = time.monotonic_ns()
    _set_limits(workers, load, start)
    try:
        for thread in threads:
            thread.start()
        _watch(workers, threads, clock, progress)
    finally:
        # Submit nothing more, and wait for requests in flight (each thread gives up after its time limit).
        stop[0] = 1
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    clock.stop()
    for worker in workers:
        if worker.failure is not None:
            raise worker.failure
    return _result(workers, clock)


def _compile(worker: _Worker) -> None:
    """Compile or load `drive` before the measurement: a load with no requests left is done at once."""
    budget = int(worker.run["budget"])
    worker.run["budget"] = 0
    drive(worker.address, 0)
    worker.run["budget"] = budget


def _watch(
    workers: Sequence[_Worker],
    threads: Sequence[threading.Thread],
    clock: _CpuClock,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Wait for the threads; read the CPU clocks when the measured part begins and ends."""
    measure_from, deadline = int(workers[0].run["measure_from"]), int(workers[0].run["deadline"])
    next_progress = time.monotonic_ns() + TURN_NS
    while any(thread.is_alive() for thread in threads):
        now = time.monotonic_ns()
        if now >= measure_from:
            clock.start()
        if now >= deadline:
            clock.stop()
        if now >= next_progress:
            # From now on: on a busy machine several intervals may have passed.
            next_progress = now + TURN_NS
            if progress:
                progress(_progress(workers, now))
        if any(worker.failure is not None for worker in workers):
            return
        later = [moment for moment in (measure_from, deadline, next_progress) if moment > now]
        _sleep_or_join(threads, (min(later) - now) / SECOND_NS)


def _sleep_or_join(threads: Sequence[threading.Thread], seconds: float) -> None:
    alive = [thread for thread in threads if thread.is_alive()]
    if alive:
        alive[0].join(seconds)


def _total(workers: Sequence[_Worker], name: str) -> int:
    return sum(int(worker.run[name]) for worker in workers)


def _progress(workers: Sequence[_Worker], now: int) -> Progress:
    return Progress(
        seconds=max(0.0, (now - int(workers[0].run["measure_from"])) / SECOND_NS),
        requests=_total(workers, "requests"),
        bytes=_total(workers, "bytes"),
        errors=_total(workers, "errors"),
        mismatches=_total(workers, "mismatches"),
    )


def _seconds(workers: Sequence[_Worker]) -> float:
    """From the start to the deadline, or to the last completion if all requests were done before."""
    run = workers[0].run
    exhausted = all(int(worker.run["budget"]) == 0 for worker in workers)
    last = max(int(worker.run["finished"]) for worker in workers)
    end = last if exhausted or int(run["deadline"]) == FOREVER else int(run["deadline"])
    return max(0, end - int(run["measure_from"])) / SECOND_NS


def _result(workers: Sequence[_Worker], clock: _CpuClock) -> Result:
    merged = sum((worker.run["histogram"] for worker in workers), np.zeros(histogram.BUCKETS, np.int64))
    requests = _total(workers, "requests")
    backend_cpu, driver_cpu = clock.spent_us()
    p50, p99, p999 = (histogram.percentile(merged, percent) / 1000 for percent in (50, 99, 99.9))
    return Result(
        requests=requests,
        seconds=_seconds(workers),
        bytes=_total(workers, "bytes"),
        errors=_total(workers, "errors"),
        first_error=_first(workers, "errors", _describe_error),
        mismatches=_total(workers, "mismatches"),
        first_mismatch=_first(workers, "mismatches", describe_mismatch),
        sectors_checked=_total(workers, "checked"),
        wrong_lengths=_total(workers, "wrong_lengths"),
        mean_us=_total(workers, "latency") / max(1, requests) / 1000,
        p50_us=p50,
        p99_us=p99,
        p999_us=p999,
        backend_cpu_us=backend_cpu,
        driver_cpu_us=driver_cpu,
        histogram=merged,
    )


def _first(workers: Sequence[_Worker], counter: str, describe: Callable[[np.void], str]) -> str | None:
    return next((describe(worker.run) for worker in workers if worker.run[counter]), None)


KINDS = {VIRTIO_BLK_T_IN: "reading", VIRTIO_BLK_T_OUT: "writing", VIRTIO_BLK_T_FLUSH: "a flush at"}


def _describe_error(run: np.void) -> str:
    return f"{KINDS[int(run['error_kind'])]} sector {run['error_sector']} ended with status {run['error_status']}"


def describe_mismatch(run: np.void) -> str:
    """A description of the first mismatch of a RUN."""
    position = int(run["bad_word"])
    found = int(run["bad_found"])
    return (
        f"sector {run['bad_sector']}, byte {8 * position}: expected {int(run['bad_expected']) % (1 << 64):#018x} "
        f"(generation {run['bad_generation']}), found {found % (1 << 64):#018x} "
        f"({origin(found, position, int(run['seed']))})"
    )


# Whole disks


def fill(
    disk: Driver,
    seed: int = 1,
    *,
    region: tuple[int, int] | None = None,
    block_size: int = 1 << 20,
    depth: int = 8,
    queues: int = 1,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[Model, Result]:
    """Write every block of a disk (or region) once; returns its model, for `check` and for verifying loads.

    Raises OSError when a write has failed, after which nothing more is written, and what `run_load` raises.
    """
    model = Model(region or (0, disk.capacity), seed)
    result = _sweep(disk, model, 0, block_size, depth, queues, progress)
    if result.errors:
        raise OSError(errno.EIO, f"a write failed: {result.first_error}")
    return model, result


def check(
    disk: Driver,
    model: Model,
    *,
    block_size: int = 1 << 20,
    depth: int = 8,
    queues: int = 1,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Read every block of the model once and compare; returns the mismatches. Raises what `run_load` raises."""
    return _sweep(disk, model, 100, block_size, depth, queues, progress)


def _sweep(
    disk: Driver,
    model: Model,
    read_percent: int,
    block_size: int,
    depth: int,
    queues: int,
    progress: Callable[[Progress], None] | None,
) -> Result:
    region = (model.first * SECTOR, model.sectors * SECTOR)
    # A small disk must be covered completely too.
    size = min(block_size, region[1] // queues // disk.block_size * disk.block_size)
    load = Load(
        block_size=size,
        depth=min(depth, disk.queue_size if disk.indirect else disk.queue_size // 3),
        queues=queues,
        pattern="sequential",
        read_percent=read_percent,
        seconds=None,
        passes=1,
        verify=True,
        model=model,
        seed=model.seed,
        region=region,
        stop_at_error=read_percent == 0,
    )
    return run_load(disk, load, progress)
