"""The counters of disks, from a process to its successor: in a file in memory, because there are thousands of them."""

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
from ringplane.device.disk import Disk
from ringplane.metrics.histogram import BUCKETS
from ringplane.system.fd import Fd

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
        counted = total(disk.queues)
        if counted.any():
            if os.write(fd, counted.tobytes()) != SIZE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield number


def resume_counters(saved: Mapping[str, Any], disks: Mapping[int, Disk]) -> None:
    """Continue to count, before anybody uses these disks, which have their numbers. Raises LookupError, ValueError."""
    if saved["layout"] != LAYOUT:
        log.warning("counters begin at 0 because the previous process counted other things")
        return
    for index, number in enumerate(saved["disks"]):
        data = os.pread(saved["file"].number, SIZE, index * SIZE)
        disks[number].queues[0].resume_counters(np.frombuffer(data, np.int64))
