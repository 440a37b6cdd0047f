"""Latency histograms: powers of two in sixteen linear buckets each (at most 6 % wide), counted in compiled code."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ringplane.compiler.jit import compiled
from ringplane.native.access import count_leading_zeros, load64, store64

STEP_BITS = 4
STEPS = 1 << STEP_BITS
BUCKETS = STEPS * (64 - STEP_BITS)


@compiled
def count(histogram, value):
    """Count a `value` (nanoseconds, not negative) in the BUCKETS int64 at address `histogram`."""
    exponent = 63 - count_leading_zeros(value | (STEPS - 1)) - STEP_BITS + 1
    bucket = exponent * STEPS + ((value >> max(0, exponent - 1)) & (STEPS - 1))
    address = histogram + 8 * bucket
    store64(address, load64(address) + 1)


# Buckets of `count_power`; the last one is for all larger values too.
POWERS = 12


@compiled
def count_power(histogram, value):
    """Count a `value` in the POWERS int64 at address `histogram`: bucket i has those up to 2**i. 0 is not counted."""
    if value > 0:
        address = histogram + 8 * min(POWERS - 1, 64 - count_leading_zeros(value - 1))
        store64(address, load64(address) + 1)


@compiled
def add_below(histogram, lowest, powers, place):
    """Add how many values are below 2**lowest, twice that, and so on, and how many there are, to int64 at `place`.

    There are so many `powers` of two; `lowest` is at least STEP_BITS.
    """
    total = bucket = 0
    for index in range(powers + 1):
        # The buckets of a power of two end where those of the next one begin.
        end = (lowest + index - STEP_BITS + 1) * STEPS if index < powers else BUCKETS
        while bucket < end:
            total += load64(histogram + 8 * bucket)
            bucket += 1
        address = place + 8 * index
        store64(address, load64(address) + total)


def below(histogram: npt.NDArray[np.int64], lowest: int, powers: int) -> npt.NDArray[np.int64]:
    """The same of a (BUCKETS,) histogram: powers + 1 numbers."""
    ends = (np.arange(lowest, lowest + powers) - STEP_BITS + 1) * STEPS
    return histogram.cumsum()[[*(ends - 1), BUCKETS - 1]]


def lower_bounds() -> npt.NDArray[np.float64]:
    """The smallest value of each bucket, in the unit that was counted; shape (BUCKETS,)."""
    index = np.arange(BUCKETS)
    exponent, step = index // STEPS, index % STEPS
    return np.where(exponent == 0, step, (STEPS + step) * 2.0 ** (exponent - 1))


def middles() -> npt.NDArray[np.float64]:
    """The middle of each bucket, in the unit that was counted; shape (BUCKETS,)."""
    index = np.arange(BUCKETS)
    widths = np.where(index < 2 * STEPS, 1.0, 2.0 ** (index // STEPS - 1))
    return lower_bounds() + (widths - 1) / 2


def percentile(histogram: npt.NDArray[np.int64], percent: float) -> float:
    """The value below which `percent` of the counts of a (BUCKETS,) histogram lie (a bucket's middle); 0 if empty."""
    total = int(histogram.sum())
    if total == 0:
        return 0.0
    bucket = int(np.searchsorted(np.cumsum(histogram), max(1.0, total * percent / 100)))
    return float(middles()[bucket])
