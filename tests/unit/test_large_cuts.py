"""Power cuts with more states than can be listed."""

from __future__ import annotations

import dataclasses
import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ringplane.crash.check_process import Experiment, Verdict
from ringplane.crash.crash_report import Report, lines
from ringplane.crash.crash_states import Enumeration, State
from ringplane.crash.laboratory import Budget, Laboratory
from ringplane.crash.power_cuts import PowerCut
from ringplane.crash.tearing import MOST_TORN, Tearing
from ringplane.crash.timeline import Write


def cut_of(writes: Iterable[Write]) -> PowerCut:
    writes = tuple(writes)
    return PowerCut(0, len(writes), writes, tuple(range(len(writes))))


def loose_cut(number: int) -> PowerCut:
    return cut_of(Write(index, index, first=index, count=1) for index in range(number))


def report(possible: int, *, exhausted: bool = False, in_vain: bool = False) -> Report:
    return Report(1, 1, possible, 1, 0, 0, 1.0, exhausted, in_vain, 0, 0.0, 0, None, None)


def test_a_number_with_thousands_of_digits_is_rounded() -> None:
    found = report(Enumeration([loose_cut(20_000)], Tearing(512)).possible)
    assert "about 10^6020 states possible" in next(lines(found))
    assert json.loads(json.dumps(found.as_json()["possible"])) == "about 10^6020"


def test_an_exact_number_is_exact_in_json() -> None:
    assert report(2**100).as_json()["possible"] == str(2**100)


@pytest.mark.parametrize("unit", [512, 4096])
def test_a_large_range_is_torn_at_few_places(unit: int) -> None:
    gigabyte = Write(0, 0, first=3, count=1 << 21)
    tearing, draw = Tearing(unit), random.Random(1)
    tracemalloc.start()
    kept = tearing.some_units(gigabyte, draw)
    assert tearing.edges(gigabyte)
    assert tearing.count(gigabyte) >= gigabyte.count * 512 // unit
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100 << 20
    assert 0 < kept < 1 << gigabyte.count
    assert (kept ^ kept >> 1).bit_count() <= MOST_TORN


class Processes:
    """Every check succeeds, or fails."""

    def __init__(self, status: int = 0) -> None:
        self.verdict = Verdict(status, "")

    def verdicts(self, states: Iterable[State]) -> Iterator[tuple[State, Verdict]]:
        for state in states:
            yield state, self.verdict


class OneOfEach(Laboratory):
    """States differ in what is there of each write, without a disk."""

    def __post_init__(self) -> None:
        self._seen, self._keys = {}, {}

    def _key(self, state: State) -> int:
        return hash((state.kept, state.order))


def laboratory(cut: PowerCut, status: int = 0, most: int = 4096) -> Laboratory:
    experiment = cast(Experiment, SimpleNamespace(marked=lambda state: 0))
    return OneOfEach(experiment, Enumeration([cut], Tearing(512), most=most), cast(Any, Processes(status)), 1)


def test_random_states_that_bring_nothing_new_are_not_all_states() -> None:
    tried = laboratory(loose_cut(3), most=2)
    tried.run(Budget(1000, 600))
    assert (tried.tally.exhausted, tried.tally.in_vain) == (False, True)


def test_more_orders_than_are_tried_are_not_all_states() -> None:
    tried = laboratory(cut_of(Write(index, 0, first=0, count=1) for index in range(5)))
    tried.run(Budget(1000, 600))
    assert (tried.tally.exhausted, tried.tally.in_vain) == (False, True)


def test_all_states_are_tried_if_there_are_no_more_than_wanted() -> None:
    tried = laboratory(loose_cut(13), most=1 << 13)
    tried.run(Budget(1 << 13, 600))
    assert (tried.tally.tried, tried.tally.exhausted) == (1 << 13, True)


def test_all_states_of_the_cuts_with_the_fewest_are_tried() -> None:
    cuts = [dataclasses.replace(loose_cut(size), number=number) for number, size in enumerate([4, 3, 3, 20])]
    others = Enumeration(cuts, Tearing(0), most=30).others()
    assert Counter(state.cut.number for state in others) == {1: 8, 2: 8}


def test_few_states_are_all_tried() -> None:
    tried = laboratory(loose_cut(3))
    tried.run(Budget(1000, 600))
    assert (tried.tally.tried, tried.tally.exhausted, tried.tally.in_vain) == (8, True, False)
    assert "all states have been tried" in list(lines(report(8, exhausted=True)))
    assert any("not all states" in line for line in lines(report(8, in_vain=True)))
