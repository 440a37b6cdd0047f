"""One driver for several disks, on a CPU of its own, that never sleeps.

Two drivers would want two CPUs beside that of the I/O thread, and one that sleeps would measure the scheduler.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import click
import numpy as np
from limited_disks import Disk, served
from scale import drain, loading

from ringplane.bench.backends import pinned
from ringplane.compiler.jit import compiled
from ringplane.driver.driver import Driver
from ringplane.driver.generator import BROKEN, DONE, FOREVER, RUN, drive
from ringplane.driver.load import Load, _Worker
from ringplane.driver.process import cpu_ns
from ringplane.metrics import histogram
from ringplane.native.access import load64, store64, view
from ringplane.native.syscalls import monotonic_ns

SECOND_NS = 1_000_000_000
MEMORY = 4 << 20
WARM_UP = 1.0


@dataclass(frozen=True, slots=True)
class Measured:
    """Of a load: requests per second, their 99th percentile, and CPU time of the server per second."""

    iops: float
    p99_us: float
    busy: float


@contextlib.contextmanager
def serving_apart(server: str, disks: Sequence[Disk]) -> Iterator[list[Driver]]:
    """Serve disks on all CPUs but the first one, and stay on that one."""
    mine, *others = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        with pinned(others):
            sockets = stack.enter_context(served(server, disks))
        drivers = [stack.enter_context(Driver(socket, memory_size=MEMORY, timeout=120)) for socket in sockets]
        stack.enter_context(pinned([mine] if others else []))
        yield drivers


def drive_together(disks: Sequence[Driver], depths: Sequence[int], periods: Sequence[int], seconds: float) -> Measured:
    """What is measured is the first of these disks. `periods`: nanoseconds between two requests; 0: no pause."""
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(loading([disk], Load(depth=depth, busy_poll=True, seconds=seconds)))[0]
            for disk, depth in zip(disks, depths, strict=True)
        ]
        for worker, period in zip(workers, periods, strict=True):
            worker.run["measure_from"], worker.run["deadline"] = 0, FOREVER
            worker.run["budget"] = 0 if period else FOREVER
        _visit(workers, periods, WARM_UP)
        for worker in workers:
            worker.run["requests"], worker.run["histogram"] = 0, 0
        pid, began = disks[0].backend_pid, time.monotonic_ns()
        before = cpu_ns(pid)
        _visit(workers, periods, seconds)
        lasted, used = time.monotonic_ns() - began, cpu_ns(pid) - before
        requests, counts = int(workers[0].run["requests"]), workers[0].run["histogram"].copy()
        drain(workers)
    return Measured(requests * SECOND_NS / lasted, histogram.percentile(counts, 99) / 1000, used / lasted)


def _visit(workers: Sequence[_Worker], periods: Sequence[int], seconds: float) -> None:
    addresses, pauses = (np.array(each, np.int64) for each in ([worker.address for worker in workers], periods))
    dues = np.where(pauses > 0, time.monotonic_ns(), FOREVER)
    until = time.monotonic_ns() + int(seconds * SECOND_NS)
    places = (each.ctypes.data for each in (addresses, dues, pauses))
    if visit_all(*places, len(workers), until) == BROKEN:
        raise click.ClickException("the server used a chain that is not in flight")


@compiled
def visit_all(addresses, dues, periods, count, until):
    """Visit the loads in turn until that time; at its time in `dues`, and after each period, one may submit again."""
    now = monotonic_ns()
    while now < until:
        for index in range(count):
            address, due = load64(addresses + 8 * index), load64(dues + 8 * index)
            if now >= due:
                view(address, RUN).budget += 1
                store64(dues + 8 * index, due + load64(periods + 8 * index))
            # It returns after one visit, because this time has always passed.
            if drive(address, 0) == BROKEN:
                return BROKEN
        now = monotonic_ns()
    return DONE
