"""The moments at which the power is cut, and the writes that can be missing then.

What a cut can leave at one moment, it can leave at a later one too, as long as no write becomes stable between them. So
only the moments matter at which the next entry that ends makes a write stable, and the end of the recording. They have
also the most marks before them, so they are the strictest for a check of what a guest was promised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ringplane.crash.timeline import NEVER, Timeline, Write


@dataclass(frozen=True, eq=False)
class PowerCut:
    """The power is cut at this time.

    `pending` are the writes of which it is open whether they are on the disk, or in which order they came there, by the
    order in which they ended; `loose` are the places in it of those that can be missing. The first `settled` ones of
    `landed` are on the disk, whatever happens, below the pending ones: they had ended at `settled_by`.
    """

    number: int
    time: int
    pending: tuple[Write, ...]
    loose: tuple[int, ...]
    # All cuts share it, each has more of it than the one before.
    landed: Sequence[Write] = ()
    settled: int = 0
    settled_by: int = 0


def power_cuts(timeline: Timeline, since: int = 0) -> list[PowerCut]:
    """All cuts that matter, from this time on."""
    return list(_cuts(timeline, sorted(moments(timeline, since))))


def moments(timeline: Timeline, since: int) -> set[int]:
    """The times just before a write becomes stable, or does not matter any more; and the end."""
    ends = {min(write.stable, write.gone) - 1 for write in timeline.writes} | {timeline.entries}
    return {time for time in ends if since <= time < NEVER - 1}


def _cuts(timeline: Timeline, times: list[int]) -> Iterator[PowerCut]:
    coming = sorted(timeline.writes, key=lambda write: write.began, reverse=True)
    present: list[Write] = []
    landed: list[Write] = []
    settled_by = 0
    for number, time in enumerate(times):
        while coming and coming[-1].began <= time:
            present.append(coming.pop())
        present = sorted((write for write in present if write.gone > time), key=lambda write: write.index)
        pending = list(_pending(present, time))
        settled = sorted(set(present) - set(pending), key=lambda write: write.index)
        settled_by = max([settled_by, *(write.index + 1 for write in settled)])
        landed += settled
        present = pending
        loose = tuple(place for place, write in enumerate(pending) if write.stable > time)
        yield PowerCut(number, time, tuple(pending), loose, landed, len(landed), settled_by)


def _pending(present: Sequence[Write], time: int) -> Iterator[Write]:
    """Those of the present writes that are loose, or may have come after a loose one, or in another order.

    One that is settled stays settled: no later cut has a loose write that began before it ended and was not present.
    """
    # What had ended before any loose write began is below all of them.
    border = min((write.began for write in present if write.stable > time), default=NEVER)
    window = [write for write in present if write.index >= border or write.stable > time]
    crowd = _Crowd(window)
    for place, write in enumerate(window):
        if write.stable > time or crowd.hold(place):
            crowd.pending[place] = True
            yield write


class _Crowd:
    """Writes in the order in which they ended, of which some are pending."""

    def __init__(self, writes: Sequence[Write]) -> None:
        self.pending = np.zeros(len(writes), np.bool_)
        self._index, self._began, self._first, self._end = (
            np.array([getattr(write, name) for write in writes], np.int64)
            for name in ("index", "began", "first", "end")
        )

    def hold(self, place: int) -> bool:
        """Whether this write overlaps one that was in flight with it, or an earlier one that is pending."""
        overlapping = (self._first < self._end[place]) & (self._end > self._first[place])
        together = (self._began <= self._index[place]) & (self._index >= self._began[place])
        overlapping[place] = False
        return bool((overlapping & (together | self.pending)).any())
