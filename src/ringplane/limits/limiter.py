"""Meters made from the options of a disk or a group, and their change while I/O threads use them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from ringplane.limits.meters import METER, READS, SHORT, TICKS, WRITES, MeterPlan, plan_meter
from ringplane.limits.shares import LIMITS, MEMBER
from ringplane.native.structs import new
from ringplane.options.limit_options import UNLIMITED, Rates

KINDS = {"total": READS | WRITES, "read": READS, "write": WRITES}


class Member:
    """What a disk has used of its limits. It lives as long as the disk."""

    def __init__(self) -> None:
        self._record = new(MEMBER)
        self.address = int(self._record.ctypes.data)

    @property
    def weight(self) -> int:
        """Its share of the limits of its group."""
        return int(self._record["weight"][0])

    @weight.setter
    def weight(self, weight: int) -> None:
        self._record["weight"] = weight

    @property
    def throttled(self) -> float:
        """Seconds in which its requests waited in the ring because of a limit."""
        return int(self._record["throttled"][0]) / 1e9


class Limiter:
    """The limits of some disks. It never changes: other limits, or other disks, are another Limiter."""

    def __init__(
        self, rates: Rates, members: Sequence[Member], previous: Limiter | None = None, now: int | None = None
    ) -> None:
        """`previous`: what these disks had before. `now`: CLOCK_MONOTONIC in nanoseconds."""
        now = (time.monotonic_ns() if now is None else now) * TICKS
        self._plans = plan_meters(rates)
        self._members = tuple(members)
        self.meters: npt.NDArray[np.void] = new(METER, max(len(self._plans), 1))
        for record, (name, plan) in zip(self.meters, self._plans.items(), strict=False):
            for field, value in plan._asdict().items():
                record[field] = value
            record["empty_at"] = now + (previous.level(name, plan.room, now) if previous is not None else 0)
        self._addresses = np.array([member.address for member in members], np.int64)
        self._record = new(LIMITS)
        self.address = int(self._record.ctypes.data)
        record = self._record[0]
        record["meters"], record["meter_count"] = self.meters.ctypes.data, len(self._plans)
        record["members"], record["member_count"] = self._addresses.ctypes.data, len(members)
        record["clock"] = previous.clock if previous is not None else 0

    @property
    def clock(self) -> int:
        """See LIMITS."""
        return int(self._record["clock"][0])

    def level(self, name: str, room: int, now: int) -> int:
        """How full the meter of this name is, as a part of another `room`.

        A debt is forgiven: after a change from 20,000 to 10 requests per second it would last for minutes.
        """
        if name not in self._plans:
            return 0
        record = self.meters[list(self._plans).index(name)]
        used = max(int(record["empty_at"]) - now, 0)
        return min(used * room // max(int(record["room"]), 1), room)


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
