"""Random times: four distributions, each given by its median and its 99th percentile."""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.policies.fixed_point import ONE, exp2, log2
from ringplane.policies.io_view import below, normal
from ringplane.policies.parameter_kinds import one_of

DISTRIBUTION = one_of("fixed", "uniform", "normal", "long-tail")
FIXED, UNIFORM, NORMAL, LONG_TAIL = range(4)

# The standard deviation of `normal`, as a part of the way from its median to its 99th percentile.
DEVIATION = 0.434362
# log2(50), in 65536ths: of the I/Os above the median, one in 50 is above the 99th percentile.
LOG2_OF_50 = 369_876
# No time is more than 2^30 medians long.
LARGEST = 30 * ONE


@compiled
def random_time(io, distribution, median, p99):
    """A random time; none is below 0."""
    if distribution == UNIFORM:
        # From the median it is 49 hundredths to the percentile, of 50 to the end.
        return max(0, median + (p99 - median) * (below(io, 2_000_001) - 1_000_000) // 980_000)
    if distribution == NORMAL:
        return max(0, int(normal(io, median, (p99 - median) * DEVIATION)))
    return long_tail(io, median, p99) if distribution == LONG_TAIL else median


@compiled
def long_tail(io, median, p99):
    """Pareto's distribution: each further nine of the percentile multiplies the time by the same factor."""
    if median == 0:
        return 0
    # Twice the part of all I/Os that take longer than this one: 1 at the median.
    longer = log2(1 + below(io, 1 << 32)) - 31 * ONE
    exponent = -longer * (log2(max(p99, 1)) - log2(median)) // LOG2_OF_50
    return scaled(median, exp2(min(exponent, LARGEST)))


@compiled
def scaled(number, factor):
    """The number times a factor in 65536ths."""
    return number * (factor >> 16) + (number * (factor & (ONE - 1)) >> 16)
