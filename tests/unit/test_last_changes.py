"""What is on a disk after changes of its ranges, against a list of its blocks."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ringplane.driver.last_changes import different_parts, joined, last_changes

# Start and length of each change; on a small disk, so that many overlap, touch or are the same.
CHANGES = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12)), max_size=25)


def runs(changes: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    starts = np.array([start for start, _ in changes], np.int64)
    return list(last_changes(starts, starts + np.array([length for _, length in changes], np.int64)))


@given(CHANGES)
def test_each_block_has_what_changed_it_last(changes: list[tuple[int, int]]) -> None:
    expected: dict[int, int] = {}
    for number, (start, length) in enumerate(changes):
        expected |= dict.fromkeys(range(start, start + length), number)
    found = [(block, number) for start, end, number in runs(changes) for block in range(start, end)]
    # Each once, and in their order.
    assert found == sorted(expected.items())


def test_a_large_range_costs_as_much_as_a_small_one() -> None:
    """mkfs discards the whole disk. One entry per block would be 2 GiB of them."""
    size = 1 << 40
    changes = [(0, size), (4096, 512), (0, size), (size - 512, 512)] * 100
    tracemalloc.start()
    try:
        assert runs(changes)[-1] == (size - 512, size, 399)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@given(st.lists(st.tuples(st.integers(0, 2), st.binary(min_size=1, max_size=6)), max_size=12), st.integers(6, 14))
def test_contents_that_touch_are_joined(gaps: list[tuple[int, bytes]], most: int) -> None:
    place, contents, expected = 0, [], {}
    for gap, content in gaps:
        place += gap
        contents.append((place, content))
        expected |= dict(enumerate(content, place))
        place += len(content)
    found = list(joined(contents, most))
    assert [(start + at, byte) for start, content in found for at, byte in enumerate(content)] == list(expected.items())
    assert all(len(content) <= most for _, content in found)
    for (start, content), (following, _) in itertools.pairwise(found):
        # The largest one has 6 bytes.
        assert start + len(content) < following or len(content) + 6 > most


@given(st.binary(max_size=64), st.data(), st.integers(1, 8))
def test_different_parts(expected: bytes, data: st.DataObject, unit: int) -> None:
    changed = data.draw(st.sets(st.integers(0, len(expected) - 1))) if expected else set()
    found = bytes(byte ^ (place in changed) for place, byte in enumerate(expected))
    parts = list(different_parts(found, expected, unit))
    units = {place // unit for place in changed}
    assert {place // unit for start, length in parts for place in range(start, start + length)} == units
    assert all(start % unit == 0 and start + length <= len(expected) for start, length in parts)
    # Those that touch are one.
    assert all(start + length < following for (start, length), (following, _) in itertools.pairwise(parts))
