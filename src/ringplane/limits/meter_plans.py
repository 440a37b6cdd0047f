"""What meters are made from: options as exact numbers. `fractions` takes memory, so only limited disks import this."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

from ringplane.limits.meters import (
    COST_BITS,
    LONGEST,
    MOST_ROOM,
    MOST_TICKS,
    READS,
    TICKS_PER_SECOND,
    WRITES,
)
from ringplane.options.limit_options import UNLIMITED, Rates

KINDS = {"total": READS | WRITES, "read": READS, "write": WRITES}

# A bucket without a burst, and that for the rate of a burst, hold a tenth of a second: otherwise a thread that is late
# would lose what it could have done meanwhile.
SHORT = Fraction(1, 10)


class MeterPlan(NamedTuple):
    """What a meter is made from: the fields of METER, but for its level."""

    kinds: int
    least: int
    cost: int
    shift: int
    most: int
    room: int

    @property
    def unit_cost(self) -> Fraction:
        """Of one request or byte, in ticks."""
        return Fraction(self.least) or Fraction(self.cost, 1 << self.shift)

    def level_after(self, old: MeterPlan, level: int) -> int:
        """How full a bucket of the plan `old` is when this one is its plan.

        It stays as full as it was, as a part of its room. A debt is as many requests or bytes as it was, but never
        lasts longer: after a change from 1 GB to 1 MB per second it could last for hours.
        """
        debt = max(level - old.room, 0)
        if self.unit_cost < old.unit_cost:
            debt = int(debt * self.unit_cost / old.unit_cost)
        return min(level, old.room) * self.room // max(old.room, 1) + debt


def plan_meter(kinds: int, *, least: Fraction, per_byte: Fraction, room: Fraction) -> MeterPlan:
    """A request costs `per_byte` seconds for each byte, and at least `least` seconds; the bucket holds `room`."""
    ticks = per_byte * TICKS_PER_SECOND
    shift = max(0, COST_BITS - int(ticks).bit_length())
    cost = round(ticks * (1 << shift))
    most = min(LONGEST, (MOST_TICKS << shift) // cost) if cost else 0
    return MeterPlan(
        kinds, round(least * TICKS_PER_SECOND), cost, shift, most, min(int(room * TICKS_PER_SECOND), MOST_ROOM)
    )


def plan_meters(rates: Rates) -> Mapping[str, MeterPlan]:
    """A meter for each limit, and one more for each burst that lasts longer than a second."""
    plans = {}
    for rate in rates.limits():
        average = Fraction(1, rate.average)
        room = SHORT if rate.highest == UNLIMITED else Fraction(rate.highest * rate.length, rate.average)
        plans[rate.name] = _plan(rates, rate.scope, rate.counts_bytes, average, room)
        if rate.length > 1:
            plans[f"{rate.name}-max"] = _plan(rates, rate.scope, rate.counts_bytes, Fraction(1, rate.highest), SHORT)
    return plans


def _plan(rates: Rates, scope: str, counts_bytes: bool, seconds: Fraction, room: Fraction) -> MeterPlan:
    """`seconds` for each byte or request."""
    none = Fraction(0)
    if counts_bytes:
        return plan_meter(KINDS[scope], least=none, per_byte=seconds, room=room)
    per_byte = seconds / rates.size_iops_sec if rates.size_iops_sec else none
    return plan_meter(KINDS[scope], least=seconds, per_byte=per_byte, room=room)
