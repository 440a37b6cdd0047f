"""Meters made from the options of a disk or a group, and their change while I/O threads use them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ringplane.limits.member import Member
from ringplane.limits.meter_plans import MeterPlan, plan_meters
from ringplane.limits.meters import METER, TICKS, move_level
from ringplane.limits.shares import LIMITS
from ringplane.native.structs import new
from ringplane.options.limit_options import Rates, rates_of


class Level:
    """How full a bucket is. It outlives changes of its limit: what threads with the previous limits do counts too."""

    def __init__(self, plan: MeterPlan, now: int) -> None:
        """An empty bucket."""
        self._plan = plan
        self._empty_at = np.array([now], np.int64)
        self.address = int(self._empty_at.ctypes.data)

    @property
    def empty_at(self) -> int:
        """When it will be empty, in ticks."""
        return int(self._empty_at[0])

    def change(self, plan: MeterPlan, now: int) -> None:
        """Have it as full as that of the new limit should be."""
        level = max(self.empty_at - now, 0)
        move_level(self.address, plan.level_after(self._plan, level) - level)
        self._plan = plan

    def resume_from(self, plan: MeterPlan, empty_at: int, now: int) -> None:
        """Have it at least as full as another one of this plan, before any thread uses it."""
        level = self._plan.level_after(plan, max(empty_at - now, 0))
        self._empty_at[0] = max(self.empty_at, now + level)


class Limiter:
    """The limits of some disks. It never changes: other limits, or other disks, are another Limiter."""

    def __init__(
        self, rates: Rates, members: Sequence[Member], previous: Limiter | None = None, now: int | None = None
    ) -> None:
        """`previous`: what these disks had before. `now`: CLOCK_MONOTONIC in nanoseconds."""
        now = (time.monotonic_ns() if now is None else now) * TICKS
        self._rates = rates
        self._members = tuple(members)
        plans = plan_meters(rates)
        # By the names of the meters.
        self.levels: dict[str, Level] = {}
        self._meters = new(METER, max(len(plans), 1))
        for record, (name, plan) in zip(self._meters, plans.items(), strict=False):
            for field, value in plan._asdict().items():
                record[field] = value
            level = self.levels[name] = previous.level(name, plan, now) if previous is not None else Level(plan, now)
            record["empty_at"] = level.address
        self._addresses = np.array([member.address for member in members], np.int64)
        self._record = new(LIMITS)
        self.address = int(self._record.ctypes.data)
        record = self._record[0]
        record["meters"], record["meter_count"] = self._meters.ctypes.data, len(plans)
        record["members"], record["member_count"] = self._addresses.ctypes.data, len(members)
        record["clock"] = previous.clock if previous is not None else 0

    @property
    def clock(self) -> int:
        """See LIMITS."""
        return int(self._record["clock"][0])

    def snapshot(self) -> dict[str, Any]:
        """How full the buckets are, for another process: when they will be empty, in ns of CLOCK_MONOTONIC."""
        return {
            "rates": self._rates.keys(),
            "empty_at": {name: -(-level.empty_at // TICKS) for name, level in self.levels.items()},
        }

    def resume_from(self, saved: Mapping[str, Any], now: int | None = None) -> None:
        """Continue with the levels of another process, which may have had other limits; before any thread uses this."""
        now = (time.monotonic_ns() if now is None else now) * TICKS
        plans = plan_meters(rates_of(saved["rates"]))
        for name in plans.keys() & self.levels.keys():
            self.levels[name].resume_from(plans[name], saved["empty_at"][name] * TICKS, now)

    def level(self, name: str, plan: MeterPlan, now: int) -> Level:
        """That of the meter of this name, for its new plan; a new one if there was none."""
        if name not in self.levels:
            return Level(plan, now)
        self.levels[name].change(plan, now)
        return self.levels[name]
