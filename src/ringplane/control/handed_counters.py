"""Counters from a process to its successor; those of disks in a file in memory, because there are thousands of them."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ringplane.block.sources.service import OPERATIONS, SERVICE_TIME
from ringplane.control.counters import SCALARS, total
from ringplane.dataplane.state import COUNTER, KINDS
from ringplane.dataplane.thread_counters import LAYOUT as LAYOUT_OF_THREAD
from ringplane.dataplane.worker import Worker
from ringplane.device.disk import Disk
from ringplane.metrics.histogram import BUCKETS
from ringplane.system.fd import Fd

LOST = "counters of %s begin at 0 because the previous process counted other things"

log = logging.getLogger(__name__)

# How those of one disk are arranged.
LAYOUT = [list(KINDS), list(SCALARS), BUCKETS]
SIZE = len(KINDS) * COUNTER.itemsize

# Those of the service of a remote disk, which come after all disks, at the end of the file.
SERVICE_LAYOUT = [list(OPERATIONS), list(SERVICE_TIME.names or ()), BUCKETS]
SERVICE_SIZE = 8 + len(OPERATIONS) * SERVICE_TIME.itemsize


@contextlib.contextmanager
def saved_counters(disks: Iterable[Disk]) -> Iterator[dict[str, Any]]:
    """A part of a message; its fd is closed at the end of the `with`. Raises OSError.

    `disks` are the numbers of those disks that have counted anything, in the order in which the file has them;
    `services` those of remote disks.
    """
    disks = tuple(disks)
    fd = os.memfd_create("ringplane-counters", os.MFD_CLOEXEC)
    try:
        yield {
            "layout": LAYOUT,
            "file": Fd(fd),
            "disks": list(_write_disks(fd, disks)),
            "service_layout": SERVICE_LAYOUT,
            "services": list(_write_services(fd, disks)),
        }
    finally:
        os.close(fd)


def _write_disks(fd: int, disks: Iterable[Disk]) -> Iterator[int]:
    for number, disk in enumerate(disks):
        counted = total(disk.started)
        if counted.any():
            _write(fd, counted)
            yield number


def _write_services(fd: int, disks: Iterable[Disk]) -> Iterator[int]:
    for number, disk in enumerate(disks):
        if disk.source.service is not None:
            _write(fd, disk.source.service.counted())
            yield number


def _write(fd: int, counted: npt.NDArray[np.int64]) -> None:
    if os.write(fd, counted.tobytes()) != counted.nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def resume_counters(saved: Mapping[str, Any], disks: Mapping[int, Disk]) -> None:
    """Continue to count, before anybody uses these disks, which have their numbers. Raises LookupError, ValueError."""
    if saved["layout"] != LAYOUT:
        log.warning(LOST, "disks")
        return
    for index, number in enumerate(saved["disks"]):
        data = os.pread(saved["file"].number, SIZE, index * SIZE)
        disks[number].queues[0].resume_counters(np.frombuffer(data, np.int64))


def resume_services(saved: Mapping[str, Any], disks: Mapping[int, Disk]) -> None:
    """The same for the services of remote disks. Raises LookupError, ValueError."""
    if saved["service_layout"] != SERVICE_LAYOUT:
        log.warning(LOST, "services of remote disks")
        return
    file = saved["file"].number
    # From the end of the file: the counters before may have another size in the other release.
    begin = os.fstat(file).st_size - len(saved["services"]) * SERVICE_SIZE
    for index, number in enumerate(saved["services"]):
        service = disks[number].source.service
        if service is not None:
            data = os.pread(file, SERVICE_SIZE, begin + index * SERVICE_SIZE)
            service.resume(np.frombuffer(data, np.int64))


def thread_counters(workers: Mapping[str, Worker]) -> dict[str, Any]:
    """The counters of I/O threads, a part of a message too. They have to be thawed if no process continues them."""
    return {"layout": LAYOUT_OF_THREAD, "counted": {name: each.counters.hand_over() for name, each in workers.items()}}


def resume_thread_counters(saved: Mapping[str, Any], workers: Mapping[str, Worker]) -> None:
    """Continue to count for the threads of the same names. Raises LookupError, TypeError, ValueError."""
    if saved["layout"] != LAYOUT_OF_THREAD:
        log.warning(LOST, "I/O threads")
        return
    for name, numbers in saved["counted"].items():
        if name in workers:
            workers[name].counters.resume(numbers)
