"""A disk in a state that a power cut has left: made from the state before by changing only what is different."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ringplane.crash.crash_states import ALL, NOTHING, State
from ringplane.crash.power_cuts import PowerCut
from ringplane.crash.sector_contents import Numbers, SectorContents
from ringplane.crash.timeline import Write

# For changes of at most so many sectors the random numbers are kept.
MOST_KEPT = 256

# A change of sectors that can be undone: the first sector, and their numbers before.
Change = tuple[int, Numbers]


class DiskState:
    """The numbers of the contents of all sectors (sector_contents.py).

    First come the writes that are settled, then the pending ones of a state, then what a check has written. The last
    two can be undone.
    """

    def __init__(self, contents: SectorContents) -> None:
        self.contents = contents
        self._start()

    def _start(self) -> None:
        self.numbers: Numbers = np.zeros(self.contents.sectors, np.uint32)
        self.numbers[self.contents.changed] = self.contents.before
        # So many of the writes that have landed.
        self._settled = 0
        self._cut: PowerCut | None = None
        # The pending writes as they are applied: place and sectors of each, and how to undo it.
        self._applied: list[tuple[int, int]] = []
        self._undo: list[list[Change]] = []

    def become(self, state: State) -> None:
        """Make this the state of the disk."""
        if state.cut is not self._cut:
            self._move(state.cut)
        wanted = [(place, state.kept[place]) for place in state.order or range(len(state.kept))]
        same = common_length(wanted, self._applied)
        self._undo_to(same)
        for place, kept in wanted[same:]:
            self._undo.append(self._put(state.cut.pending[place], kept) if kept != NOTHING else [])
        self._applied = wanted

    def _move(self, cut: PowerCut) -> None:
        self._undo_to(0)
        if cut.settled < self._settled:
            self._start()
        self._cut = cut
        for write in cut.landed[self._settled : cut.settled]:
            self._put(write, ALL)
        self._settled = cut.settled

    def _undo_to(self, number: int) -> None:
        """Undo all except this number of pending writes."""
        while len(self._undo) > number:
            for first, before in reversed(self._undo.pop()):
                self.change(first, before)
        del self._applied[number:]

    def _put(self, write: Write, kept: int) -> list[Change]:
        """The kept sectors of a write are on the disk; returns how to undo it."""
        written = self.contents.written(write)
        parts = [(0, write.count)] if kept == ALL else bit_runs(kept)
        return [self.change(write.first + start, written[start:end]) for start, end in parts]

    def change(self, first: int, numbers: Numbers) -> Change:
        """Sectors from `first` on have this content; returns how to undo it."""
        before = self.numbers[first : first + len(numbers)].copy()
        self.numbers[first : first + len(numbers)] = numbers
        return first, before


class Fingerprints(DiskState):
    """Tells states apart: their fingerprints are the same if they are the same byte for byte.

    A fingerprint is the XOR of a random number for each pair of sector and content. So a change costs as much as it
    changes, and no image is read.
    """

    def _start(self) -> None:
        super()._start()
        self.fingerprint = 0

    def of(self, state: State) -> int:
        """The fingerprint of a state."""
        self.become(state)
        return self.fingerprint

    def change(self, first: int, numbers: Numbers) -> Change:
        change = super().change(first, numbers)
        self.fingerprint ^= _mixed(first, change[1]) ^ _mixed(first, numbers)
        return change


def _mixed(first: int, numbers: Numbers) -> int:
    """The XOR of the random numbers of these contents at sectors from `first` on."""
    # The same writes are put and undone again and again.
    return _mixed_once(first, numbers.tobytes()) if len(numbers) <= MOST_KEPT else _computed(first, numbers)


@lru_cache(maxsize=1 << 15)
def _mixed_once(first: int, numbers: bytes) -> int:
    return _computed(first, np.frombuffer(numbers, np.uint32))


def _computed(first: int, numbers: Numbers) -> int:
    """By splitmix64."""
    mixed: npt.NDArray[np.uint64] = np.arange(first, first + len(numbers), dtype=np.uint64)
    mixed = (mixed << np.uint64(32) | numbers) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return int(np.bitwise_xor.reduce(mixed ^ mixed >> np.uint64(31)))


def common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items at the beginning are the same."""
    pairs = zip(one, other, strict=False)
    return next((number for number, (each, its) in enumerate(pairs) if each != its), min(len(one), len(other)))


def bit_runs(bits: int) -> list[tuple[int, int]]:
    """Where runs of set bits begin and end."""
    found, start = [], 0
    while bits:
        skipped = (bits & -bits).bit_length() - 1
        bits >>= skipped
        length = (~bits & (bits + 1)).bit_length() - 1
        found.append((start + skipped, start + skipped + length))
        bits >>= length
        start += skipped + length
    return found
