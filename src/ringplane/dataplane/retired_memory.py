"""Memory tables that were replaced while requests in flight used them.

A request in flight holds addresses that were translated with the table of its time, so the table, and with it the
mappings, has to stay until the last of these requests has ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringplane.dataplane.queue import Queue
from ringplane.guest_memory.regions import MemoryTable


@dataclass(slots=True)
class _Retired:
    number: int
    table: MemoryTable


class RetiredMemory:
    """The retired tables of a worker, numbered; a request that uses one has its number in `retired_memory`."""

    def __init__(self, requests: npt.NDArray[np.void]) -> None:
        """`requests`: the worker's REQUEST structs."""
        self._requests = requests
        self._retired: list[_Retired] = []
        self._count = 0

    @property
    def tables(self) -> list[MemoryTable]:
        return [retired.table for retired in self._retired]

    def retire(self, queue: Queue, table: MemoryTable) -> None:
        """Keep the table, which the queue has used until now, as long as its requests in flight need it."""
        users = (self._requests["queue"] == queue.address) & (self._requests["retired_memory"] == 0)
        if users.any():
            self._count += 1
            self._requests["retired_memory"][users] = self._count
            self._retired.append(_Retired(self._count, table))

    def drop_unused(self) -> bool:
        """Drop the tables that no request needs any more; returns whether there were any."""
        if not self._retired:
            return False
        needed = set(self._requests["retired_memory"].tolist())
        kept = [retired for retired in self._retired if retired.number in needed]
        dropped = len(kept) < len(self._retired)
        self._retired = kept
        return dropped
