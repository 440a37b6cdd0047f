"""What a disk has done: counters by kind of request."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringplane.dataplane.queue import Queue
from ringplane.dataplane.state import COUNTER, COUNTER_HISTOGRAM, KINDS
from ringplane.metrics import histogram

# Where the histogram begins in a COUNTER struct that is seen as int64.
FIRST_BUCKET = COUNTER_HISTOGRAM // 8
SHAPE = len(KINDS), COUNTER.itemsize // 8
SCALARS = (COUNTER.names or ())[:FIRST_BUCKET]


@dataclass(frozen=True, slots=True)
class Counter:
    """Counters of one kind of request, over all queues and front ends of an export.

    `requests` have been answered, `errors` of them with a status other than OK; `bytes` were transferred. `nanoseconds`
    have passed from fetch to answer, in all; `histogram` counts them in the buckets of `ringplane.metrics.histogram`.
    """

    requests: int
    errors: int
    bytes: int
    nanoseconds: int
    histogram: npt.NDArray[np.int64]

    def percentile_us(self, percent: float) -> float:
        """The latency in microseconds that `percent` of the requests did not exceed; 0 without requests."""
        return histogram.percentile(self.histogram, percent) / 1000


def total(queues: Iterable[Queue]) -> npt.NDArray[np.int64]:
    """The sum of the queues' counters: a row for each of KINDS, with the SCALARS and then the histogram.

    A copy: I/O threads change the counters while they are used.
    """
    rows = [queue.counters.view(np.int64).reshape(SHAPE) for queue in queues]
    return rows[0].copy() if len(rows) == 1 else np.sum(rows, axis=0) if rows else np.zeros(SHAPE, np.int64)


def count(queues: Iterable[Queue]) -> dict[str, Counter]:
    """The counters of these queues together, by kind of request: `read`, `write`, `flush` and so on."""
    summed = total(queues)
    return {
        kind: Counter(**dict(zip(SCALARS, row[:FIRST_BUCKET].tolist(), strict=True)), histogram=row[FIRST_BUCKET:])
        for kind, row in zip(KINDS, summed, strict=True)
    }
