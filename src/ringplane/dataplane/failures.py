"""What storage fails to do: noted by compiled code, told in words the first time, then counted and told now and then.

A disk that is full, or broken, may fail a hundred thousand requests a second. Python is called for the first of a kind
(what was asked, and the errno), and once a minute for what has come since.
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

from ringplane.dataplane.merge import offset_in_image
from ringplane.dataplane.state import FAILURE, FAILURE_SIZE, KIND_FLUSH, KIND_READ, KINDS
from ringplane.native.access import view
from ringplane.native.jit import compiled

log = logging.getLogger(__name__)

TELL_AGAIN_S = 60
# Python's clock starts a little later.
TELL_AGAIN_NS = (TELL_AGAIN_S + 1) * 1_000_000_000

# A bit for each errno, as far as there are bits: where two have the same the second is told a minute later.
BITS = 62

NAMES = {"read": "reads", "write": "writes", "flush": "flushes", "discard": "discards"}


@compiled
def note_failure(worker, queue, request, result):
    """Storage answered this request with -errno, or transferred nothing (0)."""
    failure = view(queue.failures + request.kind * FAILURE_SIZE, FAILURE)
    failure.count += 1
    bit = 1 << (-result % BITS)
    if failure.untold or (failure.seen & bit and worker.now < failure.again_at):
        return
    failure.seen |= bit
    failure.again_at = worker.now + TELL_AGAIN_NS
    failure.result = result
    failure.offset = offset_in_image(request)
    failure.length = request.length - request.done
    failure.untold = 1
    worker.failing = worker.attention = 1


@dataclass
class _Told:
    """Of one kind of request: what the log says of it."""

    errors: set[int] = field(default_factory=set)
    more: int = 0
    last: str = ""
    again_at: float = 0.0


class Failures:
    """What the log is told of one disk's failures. Any thread may call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._told = {kind: _Told() for kind in KINDS}

    def take(self, noted: npt.NDArray[np.void]) -> None:
        """Take over the FAILURE structs of a queue, one for each kind of request, while nobody writes to them."""
        with self._lock:
            for kind, failure in zip(KINDS, noted, strict=True):
                if failure["count"]:
                    self._take_one(kind, failure)
                    failure["count"] = failure["untold"] = 0

    def _take_one(self, kind: str, failure: np.void) -> None:
        told, count = self._told[kind], int(failure["count"])
        if failure["untold"]:
            told.last = _describe(kind, failure)
            if int(failure["result"]) not in told.errors:
                told.errors.add(int(failure["result"]))
                log.error("%s: %s%s", self._name, told.last, CONSEQUENCES.get(kind, ""))
                told.again_at = monotonic() + TELL_AGAIN_S
                count -= 1
        told.more += count
        if monotonic() >= told.again_at:
            self._tell_more(kind, told)

    def report_rest(self) -> None:
        """What was counted and not told yet."""
        with self._lock:
            for kind, told in self._told.items():
                self._tell_more(kind, told)

    def _tell_more(self, kind: str, told: _Told) -> None:
        if told.more:
            what = NAMES.get(kind, f"requests ({kind})")
            log.error("%s: %d more %s have failed; the last that was noted: %s", self._name, told.more, what, told.last)
        told.more = 0
        told.again_at = monotonic() + TELL_AGAIN_S


CONSEQUENCES = {
    "flush": "; what was written before may be lost, so each flush fails from now on, until the disk is served anew"
}


def _describe(kind: str, failure: np.void) -> str:
    result, offset, length = (int(failure[name]) for name in ("result", "offset", "length"))
    why = os.strerror(-result)
    if result == 0:
        why = "the image ends before that" if kind == KINDS[KIND_READ] else os.strerror(errno.EIO)
    if kind == KINDS[KIND_FLUSH]:
        return f"a flush failed: {why}"
    return f"{kind} of {length} bytes at {offset} failed: {why}"
