"""The states of power cuts: those that a simple model of a disk can leave, all of them and no others."""

from __future__ import annotations

import dataclasses
import random
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringplane.crash.crash_states import ALL, NOTHING, Enumeration, State, spread
from ringplane.crash.disk_state import Fingerprints
from ringplane.crash.image_view import View
from ringplane.crash.power_cuts import PowerCut, power_cuts
from ringplane.crash.sector_contents import SectorContents
from ringplane.crash.smallest_state import halves, smallest
from ringplane.crash.tearing import Tearing
from ringplane.crash.timeline import NEVER, Write, timeline_of
from ringplane.recordings.entries import DISCARD, WRITE, ZERO
from ringplane.recordings.reader import Recording

from .cache_model import SECTOR, Request, Step, possible_disks, recorded

SECTORS = 3
# All states of so many written sectors are tried.
MOST_WRITTEN = 8


@st.composite
def runs(draw: st.DrawFn, overlapping: bool) -> tuple[list[Request], list[Step]]:
    """Some requests, and when they begin and end; those in flight at the same time overlap only if that is wanted."""
    requests: list[Request] = []
    steps: list[Step] = []
    in_flight: list[int] = []
    for _ in range(draw(st.integers(1, 10))):
        if in_flight and draw(st.booleans()):
            steps.append(Step(in_flight.pop(draw(st.integers(0, len(in_flight) - 1))), False))
            continue
        first = draw(st.integers(0, SECTORS - 1))
        count = draw(st.integers(0, min(2, SECTORS - first)))
        # Few values, so that different writes leave the same content.
        kind = draw(st.sampled_from([WRITE, WRITE, WRITE, ZERO, DISCARD]))
        value = draw(st.integers(0, 5)) if kind == WRITE else 0
        fua, failed = bool(count) and draw(st.booleans()), draw(st.integers(0, 3)) == 0
        request = Request(first, count, value, fua=fua, kind=kind, failed=failed)
        others = [requests[number] for number in in_flight]
        touched = {sector for sector in range(SECTORS) if request.touches(sector)}
        if count + sum(request.count for request in requests) > MOST_WRITTEN:
            continue
        if not overlapping and any(other.touches(sector) for other in others for sector in touched):
            continue
        requests.append(request)
        in_flight.append(len(requests) - 1)
        steps.append(Step(len(requests) - 1, True))
    return requests, steps


def disks(
    recording: Recording, *, cache: bool = True, unit: int = 512, rounds: int = 0, most: int = 1 << 20
) -> Counter[tuple[int, ...]]:
    """How often each content of the disk comes, in the states without random ones and so many rounds of these."""
    timeline = timeline_of(recording, cache=cache)
    enumeration = Enumeration(power_cuts(timeline), Tearing(unit), most=most)
    contents = SectorContents(memoryview(bytes(SECTORS * SECTOR)), recording, timeline.writes)
    prints, view = Fingerprints(contents), View(contents)
    found: Counter[tuple[int, ...]] = Counter()
    by_print: dict[int, tuple[int, ...]] = {}
    for state in [*enumeration.likely(), *enumeration.others(), *some_rounds(enumeration, rounds)]:
        view.show(state)
        data = view.read(0, SECTORS * SECTOR)
        sectors = [data[start : start + SECTOR] for start in range(0, len(data), SECTOR)]
        assert all(sector == sector[:1] * SECTOR for sector in sectors)
        disk = tuple(sector[0] for sector in sectors)
        found[disk] += 1
        assert by_print.setdefault(prints.of(state), disk) == disk
        # Whatever a check writes is gone in the next state.
        view.write(random.randrange(len(data)) // 2, b"checked")
    assert len(by_print) == len(found), "the same content has two fingerprints"
    return found


def some_rounds(enumeration: Enumeration, number: int) -> Iterator[State]:
    for _, states in zip(range(number), enumeration.rounds(), strict=False):
        yield from states


@settings(max_examples=60, deadline=None)
@given(runs(overlapping=False), st.booleans())
def test_exactly_what_the_model_can_leave(run: tuple[list[Request], list[Step]], cache: bool) -> None:
    requests, steps = run
    found = set(disks(recorded(SECTORS, requests, steps), cache=cache))
    assert found == possible_disks(SECTORS, requests, steps, cache=cache)


@settings(max_examples=60, deadline=None)
@given(runs(overlapping=True), st.booleans(), st.sampled_from([0, 512, 4096]))
def test_nothing_that_the_model_cannot_leave(run: tuple[list[Request], list[Step]], cache: bool, unit: int) -> None:
    requests, steps = run
    recording = recorded(SECTORS, requests, steps)
    assert set(disks(recording, cache=cache, unit=unit)) <= possible_disks(SECTORS, requests, steps, cache=cache)


@settings(max_examples=40, deadline=None)
@given(runs(overlapping=True), st.booleans())
def test_random_states_are_possible(run: tuple[list[Request], list[Step]], cache: bool) -> None:
    requests, steps = run
    found = set(disks(recorded(SECTORS, requests, steps), cache=cache, rounds=50, most=0))
    assert found <= possible_disks(SECTORS, requests, steps, cache=cache)


def begun(*numbers: int) -> list[Step]:
    return [Step(number, True) for number in numbers]


def ended(*numbers: int) -> list[Step]:
    return [Step(number, False) for number in numbers]


ONE, TWO, FLUSHED = Request(0, 2, 1), Request(1, 2, 2), Request()


def test_writes_in_flight_together_reach_the_disk_in_either_order() -> None:
    found = set(disks(recorded(SECTORS, [ONE, TWO], begun(0, 1) + ended(0, 1)), unit=0))
    assert found == {(0, 0, 0), (1, 1, 0), (0, 2, 2), (1, 2, 2), (1, 1, 2)}


def test_a_later_write_is_never_below_an_earlier_one() -> None:
    steps = begun(0) + ended(0) + begun(1) + ended(1)
    assert (1, 1, 2) not in disks(recorded(SECTORS, [ONE, TWO], steps), unit=0)


def test_a_flush_covers_what_had_ended_when_it_began() -> None:
    steps = begun(0) + ended(0) + begun(2, 1) + ended(1, 2)
    timeline = timeline_of(recorded(SECTORS, [ONE, TWO, FLUSHED], steps))
    assert [write.stable for write in timeline.writes] == [3, NEVER]


def one_after_the_other(*numbers: int) -> list[Step]:
    return [step for number in numbers for step in begun(number) + ended(number)]


def test_a_failed_write_can_be_missing_until_later_stable_ones_cover_it() -> None:
    requests = [dataclasses.replace(ONE, failed=True), FLUSHED, Request(0, 1, 3), Request(1, 1, 4), FLUSHED]
    cuts = power_cuts(timeline_of(recorded(SECTORS, requests, one_after_the_other(0, 1, 2, 3, 4))))
    # The first flush says nothing of it.
    assert [[write.index for write in cut.pending] for cut in cuts] == [[0, 2, 3], []]


def test_a_failed_write_that_nothing_covers_holds_up_no_others() -> None:
    """Only what may have come after it stays open, however long it is there."""
    requests = [dataclasses.replace(ONE, failed=True), Request(1, 1, 4), *[Request(2, 1, 1), FLUSHED] * 20]
    cuts = power_cuts(timeline_of(recorded(SECTORS, requests, one_after_the_other(*range(len(requests))))))
    assert [write.index for write in cuts[-1].pending] == [0, 1]
    assert [write.index for write in cuts[-1].landed] == list(range(2, 42, 2))


def test_small_and_likely_states_come_first() -> None:
    requests = [Request(sector, 1, sector + 1) for sector in range(SECTORS)]
    steps = [step for number in range(SECTORS) for step in begun(number) + ended(number)]
    timeline = timeline_of(recorded(SECTORS, requests, steps))
    states = Enumeration(power_cuts(timeline), Tearing(512)).likely()
    kept = [next(states).kept for _ in range(5)]
    assert kept[:4] == [(ALL, ALL, ALL), (NOTHING, ALL, ALL), (ALL, NOTHING, ALL), (ALL, ALL, NOTHING)]
    assert kept[4] == (NOTHING, NOTHING, NOTHING)


@pytest.mark.parametrize("number", [0, 1, 2, 3, 7, 8, 9, 100])
def test_everywhere_first(number: int) -> None:
    parts = list(spread(number))
    assert sorted(each for part in parts for each in part) == list(range(number))
    assert all(list(part) == sorted(part) for part in parts)


def test_units_of_a_write() -> None:
    write = Write(0, 0, first=6, count=12)
    assert Tearing(4096).units(write) == [0b11, 0b11_1111_1100, 0b1100_0000_0000]
    assert Tearing(4096).edges(write) == [2, 10]
    assert Tearing(512).count(write) == 12
    assert Tearing(512).edges(write) == [1, 2, 6, 10, 11]
    assert Tearing(0).units(write) == [0b1111_1111_1111]
    assert Tearing(0).edges(write) == []


def loose_cut(number: int) -> PowerCut:
    writes = tuple(Write(index, index, first=index, count=1) for index in range(number))
    return PowerCut(0, number, writes, tuple(range(number)))


def test_the_smallest_failing_state() -> None:
    """The check fails if write 5 is there without write 3."""
    cut = loose_cut(9)
    first = State(cut, (NOTHING, ALL, NOTHING, NOTHING, ALL, ALL, NOTHING, ALL, ALL), order=tuple(reversed(range(9))))

    def fails(states: Sequence[State]) -> list[bool]:
        return [state.kept[5] != NOTHING and state.kept[3] == NOTHING for state in states]

    found = smallest(first, fails, at_once=2)
    assert found.missing() == [3]
    assert not found.order
    assert found.kept[6:] == (NOTHING, NOTHING, NOTHING)


def test_a_smaller_state_is_looked_for_as_long_as_there_is_time() -> None:
    tried: list[State] = []

    def fails(states: Sequence[State]) -> list[bool]:
        tried.extend(states)
        return [False for _ in states]

    first = State(loose_cut(100), (NOTHING,) * 99 + (ALL,))
    assert smallest(first, fails, at_once=2, enough=lambda: len(tried) >= 4) == first
    assert len(tried) == 4


def test_candidates_are_not_all_made_at_once() -> None:
    """There are as many as writes, each with as many places."""
    first = State(loose_cut(3000), (NOTHING, ALL) * 1500)
    tracemalloc.start()
    assert smallest(first, lambda states: [False] * len(states), at_once=2) == first
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10 << 20


def test_what_is_not_there_at_the_end_is_not_missing_unless_it_was_promised() -> None:
    state = State(loose_cut(4), (ALL, NOTHING, ALL, NOTHING))
    assert state.missing() == [1]
    assert state.missing(before=4) == [1, 3]


def view_of(base: bytes, recording: Recording) -> tuple[View, list[PowerCut]]:
    timeline = timeline_of(recording)
    return View(SectorContents(memoryview(base), recording, timeline.writes)), power_cuts(timeline)


def test_what_was_there_before_a_discarded_range() -> None:
    """Of the base image, with zeros between data."""
    base = b"".join(bytes([number % 3]) * SECTOR for number in range(100))
    view, cuts = view_of(base, recorded(100, [Request(0, 100, kind=DISCARD)], begun(0) + ended(0)))
    view.show(State(cuts[0], (NOTHING,)))
    assert view.read(0, len(base)) == base
    view.show(State(cuts[0], (ALL,)))
    assert view.read(0, len(base)) == bytes(len(base))


def test_reading_the_contents_can_be_interrupted() -> None:
    recording = recorded(SECTORS, [ONE], begun(0) + ended(0))

    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SectorContents(memoryview(bytes(SECTORS * SECTOR)), recording, timeline_of(recording).writes, check)


def test_a_state_is_read_as_a_whole() -> None:
    """The kernel may read ahead while the next state is shown."""
    requests = [Request(sector, 1, 1) for sector in range(50)]
    view, cuts = view_of(bytes(50 * SECTOR), recorded(50, requests, one_after_the_other(*range(50))))
    states = [State(cuts[0], (kept,) * 50) for kept in (NOTHING, ALL)]
    found: set[bytes] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            found.add(view.read(0, 50 * SECTOR))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=read)
    thread.start()
    try:
        for number in range(200):
            view.show(states[number % 2])
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(before)
    assert found <= {bytes([value]) * (50 * SECTOR) for value in (0, 1)}


def test_halves() -> None:
    assert list(halves([1, 2, 3])) == [[1, 2, 3], [1, 2], [3], [1], [2], [3]]
    assert list(halves([])) == []


def test_only_moments_that_matter() -> None:
    """Writes without a flush between them need one cut."""
    requests = [Request(0, 1, 1), Request(1, 1, 2), FLUSHED, Request(2, 1, 3)]
    steps = [step for number in range(4) for step in begun(number) + ended(number)]
    cuts = power_cuts(timeline_of(recorded(SECTORS, requests, steps)))
    assert [(cut.time, len(cut.loose)) for cut in cuts] == [(2, 2), (4, 1)]
