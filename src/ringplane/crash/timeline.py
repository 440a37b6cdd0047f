"""Which writes a recording has, and from when on each of them survives a power cut.

Times are numbers of entries that had ended: at time t the entries before the t-th had ended, and those that began at t
or earlier, and had not ended, were in flight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ringplane.recordings.entries import CHANGES, FLUSH, MARK, Entry

SECTOR = 512
NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Write:
    """A request that changes sectors: a write, or one whose range becomes zeros.

    It may be on the disk from `began` on, wholly or in part, and is `index`, its place in the recording, when it ends.
    From `stable` on it survives. What one that `failed` has left is unknown, also after a flush; from `gone` on it does
    not matter any more, because later ones that are stable cover it.
    """

    index: int
    began: int
    first: int
    count: int
    stable: int = NEVER
    gone: int = NEVER
    failed: bool = False

    @property
    def end(self) -> int:
        """The sector behind it."""
        return self.first + self.count

    def overlaps(self, other: Write) -> bool:
        """Whether they change the same sectors, or some of them."""
        return self.first < other.end and other.first < self.end


@dataclass(frozen=True, slots=True)
class Mark:
    """A text that the guest, or somebody outside, has put into the recording."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """The writes and marks of a recording; `writes` are in the order in which they ended."""

    entries: int
    writes: Sequence[Write]
    marks: Sequence[Mark]

    def mark_before(self, time: int) -> Mark | None:
        """The last mark that had ended."""
        return next((mark for mark in reversed(self.marks) if mark.index < time), None)

    def mark_after(self, time: int) -> Mark | None:
        """The first mark that had not ended."""
        return next((mark for mark in self.marks if mark.index >= time), None)


def timeline_of(entries: Sequence[Entry], *, cache: bool = True) -> Timeline:
    """What the entries of a recording say; without a `cache` each write is stable when it has ended."""
    flushes = [(entry.began, entry.index) for entry in entries if _succeeded(entry) and entry.kind == FLUSH]
    # From the last to the first, because a write is stable with the first flush that covers it.
    writes = [_write(entry, covered, cache) for entry, covered in _covered(entries, flushes) if _changes(entry)]
    marks = [Mark(entry.index, entry.text) for entry in entries if entry.kind == MARK]
    return Timeline(len(entries), list(_until_gone(writes))[::-1], marks)


def _covered(entries: Sequence[Entry], flushes: list[tuple[int, int]]) -> Iterator[tuple[Entry, int]]:
    """Each entry, the last one first, with the time at which a flush that covers it has ended, or NEVER."""
    first, waiting = NEVER, sorted(flushes)
    for entry in reversed(entries):
        while waiting and waiting[-1][0] > entry.index:
            first = min(first, waiting.pop()[1] + 1)
        yield entry, first


def _write(entry: Entry, covered: int, cache: bool) -> Write:
    place = entry.index, entry.began, entry.offset // SECTOR, entry.length // SECTOR
    if not _succeeded(entry):
        return Write(*place, failed=not entry.unfinished)
    return Write(*place, stable=entry.index + 1 if entry.fua or not cache else covered)


def _until_gone(writes: Sequence[Write]) -> Iterator[Write]:
    """The writes, from the last one to the first; for failed ones it is known how long they matter."""
    if not any(write.failed for write in writes):
        yield from writes
        return
    # For each sector NEVER minus the time from which on a later write is stable: zeros need no memory.
    stable = np.zeros(max(write.end for write in writes), np.int64)
    later = sorted((write for write in writes if not write.failed), key=lambda write: write.began)
    for write in writes:
        while later and later[-1].began > write.index:
            cover = later.pop()
            part = stable[cover.first : cover.end]
            np.maximum(part, NEVER - cover.stable, out=part)
        if write.failed:
            write = dataclasses.replace(write, gone=NEVER - int(stable[write.first : write.end].min()))
        yield write


def _succeeded(entry: Entry) -> bool:
    return entry.result == 0 and not entry.unfinished


def _changes(entry: Entry) -> bool:
    return entry.kind in CHANGES and entry.length >= SECTOR
