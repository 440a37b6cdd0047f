"""What a disk has done: counters by kind of request."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringplane.dataplane.queue import Queue
from ringplane.dataplane.state import KINDS
from ringplane.metrics import histogram


@dataclass(frozen=True, slots=True)
class Counter:
    """Counters of one kind of request, over all queues and front ends of an export.

    `requests` have been answered, `errors` of them with a status other than OK; `bytes` were transferred.
    `histogram` counts nanoseconds from fetch to answer in the buckets of `ringplane.metrics.histogram`.
    """

    requests: int
    errors: int
    bytes: int
    histogram: npt.NDArray[np.int64]

    def percentile_us(self, percent: float) -> float:
        """The latency in microseconds that `percent` of the requests did not exceed; 0 without requests."""
        return histogram.percentile(self.histogram, percent) / 1000


def count(queues: Iterable[Queue]) -> dict[str, Counter]:
    """The counters of these queues together, by kind of request: `read`, `write`, `flush` and `other`."""
    # Queues that were never started share counters that stay 0.
    counted = {id(queue.counters): queue.counters for queue in queues}
    total = [np.stack([each[kind] for each in counted.values()]) for kind in range(len(KINDS))]
    return {
        name: Counter(
            int(rows["requests"].sum()),
            int(rows["errors"].sum()),
            int(rows["bytes"].sum()),
            rows["histogram"].sum(axis=0),
        )
        for name, rows in zip(KINDS, total, strict=True)
    }
