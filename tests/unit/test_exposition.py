"""The text format of metrics, read by prometheus_client's parser."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from ringplane.metrics import histogram
from ringplane.metrics.exposition import Metric, histogram_text, labelled, text

labels = st.text(st.characters(exclude_categories=["Cs"]))
numbers = st.one_of(st.integers(0, 2**53), st.floats(0, 1e18))


def parsed(content: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The value of each line, by its name and labels."""
    (family,) = text_string_to_metric_families(content)
    return {(each.name, tuple(each.labels.items())): each.value for each in family.samples}


@given(st.dictionaries(st.tuples(labels, labels), numbers, min_size=1))
def test_labels_and_values_are_read_as_they_were(samples: dict[tuple[str, ...], float]) -> None:
    metric = Metric("some_total", "counter", ("one", "other"), "Help.")
    content = text(metric, [(labelled(metric.labels, values), value) for values, value in samples.items()])
    assert parsed(content) == {
        ("some_total", (("one", one), ("other", other))): value for (one, other), value in samples.items()
    }


def test_a_metric_without_labels() -> None:
    content = text(Metric("some", "gauge", (), "Help."), [(labelled((), ()), 1.5)])
    assert content == "# HELP some Help.\n# TYPE some gauge\nsome 1.5\n"


@given(st.tuples(labels, labels))
def test_a_histogram(values: tuple[str, ...]) -> None:
    metric = Metric("some", "histogram", ("one", "other"), "Help.", (0.5, 1e-06))
    named = tuple(zip(metric.labels, values, strict=True))
    content = "".join(histogram_text(metric, [(labelled(metric.labels, values), [1, 2, 5], 0.25)]))
    assert parsed(content) == {
        ("some_bucket", (*named, ("le", "0.5"))): 1,
        ("some_bucket", (*named, ("le", "1e-06"))): 2,
        ("some_bucket", (*named, ("le", "+Inf"))): 5,
        ("some_sum", named): 0.25,
        ("some_count", named): 5,
    }


@given(st.lists(st.integers(0, 2**63 - 1), max_size=20), st.integers(histogram.STEP_BITS, 40))
def test_values_below_powers_of_two(values: list[int], lowest: int) -> None:
    counts = np.zeros(histogram.BUCKETS, np.int64)
    for value in values:
        histogram.count(counts.ctypes.data, value)
    below = np.arange(4)
    histogram.add_below(counts.ctypes.data, lowest, 3, below.ctypes.data)
    expected = [sum(value < 2**power for value in values) for power in range(lowest, lowest + 3)]
    assert below.tolist() == [number + more for number, more in enumerate([*expected, len(values)])]


@given(st.integers(0, 2**62))
def test_powers_have_values_up_to_their_bound(value: int) -> None:
    counts = np.zeros(histogram.POWERS, np.int64)
    histogram.count_power(counts.ctypes.data, value)
    if value == 0:
        assert not counts.any()
    else:
        (power,) = np.flatnonzero(counts)
        assert power == min(histogram.POWERS - 1, math.ceil(math.log2(value)) if value < 1 << 20 else 63)
