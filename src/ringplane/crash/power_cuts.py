"""The moments at which the power is cut, and the writes that can be missing then.

What a cut can leave at one moment, it can leave at a later one too, as long as no write becomes stable between them. So
only the moments matter at which the next entry that ends makes a write stable, and the end of the recording. They have
also the most marks before them, so they are the strictest for a check of what a guest was promised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ringplane.crash.timeline import NEVER, Timeline, Write


@dataclass(frozen=True, eq=False)
class PowerCut:
    """The power is cut at this time.

    All writes before `settled` that succeeded are on the disk, in their order. `pending` are the later ones, in the
    order in which they ended; `loose` are the places in it of those that can be missing.
    """

    number: int
    time: int
    settled: int
    pending: tuple[Write, ...]
    loose: tuple[int, ...]


def power_cuts(timeline: Timeline, since: int = 0) -> list[PowerCut]:
    """All cuts that matter, from this time on."""
    times = sorted(moments(timeline, since))
    return [PowerCut(number, *cut) for number, cut in enumerate(_cuts(timeline, times))]


def moments(timeline: Timeline, since: int) -> set[int]:
    """The times just before a write becomes stable, or is known to be missing; and the end."""
    ends = {min(write.stable, write.gone) - 1 for write in timeline.writes} | {timeline.entries}
    return {time for time in ends if since <= time < NEVER - 1}


def _cuts(timeline: Timeline, times: list[int]) -> Iterator[tuple[int, int, tuple[Write, ...], tuple[int, ...]]]:
    coming = sorted(timeline.writes, key=lambda write: write.began, reverse=True)
    present: list[Write] = []
    for time in times:
        while coming and coming[-1].began <= time:
            present.append(coming.pop())
        present = [write for write in present if write.gone > time]
        loose = [write for write in present if write.stable > time]
        # Those that ended before any loose one began are on the disk whatever happens.
        settled = min((write.began for write in loose), default=time)
        present = sorted((write for write in present if write.index >= settled), key=lambda write: write.index)
        places = tuple(place for place, write in enumerate(present) if write.stable > time)
        yield time, settled, tuple(present), places
