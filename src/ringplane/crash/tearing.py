"""How writes are torn: which parts of one can be there without the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from ringplane.crash.timeline import SECTOR, Write

# Units of disks; sizes in bytes.
UNITS = (512, 4096)


@dataclass(frozen=True, slots=True)
class Tearing:
    """Each unit of so many bytes, one of UNITS, is there or not; with 0 each write is."""

    unit: int

    def count(self, write: Write) -> int:
        """The number of units of a write."""
        return sum(1 for _ in self._borders(write)) + 1

    def units(self, write: Write) -> list[int]:
        """For each unit of a write its sectors: a bit for each sector of the write, the first one lowest."""
        borders = [0, *self._borders(write), write.count]
        return [(1 << end) - (1 << start) for start, end in itertools.pairwise(borders)]

    def edges(self, write: Write) -> list[int]:
        """Where it is torn if it is torn once: after so many sectors. The first, the middle and the last place."""
        found: set[int] = set()
        for unit in UNITS:
            borders = list(Tearing(unit)._borders(write)) if unit >= self.unit > 0 else []
            if borders:
                found |= {borders[0], borders[len(borders) // 2], borders[-1]}
        return sorted(found)

    def _borders(self, write: Write) -> Iterator[int]:
        """Sectors of the write at which a unit of the disk begins, without the first one."""
        if self.unit:
            size = self.unit // SECTOR
            start = -write.first % size or size
            yield from range(start, write.count, size)
