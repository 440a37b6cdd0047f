"""What is known of a process after each answer: the rates of the last interval, and the IOPS of the last minute."""

from __future__ import annotations

from collections import defaultdict, deque

from ringplane.api.schemas import Statistics
from ringplane.cli.top.figures import Sample
from ringplane.client.rates import Rates, rates

# Seconds of a sparkline.
MINUTE = 60.0


class Sampler:
    """Gets one answer after the other."""

    def __init__(self) -> None:
        self.latest: Statistics | None = None
        # They stay when answers are missing.
        self.rates: Rates | None = None
        self.iops: defaultdict[str, deque[Sample]] = defaultdict(deque)
        # Of the last interval.
        self.end = 0.0

    def add(self, statistics: Statistics) -> Rates | None:
        """One more answer; returns the rates since the one before it, if there was one."""
        before, self.latest = self.latest, statistics
        if before is None:
            return None
        self.rates, self.end = rates(before, statistics), statistics.time
        self._remember(self.end, self.rates)
        return self.rates

    def interrupt(self) -> None:
        """Answers are missing: the next interval begins with the next answer."""
        self.latest = None

    def _remember(self, now: float, rates: Rates) -> None:
        for disk in rates.disks:
            samples = self.iops[disk.name]
            samples.append((now, rates.seconds, disk.iops))
            while samples[0][0] <= now - MINUTE:
                samples.popleft()
        for gone in self.iops.keys() - {disk.name for disk in rates.disks}:
            del self.iops[gone]
