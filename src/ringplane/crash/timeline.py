"""Which writes a recording has, and from when on each of them survives a power cut.

Times are numbers of entries that had ended: at time t the entries before the t-th had ended, and those that began at t
or earlier, and had not ended, were in flight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ringplane.recordings.entries import CHANGES, FLUSH, MARK, Entry

SECTOR = 512
NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Write:
    """A request that changes sectors: a write, or one whose range becomes zeros.

    It may be on the disk from `began` on, wholly or in part, and is `index`, its place in the recording, when it ends.
    From `stable` on it survives; one that failed is not there from `gone` on.
    """

    index: int
    began: int
    first: int
    count: int
    stable: int = NEVER
    gone: int = NEVER

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
    return Timeline(len(entries), writes[::-1], marks)


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
        # What a failed write has left is unknown; for the storage it is over with the next flush.
        return Write(*place, gone=NEVER if entry.unfinished else covered)
    return Write(*place, stable=entry.index + 1 if entry.fua or not cache else covered)


def _succeeded(entry: Entry) -> bool:
    return entry.result == 0 and not entry.unfinished


def _changes(entry: Entry) -> bool:
    return entry.kind in CHANGES and entry.length >= SECTOR
