"""The content of a disk in some state, as a file that can be written to. What is written to it is kept in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import numpy as np

from ringplane.crash.crash_states import State
from ringplane.crash.disk_state import Change, DiskState
from ringplane.crash.sector_contents import (
    BASE,
    CHECKED,
    IN_CHECK,
    NOWHERE,
    ZEROS,
    Numbers,
    Places,
    SectorContents,
    runs,
)
from ringplane.crash.timeline import SECTOR

# A range of bytes: the first one, and the one behind it.
Range = tuple[int, int]

# Of the page cache.
PAGE = 4096


class ChangingState(DiskState):
    """A state that knows which ranges have changed: first sectors and numbers of sectors."""

    def _start(self) -> None:
        super()._start()
        self.changed = [(0, self.contents.sectors)]

    def change(self, first: int, numbers: Numbers) -> Change:
        self.changed.append((first, len(numbers)))
        return super().change(first, numbers)


class View:
    """The content of the file: a state, and what a check has written since then. Any thread may use it at any time."""

    def __init__(self, contents: SectorContents) -> None:
        self._disk = ChangingState(contents)
        self.size = contents.sectors * SECTOR
        self._checked: dict[int, bytes] = {}
        self._undo: list[Change] = []
        self._lock = threading.Lock()

    def show(self, state: State) -> list[Range]:
        """From now on the file has this content; returns the ranges in which it can be different, as whole pages."""
        with self._lock:
            for first, before in reversed(self._undo):
                self._disk.change(first, before)
            self._undo.clear()
            self._checked.clear()
            self._disk.become(state)
            changed = whole_pages(self._disk.changed)
            self._disk.changed.clear()
        return changed

    def read(self, offset: int, size: int) -> bytes:
        """Less is read at the end of the file."""
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        first = offset // SECTOR
        with self._lock:
            data = b"".join(self._parts(first, -(-end // SECTOR)))
        return data[offset - first * SECTOR : end - first * SECTOR]

    def _parts(self, first: int, end: int) -> Iterator[bytes | memoryview]:
        numbers = self._disk.numbers[first:end]
        if not numbers.any():
            yield self._disk.contents.data_of(first, end - first)
            return
        places = self._places(first, end)
        for start, stop in runs(places):
            place = int(places[start])
            if place == NOWHERE:
                yield bytes((stop - start) * SECTOR)
            elif place >= IN_CHECK:
                yield b"".join(self._checked[sector] for sector in range(first + start, first + stop))
            else:
                yield self._disk.contents.data_of(place, stop - start)

    def _places(self, first: int, end: int) -> Places:
        numbers = self._disk.numbers[first:end]
        places = self._disk.contents.places[numbers]
        here = np.arange(first, end)
        places = np.where(numbers == BASE, here, places)
        return np.where(numbers == CHECKED, here | IN_CHECK, places)

    def write(self, offset: int, data: bytes) -> None:
        """The range is within the file."""
        with self._lock:
            self._write(offset, data)

    def _write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        first, behind = offset // SECTOR, -(-end // SECTOR)
        if offset % SECTOR or end % SECTOR:
            whole = b"".join(self._parts(first, behind))
            data = whole[: offset - first * SECTOR] + data + whole[end - first * SECTOR :]
        for sector in range(first, behind):
            start = (sector - first) * SECTOR
            self._checked[sector] = data[start : start + SECTOR]
        self._change(first, np.full(behind - first, CHECKED, np.uint32))

    def zero(self, offset: int, size: int) -> None:
        """The range is within the file."""
        first, behind = -(-offset // SECTOR), (offset + size) // SECTOR
        with self._lock:
            if first >= behind:
                self._write(offset, bytes(size))
                return
            self._write(offset, bytes(first * SECTOR - offset))
            self._write(behind * SECTOR, bytes(offset + size - behind * SECTOR))
            self._change(first, np.full(behind - first, ZEROS, np.uint32))

    def _change(self, first: int, numbers: Numbers) -> None:
        if len(numbers):
            self._undo.append(self._disk.change(first, numbers))


def whole_pages(changed: Iterable[tuple[int, int]]) -> list[Range]:
    """The ranges of bytes with these sectors, given as first ones and numbers; ascending, and apart from each other."""
    found: list[Range] = []
    for first, number in sorted(changed):
        start, end = first * SECTOR // PAGE * PAGE, -(-(first + number) * SECTOR // PAGE) * PAGE
        if found and start <= found[-1][1]:
            start, before = found.pop()
            end = max(before, end)
        found.append((start, end))
    return found
