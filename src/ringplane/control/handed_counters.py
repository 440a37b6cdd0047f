"""Counters from a process to its successor; those of disks in a file in memory, because there are thousands of them."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

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


@contextlib.contextmanager
def saved_counters(disks: Iterable[Disk]) -> Iterator[dict[str, Any]]:
    """A part of a message; its fd is closed at the end of the `with`. Raises OSError.

    `disks` are the numbers of those disks that have counted anything, in the order in which the file has them.
    """
    fd = os.memfd_create("ringplane-counters", os.MFD_CLOEXEC)
    try:
        yield {"layout": LAYOUT, "file": Fd(fd), "disks": list(_write(fd, disks))}
    finally:
        os.close(fd)


def _write(fd: int, disks: Iterable[Disk]) -> Iterator[int]:
    for number, disk in enumerate(disks):
        counted = total(disk.started)
        if counted.any():
            if os.write(fd, counted.tobytes()) != SIZE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield number


def resume_counters(saved: Mapping[str, Any], disks: Mapping[int, Disk]) -> None:
    """Continue to count, before anybody uses these disks, which have their numbers. Raises LookupError, ValueError."""
    if saved["layout"] != LAYOUT:
        log.warning(LOST, "disks")
        return
    for index, number in enumerate(saved["disks"]):
        data = os.pread(saved["file"].number, SIZE, index * SIZE)
        disks[number].queues[0].resume_counters(np.frombuffer(data, np.int64))


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
