"""Plays a recording on a disk: on an image, or through the socket of any back end; and verifies what is there then.

Entries begin in the order in which they had begun, and none begins before everything has ended that had ended when it
began in the recording. Those that were in flight together are in flight together again, unless they overlap: then the
later one waits, so that what the disk contains in the end is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ringplane.driver.driver import Unsupported
from ringplane.driver.last_changes import Numbers, different_parts, joined, last_changes
from ringplane.driver.play_targets import MOST_IN_FLIGHT, Target
from ringplane.recordings.entries import CHANGES, DISCARD, MARK, UNFINISHED, WRITE, Entry
from ringplane.recordings.reader import Recording
from ringplane.virtio.blk import SECTOR

# Bytes that are read for verification at a time.
LARGEST = 1 << 20
ZEROS = bytes(LARGEST)


@dataclass(slots=True)
class Played:
    """What was done: requests; those that the recording or the disk could not do; seconds as recorded and needed."""

    requests: int = 0
    # They had failed or not ended in the recording.
    left_out: int = 0
    unsupported: int = 0
    recorded_seconds: float = 0.0
    seconds: float = 0.0


class Player:
    """Plays one recording on one disk."""

    def __init__(self, recording: Recording, target: Target) -> None:
        self._recording, self._target = recording, target
        self._kinds = _column(recording, "kind")
        playable = (_column(recording, "result") == 0) & (_column(recording, "flags") & UNFINISHED == 0)
        chosen = np.flatnonzero(playable & (self._kinds != MARK))
        # By `began` is in the order in which they had begun.
        self._order = chosen[np.argsort(_column(recording, "began")[chosen], kind="stable")]
        self.played = Played(left_out=int(np.count_nonzero(self._kinds != MARK)) - len(chosen))
        # Those in flight, by index.
        self._ends: dict[int, tuple[Entry, Callable[[], None]]] = {}

    def _entries(self) -> Iterator[Entry]:
        return (self._recording[int(index)] for index in self._order)

    def play(self, *, timed: bool, check: Callable[[], None] = lambda: None) -> Played:
        """Play all of it, at the recorded times if `timed`. `check` is called now and then. Raises OSError."""
        start, first = time.monotonic_ns(), next((entry.begin_ns for entry in self._entries()), 0)
        last = first
        for entry in self._entries():
            check()
            if timed:
                self._wait_until(start + entry.begin_ns - first, check)
            self._make_way(entry)
            self._begin(entry)
            last = max(last, entry.end_ns)
        self._end_all()
        self._target.sync()
        self.played.recorded_seconds = (last - first) / 1e9
        self.played.seconds = (time.monotonic_ns() - start) / 1e9
        return self.played

    def _wait_until(self, moment: int, check: Callable[[], None]) -> None:
        while (left := moment - time.monotonic_ns()) > 0:
            time.sleep(min(left / 1e9, 0.1))
            check()

    def _make_way(self, entry: Entry) -> None:
        """Wait for all that has to end before this begins."""
        for index, (other, _) in tuple(self._ends.items()):
            if index < entry.began or _overlap(entry, other) or len(self._ends) >= MOST_IN_FLIGHT:
                self._end(index)

    def _begin(self, entry: Entry) -> None:
        try:
            self._ends[entry.index] = entry, self._target.begin(entry)
        except Unsupported:
            self.played.unsupported += 1

    def _end(self, index: int) -> None:
        _, end = self._ends.pop(index)
        try:
            end()
            self.played.requests += 1
        except Unsupported:
            self.played.unsupported += 1

    def _end_all(self) -> None:
        for index in tuple(self._ends):
            self._end(index)

    def differences(self, check: Callable[[], None] = lambda: None) -> Iterator[tuple[int, int]]:
        """The ranges (offset, length) that do not have what was written last. Raises OSError."""
        for place, expected in joined(self._contents(), LARGEST):
            check()
            found = self._target.read(place, len(expected))
            if found != expected:
                for start, length in different_parts(found, expected, SECTOR):
                    yield place + start, length

    def _contents(self) -> Iterator[tuple[int, bytes | memoryview]]:
        """What has to be where, in pieces of up to LARGEST; what was discarded last can be anything."""
        changes = self._order[np.isin(self._kinds[self._order], CHANGES)]
        starts = _column(self._recording, "offset")[changes]
        ends = starts + _column(self._recording, "length")[changes]
        for start, end, number in last_changes(starts, ends):
            entry = self._recording[int(changes[number])]
            if entry.kind != DISCARD:
                for place in range(start, end, LARGEST):
                    yield place, _content(entry, place, min(LARGEST, end - place))


def _column(recording: Recording, field: str) -> Numbers:
    return np.array(recording.column(field), np.int64)


def _overlap(one: Entry, other: Entry) -> bool:
    both = one.kind in CHANGES and other.kind in CHANGES
    return both and one.offset < other.offset + other.length and other.offset < one.offset + one.length


def _content(entry: Entry, place: int, size: int) -> bytes | memoryview:
    """What it has written there."""
    if entry.kind == WRITE:
        return entry.data[place - entry.offset :][:size]
    return ZEROS[:size]
