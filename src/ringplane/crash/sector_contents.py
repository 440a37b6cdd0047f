"""What sectors contain: each different content has a number, and is read from the base image or the recording.

So a state of a disk is an array of numbers. Two states are the same byte for byte if their arrays are the same.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ringplane.crash.timeline import SECTOR, Write
from ringplane.recordings.entries import WRITE, Entry

Numbers = npt.NDArray[np.uint32]
Places = npt.NDArray[np.int64]

# Numbers of contents: of the base image, where nothing in the recording writes; zeros; what a check has written.
BASE, ZEROS, CHECKED = range(3)

# Where a content is: a sector of the base image, a sector of an entry of the recording, or elsewhere. The place of
# zeros is not adjacent to any other.
NOWHERE, IN_ENTRY, IN_CHECK = -2, 1 << 61, 1 << 62
ENTRY_SHIFT = 22

# So many sectors are read between two calls of `check`.
BETWEEN_CHECKS = 4096


class SectorContents:
    """The contents of all sectors that the writes of a recording change, before and after each."""

    def __init__(
        self,
        base: memoryview,
        entries: Sequence[Entry],
        writes: Sequence[Write],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`base` is the image when the recording began. `check` is called now and then: it may raise an exception."""
        self._base, self._entries, self._check = base, entries, check
        self.sectors = len(base) // SECTOR
        self._numbers: dict[bytes, int] = {_digest(bytes(SECTOR)): ZEROS}
        self._places = array("q", [0, NOWHERE, 0])
        # By index of the write.
        self._written: dict[int, Numbers] = {}
        # The sectors that are changed, and what was there at the beginning.
        self.changed = changed_sectors(writes, self.sectors)
        self.before = self._of_base()
        for write in writes:
            check()
            self._written[write.index] = self._of_write(write)
        self.places: Places = np.array(self._places, np.int64)
        del self._numbers

    def written(self, write: Write) -> Numbers:
        """The numbers of what a write leaves in its sectors."""
        return self._written[write.index]

    def _of_base(self) -> Numbers:
        """A discarded range can be the whole disk, and most of that zeros, which are found quickly."""
        found = np.full(len(self.changed), ZEROS, np.uint32)
        for start in range(0, len(self.changed), BETWEEN_CHECKS):
            self._check()
            part = self.changed[start : start + BETWEEN_CHECKS]
            places = [int(sector) for first, end in runs(part) for sector in self._with_data(part[first], end - first)]
            data = (self._base[sector * SECTOR : (sector + 1) * SECTOR] for sector in places)
            found[start + np.searchsorted(part, places)] = self._numbered(data, places, len(places))
        return found

    def _with_data(self, first: int, count: int) -> Places:
        """Those of adjacent sectors of the base image that are not zeros."""
        words = np.frombuffer(self._base[first * SECTOR : (first + count) * SECTOR], np.uint64)
        return first + np.flatnonzero(words.reshape(count, -1).any(axis=1))

    def _of_write(self, write: Write) -> Numbers:
        entry = self._entries[write.index]
        if entry.kind != WRITE:
            # It needs no memory.
            return np.broadcast_to(np.uint32(ZEROS), write.count)
        data = (entry.data[start : start + SECTOR] for start in range(0, write.count * SECTOR, SECTOR))
        first = IN_ENTRY | write.index << ENTRY_SHIFT
        return self._numbered(data, range(first, first + write.count), write.count)

    def _numbered(self, data: Iterable[memoryview], places: Iterable[int], count: int) -> Numbers:
        return np.fromiter(map(self._number, data, places), np.uint32, count)

    def _number(self, data: memoryview, place: int) -> int:
        number = self._numbers.setdefault(_digest(data), len(self._places))
        if number == len(self._places):
            self._places.append(place)
        return number

    def data_of(self, place: int, sectors: int) -> memoryview:
        """The data of adjacent places, in the base image or in an entry."""
        if place & IN_ENTRY:
            entry = self._entries[(place ^ IN_ENTRY) >> ENTRY_SHIFT]
            start = (place & (1 << ENTRY_SHIFT) - 1) * SECTOR
            return entry.data[start : start + sectors * SECTOR]
        return self._base[place * SECTOR : (place + sectors) * SECTOR]


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def changed_sectors(writes: Sequence[Write], sectors: int) -> Places:
    """The numbers of all sectors that some write changes, ascending."""
    changed = np.zeros(sectors, np.bool_)
    for write in writes:
        changed[write.first : write.end] = True
    return np.flatnonzero(changed)


def runs(places: Places) -> Iterator[tuple[int, int]]:
    """Where adjacent places begin and end: each the one before plus one, or all the same zeros."""
    steps = np.diff(places)
    breaks = np.flatnonzero((steps != 1) & ((steps != 0) | (places[1:] != NOWHERE))) + 1
    borders = [0, *breaks.tolist(), len(places)]
    yield from itertools.pairwise(borders)
