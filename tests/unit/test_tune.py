"""The tuner with workers whose policies have known rates: its choices, and the length and frequency of its trials."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringplane.dataplane import tune
from ringplane.dataplane.state import COALESCE, POLICIES, POLL, SLEEP, TALLY, WORKER
from ringplane.dataplane.tune import (
    CHANGE,
    GAP_NS,
    GAPS,
    HOPELESS,
    MARGIN,
    STEADY_MAX_NS,
    STEADY_MIN_NS,
    count_gap,
    end_sample,
)

from .on_structs import on_structs

ALL = (1 << POLICIES) - 1
TURN_NS = 100_000


class Simulation:
    """A worker that completes `rates[policy]` requests per second, in turns of TURN_NS.

    `limit`: so many per second in the long run, because of a bucket that holds a tenth of a second.
    """

    def __init__(self, rates: list[float], policies: int = ALL, limit: float = float("inf")) -> None:
        self._array: npt.NDArray[np.void] = np.zeros(1, WORKER)
        self.worker = self._array[0]
        self.worker["policies"] = self.worker["candidates"] = policies
        self._tallies: npt.NDArray[np.void] = np.zeros(POLICIES, TALLY)
        self.worker["tallies"] = self._tallies.ctypes.data
        self.worker["now"], self.worker["until_trial"] = 1_000_000_000, 1
        self.rates, self._rest = rates, 0.0
        self._limit, self._room = limit, limit / 10
        self.time_in = [0] * POLICIES

    def turn(self, length: int = TURN_NS) -> None:
        worker = self.worker
        policy = int(worker["policy"])
        self._room = min(self._room + self._limit * length / 1e9, self._limit / 10)
        done = min(self.rates[policy] * length / 1e9, self._room)
        self._room -= done
        self._rest += done
        worker["now"] += length
        worker["completed"] += int(self._rest)
        self._rest -= int(self._rest)
        self.time_in[policy] += length
        if worker["now"] >= worker["sample_end"]:
            end_sample(self._array.ctypes.data)

    def run(self, seconds: float) -> None:
        for _ in range(int(seconds * 1e9 / TURN_NS)):
            self.turn()

    def run_until_steady(self) -> int:
        """Run until the trial ends; returns the chosen policy."""
        while self.worker["until_trial"] > 0:
            self.turn()
        for _ in range(1_000_000):
            if self.worker["until_trial"] > 0:
                return int(self.worker["policy"])
            self.turn()
        raise AssertionError("the trial does not end")

    def sleep(self, length: int) -> None:
        self.worker["now"] += length
        on_structs(count_gap)(self.worker, length)


def best_of(rates: list[float], policies: int = ALL) -> int:
    """The rule: the cheapest policy, unless a more expensive one is sufficiently better."""
    best = SLEEP
    for policy in (COALESCE, POLL):
        if policies >> policy & 1 and rates[policy] > MARGIN * rates[best]:
            best = policy
    return best


rates = st.lists(st.sampled_from([2_000, 2_050, 5_000, 8_000, 30_000, 100_000, 1_000_000]), min_size=3, max_size=3)


@given(rates, st.sampled_from([ALL, 1 << SLEEP, 1 << SLEEP | 1 << COALESCE, 1 << SLEEP | 1 << POLL]))
def test_the_best_policy_is_kept_and_disabled_ones_are_never_used(rates: list[float], policies: int) -> None:
    simulation = Simulation(rates, policies)
    assert simulation.run_until_steady() == best_of(rates, policies)
    assert all(policies >> policy & 1 or not time for policy, time in enumerate(simulation.time_in))


def test_equal_policies_cost_nothing() -> None:
    assert Simulation([10_000, 10_500, 10_500]).run_until_steady() == SLEEP


def test_a_hopeless_policy_is_dropped_after_its_first_sample() -> None:
    simulation = Simulation([100_000, 0.9 * HOPELESS * 100_000, 100_000])
    simulation.run_until_steady()
    assert simulation.time_in[COALESCE] < simulation.time_in[SLEEP] / 2


def test_trials_of_a_steady_load_become_rare() -> None:
    simulation = Simulation([30_000, 20_000, 60_000])
    simulation.run(20)
    assert simulation.worker["steady_ns"] == STEADY_MAX_NS
    assert simulation.time_in[POLL] > 0.98 * sum(simulation.time_in)


def test_trials_of_a_load_at_its_limit_become_rare() -> None:
    """Although it does more in a trial, in which bad policies leave room for others, than in all the time after it."""
    simulation = Simulation([185_000, 13_000, 102_000], limit=100_000)
    simulation.run(20)
    assert simulation.worker["steady_ns"] == STEADY_MAX_NS
    assert simulation.time_in[SLEEP] > 0.98 * sum(simulation.time_in)


@pytest.mark.parametrize("factor", [CHANGE * 1.2, 1 / CHANGE / 1.2])
def test_a_changed_load_starts_a_trial_at_once(factor: float) -> None:
    simulation = Simulation([30_000, 20_000, 60_000])
    simulation.run(5)
    simulation.rates = [factor * 60_000, factor * 90_000, factor * 60_000]
    simulation.run(0.2)
    assert simulation.worker["policy"] == COALESCE
    assert simulation.worker["steady_ns"] == STEADY_MIN_NS


def test_one_unusual_trial_does_not_outweigh_all_earlier_ones() -> None:
    simulation = Simulation([30_000, 20_000, 60_000])
    simulation.run(5)
    while simulation.worker["until_trial"] > 0:
        simulation.turn()
    assert simulation.worker["best"] == POLL
    # A stall, as disks have them, that happens to hit the best policy.
    simulation.rates = [30_000, 20_000, 31_000]
    assert simulation.run_until_steady() == POLL


def test_a_sparse_load_ends_in_sleep() -> None:
    simulation = Simulation([30_000, 20_000, 60_000])
    assert simulation.run_until_steady() == POLL
    for _ in range(GAPS):
        simulation.sleep(GAP_NS)
        simulation.turn()
    assert simulation.worker["policy"] == SLEEP
    for _ in range(100):
        simulation.sleep(GAP_NS)
        simulation.turn()
    assert simulation.worker["policy"] == SLEEP
    simulation.run(0.2)
    assert simulation.worker["policy"] == POLL, "a dense load is tried again"


def test_occasional_gaps_change_nothing() -> None:
    simulation = Simulation([30_000, 20_000, 60_000])
    simulation.run(1)
    for _ in range(3 * GAPS):
        simulation.sleep(5 * GAP_NS)
        simulation.run(0.05)
        assert simulation.worker["best"] == POLL


def test_too_few_requests_decide_nothing() -> None:
    simulation = Simulation([1_000, 1_000, 1_000])
    simulation.turn()
    start = int(simulation.worker["completed"])
    while simulation.worker["until_trial"] > 0:
        simulation.turn(1_000_000)
    assert int(simulation.worker["completed"]) - start >= tune.ENOUGH
