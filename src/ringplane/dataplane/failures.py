"""Errors of storage: recorded by compiled code, logged by Python the first time, then counted and summed up.

A disk that is full, or broken, may fail a hundred thousand requests per second. Python is called for the first error of
a kind (the request and the errno), and once per minute for those that have come since.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from dataclasses import dataclass, field
from time import monotonic

import numpy as np
import numpy.typing as npt

from ringplane.block.io import BLOCK_IO, ENDS_EARLY
from ringplane.compiler.units import unit
from ringplane.dataplane.state import (
    FAILURE,
    FAILURE_SIZE,
    KIND_FLUSH,
    KIND_READ,
    KINDS,
    QUEUE,
    REQUEST,
    WORKER,
)
from ringplane.log.event_bus import Emit, no_events
from ringplane.log.logs import DiskLog
from ringplane.native.access import view

log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 60
# A little longer, because Python takes its time stamp later.
REPORT_INTERVAL_NS = (REPORT_INTERVAL_S + 1) * 1_000_000_000

# One bit for each errno, as far as there are bits: if two share one, the second is reported a minute later.
BITS = 62

NAMES = {"read": "reads", "write": "writes", "flush": "flushes", "discard": "discards"}


@unit
def record_failure(worker_address, queue_address, request_address, io_address):
    """Storage failed the block I/O of this request. A unit, because it is rare."""
    worker, queue = view(worker_address, WORKER), view(queue_address, QUEUE)
    request, io = view(request_address, REQUEST), view(io_address, BLOCK_IO)
    # 0: nothing was transferred.
    result = io.result if io.result != ENDS_EARLY else 0
    failure = view(queue.failures + request.kind * FAILURE_SIZE, FAILURE)
    failure.count += 1
    bit = 1 << (-result % BITS)
    if failure.unreported or (failure.seen & bit and worker.now < failure.report_at):
        return 0
    failure.seen |= bit
    failure.report_at = worker.now + REPORT_INTERVAL_NS
    failure.result = result
    failure.offset = io.offset + io.done
    failure.length = io.length - io.done
    failure.unreported = 1
    worker.failing = worker.attention = 1
    return 0


@dataclass
class _Reported:
    """What has been logged of one kind of request, and what is still to be logged."""

    errors: set[int] = field(default_factory=set)
    more: int = 0
    last: str = ""
    report_at: float = 0.0


class Failures:
    """Logs the failures of one disk. Any thread may call."""

    def __init__(self, name: str, emit: Emit = no_events) -> None:
        self._logger = DiskLog(log, name)
        self._emit = emit
        self._lock = threading.Lock()
        self._reported = {kind: _Reported() for kind in KINDS}

    def take(self, noted: npt.NDArray[np.void]) -> None:
        """Take over the FAILURE structs of a queue, one per kind of request, while nobody writes to them."""
        with self._lock:
            for kind, failure in zip(KINDS, noted, strict=True):
                if failure["count"]:
                    self._take_one(kind, failure)
                    failure["count"] = failure["unreported"] = 0

    def _take_one(self, kind: str, failure: np.void) -> None:
        reported, count = self._reported[kind], int(failure["count"])
        if failure["unreported"]:
            reported.last = _describe(kind, failure)
            self._emit(
                "io-error",
                operation=kind,
                error=errno.errorcode.get(-int(failure["result"]), "EIO"),
                message=reported.last,
            )
            if int(failure["result"]) not in reported.errors:
                reported.errors.add(int(failure["result"]))
                self._logger.error("%s%s", reported.last, CONSEQUENCES.get(kind, ""))
                reported.report_at = monotonic() + REPORT_INTERVAL_S
                count -= 1
        reported.more += count
        if monotonic() >= reported.report_at:
            self._report_more(kind, reported)

    def report_rest(self) -> None:
        """Log what was counted and not reported yet."""
        with self._lock:
            for kind, reported in self._reported.items():
                self._report_more(kind, reported)

    def _report_more(self, kind: str, reported: _Reported) -> None:
        if reported.more:
            what = NAMES.get(kind, f"requests ({kind})")
            self._logger.error("%d more %s have failed; the last one: %s", reported.more, what, reported.last)
        reported.more = 0
        reported.report_at = monotonic() + REPORT_INTERVAL_S


CONSEQUENCES = {
    "discard": "; discard is advice: the range is left as it is, and the request succeeds",
    "flush": "; earlier writes may be lost, so each flush fails until the disk is stopped and started again",
}


def _describe(kind: str, failure: np.void) -> str:
    result, offset, length = (int(failure[name]) for name in ("result", "offset", "length"))
    why = os.strerror(-result)
    if result == 0:
        why = "the image ends before that" if kind == KINDS[KIND_READ] else os.strerror(errno.EIO)
    if kind == KINDS[KIND_FLUSH]:
        return f"a flush failed: {why}"
    return f"{kind} of {length} bytes at {offset} failed: {why}"
