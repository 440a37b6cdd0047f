"""The tuner against workers whose habits have known rates: what it chooses, how long it tries, when it tries again."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringplane.dataplane import tune
from ringplane.dataplane.state import HABITS, NAP, POLL, SLEEP, TALLY, WORKER
from ringplane.dataplane.tune import (
    CHANGE,
    GAP_NS,
    GAPS,
    HOPELESS,
    REST_MAX_NS,
    REST_MIN_NS,
    WORTH,
    end_spell,
    note_sleep,
)

ALL = (1 << HABITS) - 1
TURN_NS = 100_000


class Simulation:
    """A worker that answers `rates[habit]` requests a second, in turns of the loop of TURN_NS."""

    def __init__(self, rates: list[float], habits: int = ALL) -> None:
        self._array: npt.NDArray[np.void] = np.zeros(1, WORKER)
        self.worker = self._array[0]
        self.worker["habits"] = self.worker["trying"] = habits
        self._tallies: npt.NDArray[np.void] = np.zeros(HABITS, TALLY)
        self.worker["tallies"] = self._tallies.ctypes.data
        self.worker["now"], self.worker["resting"] = 1_000_000_000, 1
        self.rates, self._rest = rates, 0.0
        self.time_in = [0] * HABITS

    def turn(self, length: int = TURN_NS) -> None:
        worker = self.worker
        habit = int(worker["habit"])
        self._rest += self.rates[habit] * length / 1e9
        worker["now"] += length
        worker["answered"] += int(self._rest)
        self._rest -= int(self._rest)
        self.time_in[habit] += length
        if worker["now"] >= worker["spell_end"]:
            end_spell(worker)

    def run(self, seconds: float) -> None:
        for _ in range(int(seconds * 1e9 / TURN_NS)):
            self.turn()

    def run_until_it_rests(self) -> int:
        """Returns the habit that it keeps."""
        while self.worker["resting"] > 0:
            self.turn()
        for _ in range(1_000_000):
            if self.worker["resting"] > 0:
                return int(self.worker["habit"])
            self.turn()
        raise AssertionError("the trial does not end")

    def sleep(self, length: int) -> None:
        self.worker["now"] += length
        note_sleep(self.worker, length)


def best_of(rates: list[float], habits: int = ALL) -> int:
    """The rule: the cheapest, unless a dearer one is worth it."""
    best = SLEEP
    for habit in (NAP, POLL):
        if habits >> habit & 1 and rates[habit] > WORTH * rates[best]:
            best = habit
    return best


rates = st.lists(st.sampled_from([2_000, 2_050, 5_000, 8_000, 30_000, 100_000, 1_000_000]), min_size=3, max_size=3)


@given(rates, st.sampled_from([ALL, 1 << SLEEP, 1 << SLEEP | 1 << NAP, 1 << SLEEP | 1 << POLL]))
def test_the_best_habit_is_kept_and_no_other_ever_had(rates: list[float], habits: int) -> None:
    simulation = Simulation(rates, habits)
    assert simulation.run_until_it_rests() == best_of(rates, habits)
    assert all(habits >> habit & 1 or not time for habit, time in enumerate(simulation.time_in))


def test_what_makes_no_difference_costs_nothing() -> None:
    assert Simulation([10_000, 10_500, 10_500]).run_until_it_rests() == SLEEP


def test_a_hopeless_habit_is_dropped_after_its_first_spell() -> None:
    simulation = Simulation([100_000, 0.9 * HOPELESS * 100_000, 100_000])
    simulation.run_until_it_rests()
    assert simulation.time_in[NAP] < simulation.time_in[SLEEP] / 2


def test_trials_of_a_steady_load_become_rare() -> None:
    simulation = Simulation([30_000, 20_000, 60_000])
    simulation.run(20)
    assert simulation.worker["rest_ns"] == REST_MAX_NS
    assert simulation.time_in[POLL] > 0.98 * sum(simulation.time_in)


@pytest.mark.parametrize("factor", [CHANGE * 1.2, 1 / CHANGE / 1.2])
def test_a_load_that_changes_is_tried_anew_at_once(factor: float) -> None:
    simulation = Simulation([30_000, 20_000, 60_000])
    simulation.run(5)
    simulation.rates = [factor * 60_000, factor * 90_000, factor * 60_000]
    simulation.run(0.2)
    assert simulation.worker["habit"] == NAP
    assert simulation.worker["rest_ns"] == REST_MIN_NS


def test_one_odd_trial_does_not_weigh_more_than_all_before() -> None:
    simulation = Simulation([30_000, 20_000, 60_000])
    simulation.run(5)
    while simulation.worker["resting"] > 0:
        simulation.turn()
    assert simulation.worker["best"] == POLL
    # A stall that falls upon the best habit, as a disk has them.
    simulation.rates = [30_000, 20_000, 31_000]
    assert simulation.run_until_it_rests() == POLL


def test_a_sparse_load_ends_in_sleep() -> None:
    simulation = Simulation([30_000, 20_000, 60_000])
    assert simulation.run_until_it_rests() == POLL
    for _ in range(GAPS):
        simulation.sleep(GAP_NS)
        simulation.turn()
    assert simulation.worker["habit"] == SLEEP
    for _ in range(100):
        simulation.sleep(GAP_NS)
        simulation.turn()
    assert simulation.worker["habit"] == SLEEP
    simulation.run(0.2)
    assert simulation.worker["habit"] == POLL, "a dense load is tried again"


def test_a_gap_now_and_then_changes_nothing() -> None:
    simulation = Simulation([30_000, 20_000, 60_000])
    simulation.run(1)
    for _ in range(3 * GAPS):
        simulation.sleep(5 * GAP_NS)
        simulation.run(0.05)
        assert simulation.worker["best"] == POLL


def test_too_few_requests_tell_nothing() -> None:
    simulation = Simulation([1_000, 1_000, 1_000])
    simulation.turn()
    start = int(simulation.worker["answered"])
    while simulation.worker["resting"] > 0:
        simulation.turn(1_000_000)
    assert int(simulation.worker["answered"]) - start >= tune.ENOUGH
