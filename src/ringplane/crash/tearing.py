"""How writes are torn: which parts of one can be there without the others."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ringplane.crash.timeline import SECTOR, Write

# Units of disks; sizes in bytes.
UNITS = (512, 4096)
# A write with more units is torn at so many places at most: a discarded range can have millions of units.
MOST_TORN = 64


@dataclass(frozen=True, slots=True)
class Tearing:
    """Each unit of so many bytes, one of UNITS, is there or not; with 0 each write is."""

    unit: int

    def count(self, write: Write) -> int:
        """The number of units of a write."""
        return len(self._borders(write)) + 1

    def units(self, write: Write) -> list[int]:
        """For each unit of a write its sectors: a bit for each sector of the write, the first one lowest."""
        return _parts([0, *self._borders(write), write.count])

    def some_units(self, write: Write, draw: random.Random) -> int:
        """The sectors of random units; of a large write those between a few random borders."""
        borders = self._borders(write)
        if len(borders) >= MOST_TORN:
            borders = sorted(draw.sample(borders, MOST_TORN - 1))
        return sum(part for part in _parts([0, *borders, write.count]) if draw.random() < 0.5)

    def edges(self, write: Write) -> list[int]:
        """Where it is torn if it is torn once: after so many sectors. The first, the middle and the last place."""
        found: set[int] = set()
        for unit in UNITS:
            borders = Tearing(unit)._borders(write) if unit >= self.unit > 0 else []
            if borders:
                found |= {borders[0], borders[len(borders) // 2], borders[-1]}
        return sorted(found)

    def _borders(self, write: Write) -> Sequence[int]:
        """Sectors of the write at which a unit of the disk begins, without the first one."""
        if not self.unit:
            return ()
        size = self.unit // SECTOR
        return range(-write.first % size or size, write.count, size)


def _parts(borders: Sequence[int]) -> list[int]:
    """The sectors between each two borders, a bit for each."""
    return [(1 << end) - (1 << start) for start, end in itertools.pairwise(borders)]
