"""Workloads, and the cells of a table."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ringplane.options.counted import counted

KIB = 1024

EVENT, BUSY = "event", "busy"
DRIVERS = (EVENT, BUSY)


@dataclass(frozen=True, slots=True)
class Workload:
    """A kind of load; `block_size` in bytes, `read_percent` of the requests are reads."""

    name: str
    title: str
    block_size: int
    pattern: Literal["random", "sequential"]
    read_percent: int

    @property
    def writes(self) -> bool:
        """Whether it changes the image."""
        return self.read_percent < 100


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("randread", "4 KiB random reads", 4 * KIB, "random", 100),
        Workload("randwrite", "4 KiB random writes", 4 * KIB, "random", 0),
        Workload("randrw", "4 KiB random, 70 % reads", 4 * KIB, "random", 70),
        Workload("seqread", "64 KiB sequential reads", 64 * KIB, "sequential", 100),
        Workload("seqwrite", "64 KiB sequential writes", 64 * KIB, "sequential", 0),
    )
}
READ_ONLY_WORKLOADS = tuple(name for name, workload in WORKLOADS.items() if not workload.writes)

FULL_DEPTHS = (1, 8, 32, 128)
FULL_QUEUES = (1, 2)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the table: `depth` requests in flight on each of `queues` queues; `driver` is EVENT or BUSY."""

    workload: str
    depth: int
    queues: int
    driver: str

    def __str__(self) -> str:
        return f"{self.workload} depth {self.depth}, {counted(self.queues, 'queue')}, {self.driver}"

    @property
    def order(self) -> tuple[int, int, int, int]:
        """The key that sorts cells in the order of a table."""
        return self.queues, DRIVERS.index(self.driver), list(WORKLOADS).index(self.workload), self.depth


def table(workloads: Iterable[str], depths: Iterable[int], queues: Iterable[int], drivers: Iterable[str]) -> list[Cell]:
    """All combinations, in the order of a table."""
    cells = {Cell(*values) for values in itertools.product(workloads, depths, queues, drivers)}
    return sorted(cells, key=lambda cell: cell.order)
