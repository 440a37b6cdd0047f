"""A policy that is asked about I/Os without a disk, at times of the test's choice."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from ringplane.engines.common import READ, WRITE
from ringplane.native.structs import new
from ringplane.policies import answers
from ringplane.policies.io_view import COPIED, HEADER_SIZE, IN_PLACE, NO_DATA, SEEN
from ringplane.policies.loading import find_policy
from ringplane.policies.running import RunningPolicy

NAMES = {
    answers.PASSED: "pass",
    answers.DELAYED: "delay",
    answers.FAILED: "fail",
    answers.HUNG: "hang",
    answers.DROPPED: "drop",
    answers.TORN: "tear",
    answers.REDIRECTED: "redirect",
}
SECOND = 1_000_000_000
DISK_SIZE = 1 << 40
PASS = ("pass", 0)

# A name, and the number that belongs to it.
Answer = tuple[str, int]


def decoded(answer: int) -> Answer:
    kind, number = answer & answers.KIND_MASK, answer >> answers.KIND_BITS & answers.NUMBER_MASK
    assert answer >> answers.TIME_SHIFT == 0, "a time besides"
    return NAMES[kind], number * (512 if kind == answers.REDIRECTED else 1)


class Asked:
    """A policy with its memory."""

    def __init__(self, address: str, **parameters: Any) -> None:
        self.policy = RunningPolicy("it", find_policy(address), parameters)
        self._seen = new(SEEN)
        self.seen = self._seen[0]
        # As after a day of uptime.
        self.now = 86_400 * SECOND

    @property
    def counters(self) -> dict[str, int]:
        return self.policy.counters

    def ask(
        self, operation: int = READ, offset: int = 0, length: int = 4096, *, fua: bool = False, ranges: int = 1
    ) -> Answer:
        """On the way down, at the time `now`."""
        return decoded(self._call(self.policy.loaded.down, operation, offset, length, fua=fua, ranges=ranges))

    def end(self, operation: int = READ, offset: int = 0, length: int = 4096, result: int = 0) -> Answer:
        """On the way up."""
        assert self.policy.loaded.up is not None
        return decoded(self._call(self.policy.loaded.up, operation, offset, length, result=result))

    def write(self, offset: int, data: bytes) -> bytes:
        """What storage gets of a write that passes; the driver's data must stay as it is."""
        buffer, iov = self._attach(data, COPIED)
        assert self.ask(WRITE, offset, len(data)) == PASS
        copy = int(self.seen["buffer"])
        assert bytes(buffer) == data
        written = ctypes.string_at(copy, len(data)) if copy else data
        self._detach()
        del iov
        return written

    def read(self, offset: int, data: bytes) -> bytes:
        """What the guest gets of a read whose data is this in storage."""
        assert self.ask(READ, offset, len(data)) == PASS
        buffer, iov = self._attach(data, IN_PLACE)
        assert self.end(READ, offset, len(data)) == PASS
        self._detach()
        del iov
        return bytes(buffer)

    def _call(
        self,
        unit: Any,
        operation: int,
        offset: int,
        length: int,
        *,
        fua: bool = False,
        result: int = 0,
        ranges: int = 1,
    ) -> int:
        header, seen = self.policy._header, self.seen
        seen["operation"], seen["offset"], seen["length"] = operation, offset, length
        seen["queue"], seen["time"], seen["fua"], seen["result"] = 0, self.now, fua, result
        seen["ranges"] = ranges
        seen["disk_size"], seen["sequence"], seen["policy"] = DISK_SIZE, header["entered"], self.policy.address
        header["entered"] += unit is self.policy.loaded.down
        return int(unit(self.policy.address + HEADER_SIZE, int(self._seen.ctypes.data)))

    def _attach(self, data: bytes, how: int) -> tuple[Any, Any]:
        """Buffers of several sizes with the data."""
        buffer = (ctypes.c_ubyte * len(data)).from_buffer_copy(data)
        start, half = ctypes.addressof(buffer), len(data) // 3
        iov = (ctypes.c_uint64 * 4)(start, half, start + half, len(data) - half)
        self.seen["data"], self.seen["iov"], self.seen["iov_count"] = how, ctypes.addressof(iov), 2
        return buffer, iov

    def _detach(self) -> None:
        if copy := int(self.seen["buffer"]):
            ctypes.CDLL(None).free(ctypes.c_void_p(copy))
        self.seen["buffer"], self.seen["data"], self.seen["iov_count"] = 0, NO_DATA, 0


def kinds(given: Sequence[Answer]) -> list[str]:
    return [name for name, _ in given]
