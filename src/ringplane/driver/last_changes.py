"""What is on a disk after its ranges were changed several times.

A change costs as much whether it is of a sector or of the whole disk, as mkfs discards it.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]

# A range of the disk that one change was the last one to change: its start and its end, and the number of the change.
Run = tuple[int, int, int]


def last_changes(starts: Numbers, ends: Numbers) -> Iterator[Run]:
    """The runs of the disk after changes of these ranges, one after the other; in the order of their places."""
    place = 0
    # A heap of those that began before `place`, the last change first, by negative numbers. Some have ended.
    begun: list[int] = []
    for number in np.argsort(starts, kind="stable"):
        start = int(starts[number])
        yield from _runs(begun, ends, place, start)
        place = start
        heapq.heappush(begun, -int(number))
    yield from _runs(begun, ends, place, sys.maxsize)


def _runs(begun: list[int], ends: Numbers, place: int, limit: int) -> Iterator[Run]:
    """Those between two places, where no range begins."""
    while begun and place < limit:
        number = -begun[0]
        end = int(ends[number])
        if end > place:
            yield place, min(end, limit), number
            place = min(end, limit)
        if end <= place:
            heapq.heappop(begun)


def joined(contents: Iterable[tuple[int, bytes | memoryview]], most: int) -> Iterator[tuple[int, bytes]]:
    """The same contents at the same places, but those that touch are one, up to this size."""
    start, size = 0, 0
    parts: list[bytes | memoryview] = []
    for place, content in contents:
        if parts and (place != start + size or size + len(content) > most):
            yield start, b"".join(parts)
            parts, size = [], 0
        start = place - size
        parts.append(content)
        size += len(content)
    if parts:
        yield start, b"".join(parts)


def different_parts(found: bytes, expected: bytes, unit: int) -> Iterator[tuple[int, int]]:
    """Where units are different: the start and the length of each run of them."""
    begin = None
    # Behind the end nothing is different.
    for place in range(0, len(expected) + unit, unit):
        different = found[place : place + unit] != expected[place : place + unit]
        if different and begin is None:
            begin = place
        elif not different and begin is not None:
            yield begin, min(place, len(expected)) - begin
            begin = None
