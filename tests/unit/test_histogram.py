"""Latency histograms: buckets without gaps, and percentiles close to the exact ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringplane.metrics import histogram

values = st.one_of(
    st.integers(0, 2**63 - 1),
    st.integers(0, 62).flatmap(lambda bits: st.integers(max(0, (1 << bits) - 2), (1 << bits) + 2)),
)


def bucket_of(value: int) -> int:
    counts = np.zeros(histogram.BUCKETS + 1, np.int64)
    histogram.count(counts.ctypes.data, value)
    (bucket,) = np.flatnonzero(counts)
    return int(bucket)


def histogram_of(data: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    counts = np.zeros(histogram.BUCKETS, np.int64)
    for value in data:
        histogram.count(counts.ctypes.data, int(value))
    return counts


@given(values)
def test_a_value_lies_between_its_bucket_s_bound_and_the_next(value: int) -> None:
    bounds = histogram.lower_bounds()
    bucket = bucket_of(value)
    assert bounds[bucket] <= value
    if bucket + 1 < histogram.BUCKETS:
        assert value < bounds[bucket + 1] or float(value) == bounds[bucket + 1]


@given(values, values)
def test_buckets_are_monotonic(one: int, other: int) -> None:
    lower, upper = sorted((one, other))
    assert bucket_of(lower) <= bucket_of(upper)


def test_bounds_ascend_in_steps_of_at_most_a_sixteenth() -> None:
    bounds = histogram.lower_bounds()
    steps = np.diff(bounds)
    assert (steps > 0).all()
    assert (steps[histogram.STEPS :] <= bounds[histogram.STEPS : -1] / 16).all()


def test_the_largest_value_has_the_last_bucket_or_one_before_it() -> None:
    assert bucket_of(2**63 - 1) < histogram.BUCKETS


def test_counts_add_up() -> None:
    assert histogram_of(np.array([5, 5, 5, 1000])).sum() == 4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("percent", [1, 50, 90, 99, 100])
def test_percentiles_are_within_six_percent(seed: int, percent: int) -> None:
    random = np.random.default_rng(seed)
    data = random.lognormal(mean=11, sigma=1.5, size=2000).astype(np.int64)
    exact = float(np.percentile(data, percent, method="inverted_cdf"))
    assert histogram.percentile(histogram_of(data), percent) == pytest.approx(exact, rel=0.06)


@given(st.integers(0, 15))
def test_small_values_are_exact(value: int) -> None:
    assert histogram.percentile(histogram_of(np.array([value])), 50) == value


def test_an_empty_histogram_has_percentile_zero() -> None:
    assert histogram.percentile(np.zeros(histogram.BUCKETS, np.int64), 99) == 0


@given(st.lists(values))
def test_how_many_are_below_each_power_of_two(data: list[int]) -> None:
    expected = [sum(value < 2**power for value in data) for power in range(10, 35)]
    assert histogram.below(histogram_of(np.array(data, np.int64)), 10, 25).tolist() == [*expected, len(data)]
