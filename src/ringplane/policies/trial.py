"""A policy tried without a disk: what it answers to a table of requests."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ringplane.engines.common import DISCARD, FLUSH, READ, WRITE, ZERO
from ringplane.native.structs import new
from ringplane.policies.answers import (
    DELAYED,
    DROPPED,
    FAILED,
    HUNG,
    KIND_BITS,
    KIND_MASK,
    MANTISSA_BITS,
    MANTISSA_MASK,
    NUMBER_MASK,
    PASSED,
    REDIRECTED,
    SECTOR,
    TIME_SHIFT,
    TORN,
)
from ringplane.policies.io_view import COPIED, HEADER_SIZE, IN_PLACE, MOST_COPIED, NO_DATA, SEEN
from ringplane.policies.running import RunningPolicy

DISK_SIZE, SECOND_NS = 1 << 30, 1_000_000_000
NAMES = {READ: "read", WRITE: "write", FLUSH: "flush", DISCARD: "discard", ZERO: "write-zeroes"}
WORDS = {
    PASSED: "pass",
    DELAYED: "delay({}us)",
    FAILED: "fail({})",
    HUNG: "hang",
    DROPPED: "drop",
    TORN: "tear({})",
    REDIRECTED: "redirect({})",
}


@dataclass(frozen=True)
class Request:
    """One of the table; `ms`: when it comes."""

    ms: int
    operation: int
    offset: int
    length: int
    fua: bool = False

    def __str__(self) -> str:
        where = f" of {self.length} bytes at {self.offset}" if self.length else ""
        return f"{self.ms:4} ms  {NAMES[self.operation]}{where}{', FUA' if self.fua else ''}"


# What guests do: sequential and random ones, small and large, at the beginning and the end of the disk.
TABLE = (
    Request(0, READ, 0, 4096),
    Request(0, READ, 4096, 4096),
    Request(1, WRITE, 0, 4096),
    Request(1, WRITE, 1 << 20, 4096),
    Request(1, WRITE, 1 << 20, 131072),
    Request(2, FLUSH, 0, 0),
    Request(2, READ, 1 << 20, 131072),
    Request(3, WRITE, DISK_SIZE - 4096, 4096, fua=True),
    Request(4, DISCARD, 8 << 20, 1 << 20),
    Request(4, ZERO, 8 << 20, 65536),
    Request(500, READ, 8 << 20, 65536),
    Request(1000, FLUSH, 0, 0),
)


class Trial:
    """One policy, and the table as its only requests."""

    def __init__(self, policy: RunningPolicy) -> None:
        self._policy = policy
        self._array = new(SEEN)
        self._seen = self._array[0]

    def run(self) -> Iterator[str]:
        """A line for each request."""
        for request in TABLE:
            answer, changed = self._ask(request, on_the_way_back=False)
            words = in_words(answer) + (", data changed" if changed else "")
            if (
                _is_answer(answer)
                and answer & KIND_MASK not in (FAILED, HUNG, DROPPED)
                and self._policy.loaded.up is not None
            ):
                after, changed = self._ask(request, on_the_way_back=True)
                words += f"; its result: {in_words(after)}{', data changed' if changed else ''}"
            yield f"{request}: {words}"

    def _ask(self, request: Request, *, on_the_way_back: bool) -> tuple[int, bool]:
        policy, seen, loaded = self._policy, self._seen, self._policy.loaded
        for name in self._array.dtype.names or ():
            seen[name] = 0
        seen["operation"], seen["offset"], seen["length"] = request.operation, request.offset, request.length
        seen["fua"], seen["disk_size"], seen["policy"] = request.fua, DISK_SIZE, policy.address
        seen["ranges"], seen["room"] = 1, MOST_COPIED
        # As after an hour of uptime.
        seen["time"] = 3600 * SECOND_NS + request.ms * SECOND_NS // 1000
        seen["sequence"] = policy.enter(0 if on_the_way_back else 1)
        data = np.zeros(request.length, np.uint8)
        vector = np.array([data.ctypes.data, request.length], np.int64)
        if loaded.program.data and request.operation == (READ if on_the_way_back else WRITE):
            seen["data"] = IN_PLACE if on_the_way_back else COPIED
            seen["iov"], seen["iov_count"] = vector.ctypes.data, 1
        unit = loaded.up if on_the_way_back and loaded.up is not None else loaded.down
        answer = unit(policy.address + HEADER_SIZE, int(self._array.ctypes.data))
        seen["data"] = NO_DATA
        return answer, bool(data.any()) or self._take_copy()

    def _take_copy(self) -> bool:
        """Whether the data of a write was changed."""
        address = int(self._seen["buffer"])
        if not address:
            return False
        changed = any(ctypes.string_at(address, int(self._seen["length"])))
        ctypes.CDLL(None).free(ctypes.c_void_p(address))
        return changed


def _is_answer(answer: int) -> bool:
    return answer >= 0 and answer & KIND_MASK in WORDS


def in_words(answer: int) -> str:
    """An answer as its author writes it."""
    kind, number, coded = answer & KIND_MASK, answer >> KIND_BITS & NUMBER_MASK, answer >> TIME_SHIFT
    if not _is_answer(answer):
        return f"{answer}, which is not an answer: the request fails"
    text = WORDS[kind].format(number * SECTOR if kind == REDIRECTED else number)
    time = (coded & MANTISSA_MASK) << (coded >> MANTISSA_BITS)
    return f"after({time}us, {text})" if time else text
