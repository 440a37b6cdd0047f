"""What the screen is made from: what is known of a process, and how a user looks at it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ringplane.cli.top.figures import BARS, Sample, sparkline, spread
from ringplane.client.rates import Rates

# Seconds of a sparkline, and its cells: at least, and at most one for each second.
MINUTE, SPARK, LONGEST_SPARK = 60.0, 10, 60

# Characters of a name.
LONGEST_NAME = 64

# What samples are of: (disk,) for its IOPS, or (disk, policy, counter).
Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class View:
    """How a user looks at disks, or at their policies: their order, and how many lines are above the screen."""

    sort: str = "iops"
    reverse: bool = False
    first: int = 0
    policies: bool = False


@dataclass(frozen=True, slots=True)
class Known:
    """What there is to show. `trouble`: why there is nothing newer; `bars`: of sparklines. Empty: there are none."""

    title: str
    rates: Rates | None = None
    samples: Mapping[Key, Iterable[Sample]] = field(default_factory=dict)
    end: float = 0.0
    trouble: str = ""
    bars: str = BARS

    @property
    def policies(self) -> int:
        """How many there are."""
        return sum(len(disk.policies) for disk in self.rates.disks) if self.rates else 0

    def spark(self, key: Key, cells: int) -> str:
        """The last minute."""
        return sparkline(spread(self.samples.get(key, ()), self.end, MINUTE, cells), self.bars)
