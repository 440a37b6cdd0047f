"""Numbers in five characters or fewer, and sparklines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

NOTHING = "-"

# From a disk that does nothing to the most that it did in the time that is shown.
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.:-=+*#"


def count(value: float) -> str:
    """`0`, `3.2`, `12345`, `123k`, `1.23M`."""
    if value < 0.05:
        return "0"
    if value < 9.95:
        return f"{value:.1f}"
    if value < 99_999.5:
        return f"{value:.0f}"
    if value < 999_500:
        return f"{value / 1e3:.0f}k"
    return f"{value / 1e6:.2f}M" if value < 9.995e6 else f"{value / 1e6:.0f}M"


def whole(number: int) -> str:
    """The same for what is counted one by one: `7`."""
    return str(number) if number < 10 else count(number)


def megabytes(bytes_per_second: float) -> str:
    """Millions of bytes."""
    return count(bytes_per_second / 1e6)


def latency(microseconds: float | None) -> str:
    """`<1us`, `8.5us`, `850us`, `1.2ms`, `12s`."""
    if microseconds is None:
        return NOTHING
    if microseconds < 0.05:
        # The loop reads the clock once per turn.
        return "<1us"
    value, units = microseconds, iter(("us", "ms", "s"))
    unit = next(units)
    while value >= 999.5 and unit != "s":
        value, unit = value / 1000, next(units)
    return f"{value:.1f}{unit}" if value < 9.95 else f"{value:.0f}{unit}"


def percent(share: float) -> str:
    """`45%`, `<1%`; nothing for 0."""
    if share <= 0:
        return NOTHING
    return "<1%" if share < 0.01 else f"{100 * share:.0f}%"


def sparkline(values: Sequence[float | None], bars: str = BARS) -> str:
    """A character for each value; None, which is not known, is a space."""
    highest = max((value for value in values if value is not None), default=0.0)
    return "".join(" " if value is None else bars[_height(value, highest, len(bars))] for value in values)


def _height(value: float, highest: float, bars: int) -> int:
    """0 only for a value of 0."""
    return max(round(value / highest * (bars - 1)), 1) if value > 0 else 0


# The end of an interval, its length in seconds, and the value in it.
Sample = tuple[float, float, float]


def spread(samples: Iterable[Sample], end: float, seconds: float, cells: int) -> list[float | None]:
    """The mean of the samples in each of so many equal parts of the `seconds` before `end`; None without samples."""
    width, start = seconds / cells, end - seconds
    sums, times = [0.0] * cells, [0.0] * cells
    for until, length, value in samples:
        first, last = (until - length - start) / width, (until - start) / width
        for cell in range(max(math.floor(first), 0), min(math.ceil(last), cells)):
            share = min(last, cell + 1) - max(first, cell)
            sums[cell] += value * share
            times[cell] += share
    return [total / time if time > 1e-6 else None for total, time in zip(sums, times, strict=True)]
