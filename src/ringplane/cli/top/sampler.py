"""What is known of a process after each answer: the rates of the last interval, and samples of the last minute."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator

from ringplane.api.schemas import Statistics
from ringplane.cli.top.figures import Sample
from ringplane.cli.top.known import MINUTE, Key
from ringplane.client.rates import Rates, rates


class Sampler:
    """Gets one answer after the other."""

    def __init__(self) -> None:
        self.latest: Statistics | None = None
        # They stay when answers are missing.
        self.rates: Rates | None = None
        self.samples: defaultdict[Key, deque[Sample]] = defaultdict(deque)
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
        values = dict(_values(rates))
        for key, value in values.items():
            samples = self.samples[key]
            samples.append((now, rates.seconds, value))
            while samples[0][0] <= now - MINUTE:
                samples.popleft()
        for gone in self.samples.keys() - values.keys():
            del self.samples[gone]


def _values(rates: Rates) -> Iterator[tuple[Key, float]]:
    """What sparklines show."""
    for disk in rates.disks:
        yield (disk.name,), disk.iops
        for policy in disk.policies:
            for counter, counted in policy.counters.items():
                yield (disk.name, policy.name, counter), counted.per_second
