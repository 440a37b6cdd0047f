"""A disk with a volatile cache, as simple as it can be: all contents that its sectors can have after a power cut.

It knows nothing of cuts that matter, subsets or orders. A sector's history is the list of versions that reached the
cache, in their order; the medium has one of them, and takes over a later one whenever it likes. So all that can happen
is tried step by step.
"""

from __future__ import annotations

import errno
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ringplane.recordings.entries import FLUSH, FUA, UNFINISHED, WRITE, Header
from ringplane.recordings.reader import Recording
from ringplane.recordings.writer import RecordingWriter

SECTOR = 512


@dataclass(frozen=True)
class Request:
    """A write of these sectors, each with the byte `value`; or a flush, if there are none.

    Requests of other kinds that change sectors are writes of zeros. One that `failed` may have left anything.
    """

    first: int = 0
    count: int = 0
    value: int = 0
    fua: bool = False
    kind: int = WRITE
    failed: bool = False

    def touches(self, sector: int) -> bool:
        return self.first <= sector < self.first + self.count


@dataclass(frozen=True)
class Step:
    """The request begins, or ends."""

    number: int
    begins: bool


Steps = Sequence[Step]
# The versions of a sector that have reached the cache, as numbers of requests, and up to which of them the medium is.
History = tuple[tuple[int, ...], int]


def recorded(sectors: int, requests: Sequence[Request], steps: Steps, **header: int) -> Recording:
    """What the recorder would have stored of these steps."""
    file = io.BytesIO()
    writer = RecordingWriter(file, Header(size=sectors * SECTOR, **header))
    began: dict[int, int] = {}
    for step in steps:
        if step.begins:
            began[step.number] = writer.count
        else:
            add(writer, requests[step.number], began.pop(step.number), 0)
    for number, when in began.items():
        add(writer, requests[number], when, UNFINISHED)
    writer.end()
    return Recording(memoryview(file.getvalue()))


def add(writer: RecordingWriter, request: Request, began: int, flags: int) -> None:
    length = request.count * SECTOR
    kind = request.kind if request.count else FLUSH
    data = bytes([request.value]) * (length if kind == WRITE else 0)
    flags |= FUA if request.fua else 0
    result = -errno.EIO if request.failed and not flags & UNFINISHED else 0
    place = {"offset": request.first * SECTOR, "length": length}
    writer.add(kind, data=data, **place, began=began, flags=flags, result=result)


def possible_disks(
    sectors: int, requests: Sequence[Request], steps: Steps, *, cache: bool = True
) -> set[tuple[int, ...]]:
    """Every content that the disk can have after a power cut at any time: the value of each sector, 0 at first."""
    found: set[tuple[int, ...]] = set()
    per_sector = [list(possible_values(sector, requests, steps, cache)) for sector in range(sectors)]
    for values in zip(*per_sector, strict=True):
        found |= set(itertools.product(*values))
    return found


def possible_values(sector: int, requests: Sequence[Request], steps: Steps, cache: bool) -> Iterator[set[int]]:
    """The values that a sector can have after each step, and before the first."""
    histories: set[History] = {((), 0)}
    in_flight: set[int] = set()
    ended: set[int] = set()
    # By flush: the writes that had ended when it began.
    covers: dict[int, set[int]] = {}
    yield {0}
    for step in steps:
        request = requests[step.number]
        if step.begins:
            in_flight.add(step.number)
            covers[step.number] = set(ended)
        else:
            in_flight.discard(step.number)
            # One that failed may have reached the cache, or not, and nothing is promised.
            if not request.failed:
                must_be_stable: Iterable[int] = ()
                if not request.count:
                    must_be_stable = covers[step.number]
                elif request.fua or not cache:
                    must_be_stable = [step.number]
                if request.touches(sector):
                    histories = {each for each in histories if step.number in each[0]}
                histories = {each for each in histories if all(is_stable(each, number) for number in must_be_stable)}
                ended.add(step.number)
        histories = everything_after(histories, {number for number in in_flight if requests[number].touches(sector)})
        yield {requests[versions[seen - 1]].value if seen else 0 for versions, seen in histories}


def is_stable(history: History, number: int) -> bool:
    versions, seen = history
    return number not in versions or versions.index(number) < seen


def everything_after(histories: set[History], in_flight: set[int]) -> set[History]:
    """What can happen without another step: versions reach the cache, and the medium takes them over."""
    found, fresh = set(histories), list(histories)
    while fresh:
        versions, seen = fresh.pop()
        more = [((*versions, number), seen) for number in in_flight - set(versions)]
        more += [(versions, later) for later in range(seen + 1, len(versions) + 1)]
        fresh += [each for each in more if each not in found]
        found |= set(more)
    return found
