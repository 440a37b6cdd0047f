"""Power cuts of regular disks: the requests to the storage and the completions that the driver sees are recorded, then
the power is cut at every point of the record.

    cd tests && python -m storage.powercut --seconds 600

The image is on a file system written for this test (fuse.py), which completes late and in any order. A write is stable
after a sync that started after the write had ended (with O_DSYNC at its own end). After a cut a sector contains its
last stable data, or any data written to it after that: the storage may have kept or lost each sector independently.
The laboratory (ringplane.crash) knows when it matters to cut the power, and what is possible then: the storage's record
is a recording for it. Every possible content is checked at each cut: none may be older than the data that the disk
guaranteed by then. The guarantee: a write that was completed before a flush was submitted is there once the flush is
completed; without flushes (VIRTIO_BLK_F_FLUSH) each write is there once it is completed.

Both sides share a clock, the number of events in the storage's record. The driver reads it before it submits a request
and after it has seen a completion, so no guarantee is counted too early. An event is recorded before the requester can
know of it.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from ringplane.crash.power_cuts import PowerCut, power_cuts
from ringplane.crash.timeline import timeline_of
from ringplane.driver import Driver
from ringplane.driver.driver import FEATURES, segments
from ringplane.recordings.entries import FLUSH, FUA, UNFINISHED, ZERO, Entry
from ringplane.virtio.blk import (
    SECTOR,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
)

from .fuse import FuseFile, Operation, mounted
from .serving import PATIENCE, Disk, serving

SIZE = 1 << 20
SECTORS = SIZE // SECTOR
QUEUES, DEPTH, MOST_SECTORS = 3, 32, 48
NEVER = 1 << 62
NO_DATA = memoryview(b"")

# The kinds of requests that the driver submits, and their weights.
KINDS = {
    VIRTIO_BLK_T_OUT: 57,
    VIRTIO_BLK_T_FLUSH: 25,
    VIRTIO_BLK_T_IN: 6,
    VIRTIO_BLK_T_WRITE_ZEROES: 7,
    VIRTIO_BLK_T_DISCARD: 5,
}


def content(number: int, sector: int, count: int) -> bytes:
    """The data of request `number`: each sector repeats the number of its request and its own position."""
    words = np.empty((count, SECTOR // 16, 2), np.int64)
    words[:, :, 0] = number
    words[:, :, 1] = np.arange(sector, sector + count)[:, None]
    return words.tobytes()


def writers(data: bytes, sector: int) -> list[int]:
    """The request that wrote each of these sectors, 0 for zeros. AssertionError if a sector is torn or misplaced."""
    words = np.frombuffer(data, np.int64).reshape(-1, SECTOR // 16, 2)
    numbers = words[:, 0, 0]
    places = np.where(numbers == 0, 0, np.arange(sector, sector + len(words)))
    assert (words[:, :, 0] == numbers[:, None]).all(), f"a torn sector from {sector} on"
    assert (words[:, :, 1] == places[:, None]).all(), f"data for another place from {sector} on"
    return [int(number) for number in numbers]


@dataclass
class Event:
    """The "begin" or "end" of a write, or the end of a "sync" of all writes that ended before event `covers`."""

    what: str
    write: int = 0
    covers: int = 0


@dataclass
class Write:
    """A write that was submitted to the storage."""

    sector: int
    numbers: list[int]
    stable: bool


class Recorder(FuseFile):
    """Storage that records its operations and completes them in random order."""

    def __init__(self, folder: Path, draw: random.Random, *, write_back: bool) -> None:
        self.draw = draw
        self.events: list[Event] = []
        self.writes: list[Write] = []
        self._pending: list[tuple[Operation, Event]] = []
        super().__init__(folder, SIZE, write_back=write_back)

    def patience(self) -> int | None:
        if not self._pending:
            return None
        if all(operation.kind == "sync" for operation, _ in self._pending):
            # Enough time for the driver to see completions meanwhile, and to submit another flush.
            return self.draw.choice([0, 3])
        return 1 if self.draw.random() < 0.1 else 0

    def idle(self) -> None:
        """Complete one operation; syncs rather late, because they do not cover writes that are completed meanwhile."""
        others = [number for number, (operation, _) in enumerate(self._pending) if operation.kind != "sync"]
        late = others and self.draw.random() < 0.9
        operation, event = self._pending.pop(self.draw.choice(others if late else range(len(self._pending))))
        self.events.append(event)
        self.finish(operation, None)

    def arrive(self, operation: Operation) -> None:
        if operation.kind == "read" or operation.offset >= SIZE:
            # ringplane tests behind the end of the file whether the file system supports holes.
            self.finish(operation, None)
        elif operation.kind == "sync":
            self._pending.append((operation, Event("sync", covers=len(self.events))))
        else:
            sector = operation.offset // SECTOR
            data = operation.data or bytes(operation.size)
            self.writes.append(Write(sector, writers(data, sector), operation.stable))
            number = len(self.writes) - 1
            self.events.append(Event("begin", number))
            self._pending.append((operation, Event("end", number)))
        if self._pending and self.draw.random() < 0.4:
            self.idle()


@dataclass
class Asked:
    """A request of the driver; times are the driver's, clocks are the storage's (see above)."""

    kind: int
    sector: int
    count: int
    submitted: int
    submit_clock: int
    answered: int = NEVER
    answer_clock: int = NEVER

    @property
    def zeros(self) -> bool:
        return self.kind in (VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD)


@dataclass
class Client:
    """The driver: keeps up to DEPTH requests in flight on each queue, and records when they are completed."""

    driver: Driver
    recorder: Recorder
    draw: random.Random
    asked: list[Asked] = field(default_factory=lambda: [Asked(-1, 0, 0, 0, 0)])
    _time: int = 0
    _in_flight: list[list[tuple[int, Any, Any]]] = field(default_factory=lambda: [[] for _ in range(QUEUES)])

    def work(self, requests: int) -> None:
        """Submit so many requests, and wait until all are completed."""
        end = len(self.asked) + requests
        deadline = time.monotonic() + requests / 20 + PATIENCE
        while len(self.asked) < end or any(self._in_flight):
            queue = self.draw.randrange(QUEUES)
            for _ in range(self.draw.choice([1, 4, DEPTH])):
                if len(self._in_flight[queue]) < DEPTH and len(self.asked) < end:
                    self._ask(queue)
                # Also in between: the later a completion is recorded, the less it proves.
                self._take_all_answers()
            if not self._take_all_answers():
                time.sleep(0.0001)
            assert time.monotonic() < deadline, "some requests are never answered"

    def _ask(self, queue: int) -> None:
        draw, number = self.draw, len(self.asked)
        (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
        if kind == VIRTIO_BLK_T_FLUSH and queue and draw.random() < 0.9:
            # Otherwise the next queue's sync right behind would hide one that covers too little.
            kind = VIRTIO_BLK_T_OUT
        last = self.asked[-1]
        # Often at the end of the last request, because adjacent requests are merged.
        sector = (last.sector + last.count) % SECTORS if draw.random() < 0.4 else draw.randrange(SECTORS)
        count = min(draw.choice([1, 2, 8, 8, draw.randint(1, MOST_SECTORS)]), SECTORS - sector)
        data, room = b"", 0
        if kind == VIRTIO_BLK_T_OUT:
            data = content(number, sector, count)
        elif kind == VIRTIO_BLK_T_IN:
            room = count * SECTOR
        elif kind == VIRTIO_BLK_T_FLUSH:
            count = 0
        else:
            data = segments((sector, count, draw.choice([0, 1]) if kind == VIRTIO_BLK_T_WRITE_ZEROES else 0))
        self._time += 1
        self.asked.append(Asked(kind, sector, count, self._time, len(self.recorder.events)))
        first = sector if kind in (VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_IN) else 0
        placed, ticket = self.driver._submit_request(kind, first, data, room, queue)
        self._in_flight[queue].append((number, placed, ticket))

    def _take_all_answers(self) -> int:
        return sum(self._take_answers(queue) for queue in range(QUEUES))

    def _take_answers(self, queue: int) -> int:
        """Record all completions so far; returns their number."""
        if self.recorder.failure is not None:
            raise self.recorder.failure
        self.driver._reap(self.driver.queues[queue])
        self._time += 1
        clock = len(self.recorder.events)
        done = [each for each in self._in_flight[queue] if each[2].used is not None]
        self._in_flight[queue] = [each for each in self._in_flight[queue] if each[2].used is None]
        for number, placed, ticket in done:
            written = placed.written()
            assert written[-1] == 0, f"{self.asked[number]} ended with status {written[-1]}"
            self.asked[number].answered, self.asked[number].answer_clock = self._time, clock
            self.driver._free(ticket.blocks)
        return len(done)


@dataclass
class Tally:
    """What was checked."""

    cuts: int = 0
    writes: int = 0
    flushes: int = 0
    ranges: int = 0
    contents: int = 0

    def __str__(self) -> str:
        return (
            f"{self.cuts} cuts, {self.writes} writes, {self.ranges} discards and write zeroes, {self.flushes} flushes, "
            f"{self.contents} contents of sectors checked"
        )


class Record:
    """The storage's record as the entries of a recording, for the laboratory (ringplane.crash)."""

    def __init__(self, events: Sequence[Event], writes: Sequence[Write]) -> None:
        self._writes = writes
        self.entries: list[Entry] = []
        # By index of the entry: the requests that wrote its sectors, and how many events were before its end.
        self.numbers: dict[int, list[int]] = {}
        self.clocks: list[int] = []
        # By event: how many entries had ended before.
        times: list[int] = []
        began: dict[int, int] = {}
        for clock, event in enumerate([*events, Event("nothing")]):
            times.append(len(self.entries))
            if event.what == "begin":
                began[event.write] = len(self.entries)
            elif event.what == "end":
                stable = writes[event.write].stable
                self._add_write(event.write, began.pop(event.write), clock, FUA if stable else 0)
            elif event.what == "sync":
                self._add(Entry(FLUSH, len(self.entries), times[event.covers], 0, 0, 0, 0, 0, 0, 0, NO_DATA), clock)
        for number, when in began.items():
            self._add_write(number, when, len(events), UNFINISHED)
        self.clocks.append(len(events))

    def _add_write(self, number: int, began: int, clock: int, flags: int) -> None:
        index, write = len(self.entries), self._writes[number]
        self.numbers[index] = write.numbers
        place = write.sector * SECTOR, len(write.numbers) * SECTOR
        self._add(Entry(ZERO, index, began, 0, 0, *place, flags, 0, 0, NO_DATA), clock)

    def _add(self, entry: Entry, clock: int) -> None:
        self.entries.append(entry)
        self.clocks.append(clock)


class Cuts:
    """Checks what each sector may contain at each power cut that matters: ringplane.crash.power_cuts says which do."""

    def __init__(self, events: list[Event], writes: list[Write], asked: list[Asked], *, write_through: bool) -> None:
        self._record, self._asked = Record(events, writes), asked
        self._timeline = timeline_of(self._record.entries)
        # So many of the writes that have landed.
        self._settled = 0
        self._stable = [0] * SECTORS
        # For each sector: when the last guaranteed write was submitted, and when possible zeros were completed.
        self._promised = [0] * SECTORS
        self._zeros = [0] * SECTORS
        self._write_through = write_through
        self._by_answer = sorted(
            (each for each in asked if each.kind in (VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES)),
            key=lambda each: each.answered,
        )
        self._kept = 0
        self.tally = Tally(
            writes=sum(each.kind == VIRTIO_BLK_T_OUT for each in asked),
            flushes=sum(each.kind == VIRTIO_BLK_T_FLUSH for each in asked),
            ranges=sum(each.zeros for each in asked),
        )

    def look(self) -> Tally:
        """Check all cuts; AssertionError if a guarantee is broken."""
        seen = sorted(self._seen_by_driver(), key=lambda each: each[0], reverse=True)
        for cut in power_cuts(self._timeline):
            clock = self._record.clocks[cut.time]
            self._settle(cut)
            touched = set()
            while seen and seen[-1][0] <= clock:
                when, each = seen.pop()
                touched |= set(self._hear(each, when))
            possible = self._possible(cut)
            for sector in touched | possible.keys():
                self._check(sector, clock, possible.get(sector, {self._stable[sector]}))
            self.tally.cuts += 1
        return self.tally

    def _seen_by_driver(self) -> Iterator[tuple[int, Asked]]:
        """The driver's submissions and completions that matter, with their clock."""
        for each in self._asked:
            if each.zeros:
                yield each.submit_clock, each
            if each.kind == VIRTIO_BLK_T_FLUSH or self._write_through:
                yield each.answer_clock, each

    def _settle(self, cut: PowerCut) -> None:
        """Some more writes are stable, whatever happens."""
        for write in cut.landed[self._settled : cut.settled]:
            self._stable[write.first : write.end] = self._record.numbers[write.index]
        self._settled = cut.settled

    def _possible(self, cut: PowerCut) -> dict[int, set[int]]:
        """For each sector that pending writes change: the requests of which it can have the data."""
        found: dict[int, list[tuple[int, int]]] = {}
        loose = set(cut.loose)
        for place, write in enumerate(cut.pending):
            for sector, number in enumerate(self._record.numbers[write.index], write.first):
                before = found.get(sector, [(-1, self._stable[sector])])
                if place not in loose:
                    # Those that were in flight with it may have come after it.
                    before = [each for each in before if each[0] >= write.began]
                found[sector] = [*before, (write.index, number)]
        return {sector: {number for _, number in each} for sector, each in found.items()}

    def _hear(self, asked: Asked, clock: int) -> Iterator[int]:
        """Apply a submission or completion of the driver; yields the sectors that it affects."""
        if asked.zeros and clock == asked.submit_clock:
            for place in range(asked.sector, asked.sector + asked.count):
                self._zeros[place] = max(self._zeros[place], asked.answered)
        if clock != asked.answer_clock:
            return
        if self._write_through:
            if asked.kind in (VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES):
                yield from self._promise(asked)
            return
        while self._kept < len(self._by_answer) and self._by_answer[self._kept].answered < asked.submitted:
            yield from self._promise(self._by_answer[self._kept])
            self._kept += 1

    def _promise(self, asked: Asked) -> Iterator[int]:
        for place in range(asked.sector, asked.sector + asked.count):
            self._promised[place] = max(self._promised[place], asked.submitted)
            yield place

    def _check(self, sector: int, clock: int, possible: set[int]) -> None:
        for number in possible:
            # Data that was completed before a guaranteed write was submitted is older than that write.
            answered = self._asked[number].answered if number else self._zeros[sector]
            assert answered >= self._promised[sector], (
                f"power cut after event {clock}: sector {sector} may hold what "
                + (f"request {number} ({self._asked[number]}) wrote" if number else "was there at first or zeros")
                + f", but a write that was submitted at {self._promised[sector]} is promised"
            )
            self.tally.contents += 1


@contextlib.contextmanager
def recording(draw: random.Random, *, buffered: bool) -> Iterator[Recorder]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "mounted"
        with mounted(Recorder(folder, draw, write_back=buffered)) as recorder:
            yield recorder


def record(
    seed: int, requests: int, *, engine: str, buffered: bool, write_through: bool
) -> tuple[Recorder, list[Asked]]:
    """The records of storage and driver for so many requests."""
    draw = random.Random(seed)
    features = FEATURES & ~VIRTIO_BLK_F_FLUSH if write_through else FEATURES
    with (
        recording(random.Random(seed), buffered=buffered) as recorder,
        serving(Disk(recorder.path, QUEUES, direct=not buffered), engine=engine) as served,
        served.driver(queues=QUEUES, queue_size=DEPTH * 4, feature_bits=features) as driver,
    ):
        client = Client(driver, recorder, draw)
        client.work(requests)
    return recorder, client.asked


def run(seed: int, requests: int, *, engine: str, buffered: bool, write_through: bool) -> Tally:
    """Record so many requests and check all cuts. The AssertionError begins with the seed."""
    try:
        recorder, asked = record(seed, requests, engine=engine, buffered=buffered, write_through=write_through)
        return Cuts(recorder.events, recorder.writes, asked, write_through=write_through).look()
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error


@click.command(help=__doc__)
@click.option("--seconds", type=float, default=60.0, show_default=True)
@click.option("--requests", type=int, default=5000, show_default=True, help="Of one record.")
@click.option("--seed", type=int, help="Of a record that found something; whether it does again is a matter of luck.")
def main(seconds: float, requests: int, seed: int | None) -> None:
    end = time.monotonic() + seconds
    number = 0
    while number == 0 or time.monotonic() < end:
        how = {
            "engine": ("io_uring", "aio")[number & 1],
            "buffered": bool(number & 2),
            "write_through": bool(number & 4),
        }
        click.echo(f"{how}: {run(seed or random.getrandbits(32), requests, **how)}")  # type: ignore[arg-type]
        number += 1


if __name__ == "__main__":
    main()
