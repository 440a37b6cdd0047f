"""A service on another machine as metrics see it: whether it is usable, and how long it takes apart from our own share.

A *request* is what a source passes to the service: an I/O can be several of them, and two I/Os never share one. It
lasts until its reply has come, or until the source gives it up; a connection that is made again meanwhile is part of
that. What a request waits for here before and after that, in the ring, in layers or because the I/O thread has other
things to do, is only in the time that the guest sees.

The I/O thread of a part counts, in memory of the part, which others read. Nothing of it is used by other sources.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from ringplane.compiler.jit import compiled
from ringplane.metrics.histogram import BUCKETS, count
from ringplane.native.access import address_of, view

# By their numbers in block/io.py.
OPERATIONS = ("read", "write", "flush", "discard", "write_zeroes")

# Of one operation.
SERVICE_TIME = np.dtype(
    [
        ("begun", "<i8"),  # requests
        ("ended", "<i8"),
        ("nanoseconds", "<i8"),  # that these took, all of them
        ("histogram", "<i8", (BUCKETS,)),  # the same
    ]
)
SERVICE_TIME_SIZE = SERVICE_TIME.itemsize
SERVICE_HISTOGRAM: int = SERVICE_TIME.fields["histogram"][1]  # type: ignore[index]


@compiled
def count_begin(times, operation):
    """A request is passed to the service; `times` is the address of the SERVICE_TIME structs of the part."""
    view(times + operation * SERVICE_TIME_SIZE, SERVICE_TIME).begun += 1


@compiled
def count_end(times, operation, lasted):
    """A request that was begun has ended after so many nanoseconds."""
    time = view(times + operation * SERVICE_TIME_SIZE, SERVICE_TIME)
    time.ended += 1
    time.nanoseconds += lasted
    count(address_of(time) + SERVICE_HISTOGRAM, lasted)


class ServiceTimes:
    """Owns the SERVICE_TIME structs of a part."""

    def __init__(self) -> None:
        self.records: npt.NDArray[np.void] = np.zeros(len(OPERATIONS), SERVICE_TIME)
        self.address = int(self.records.ctypes.data)


# `ok`: requests are passed on. `reconnecting`: a connection was lost, and requests wait for another one. `failing`:
# they fail until there is one. `blocklisted`: a Ceph cluster accepts nothing from this process any more.
ServiceState = Literal["ok", "reconnecting", "failing", "blocklisted"]
STATES: tuple[ServiceState, ...] = ("ok", "reconnecting", "failing", "blocklisted")


class Service:
    """What is known of the service of a disk. Any thread may read it."""

    def __init__(self, state: Callable[[], ServiceState], reconnects: Callable[[], int] | None = None) -> None:
        """`reconnects`: how many connections were made in place of lost ones; None: it is not known."""
        self._state, self._reconnects = state, reconnects
        self._parts: list[ServiceTimes] = []
        # What a previous process has counted.
        self._before = np.zeros(len(OPERATIONS), SERVICE_TIME)
        self._reconnects_before = 0

    def add(self, times: ServiceTimes) -> None:
        """Read those of one more part."""
        self._parts.append(times)

    @property
    def state(self) -> ServiceState:
        return self._state()

    @property
    def reconnects(self) -> int | None:
        """How many connections were made in place of lost ones; None: it is not known."""
        return None if self._reconnects is None else self._reconnects_before + self._reconnects()

    @property
    def in_flight(self) -> int:
        """Requests that the service has."""
        # In this order: what ends meanwhile must not count as one that was never begun.
        ended = self._sum("ended")
        return self._sum("begun") - ended

    def _sum(self, name: str) -> int:
        return sum(int(part.records[name].sum()) for part in tuple(self._parts))

    def times(self) -> npt.NDArray[np.void]:
        """The sum of all parts: SERVICE_TIME for each of OPERATIONS, whose numbers do not change any more."""
        summed = _numbers(self._before).copy()
        for part in tuple(self._parts):
            summed += _numbers(part.records)
        return summed.view(SERVICE_TIME)

    def counted(self) -> npt.NDArray[np.int64]:
        """All that was counted, for another process, while nothing is in flight."""
        return np.array([self.reconnects or 0, *_numbers(self.times())])

    def resume(self, counted: npt.NDArray[np.int64]) -> None:
        """Continue with the numbers of another process, which has counted the same. Raises ValueError."""
        self._reconnects_before = int(counted[0])
        _numbers(self._before)[:] = counted[1:]


def _numbers(records: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    return records.view(np.int64)
