"""The WORKER struct of a worker, and what it points to."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ringplane.block.channel import Channel
from ringplane.compiler.units import Unit, addresses
from ringplane.dataplane.answer import publish_tracked
from ringplane.dataplane.dirty import mark_request, mark_ring, record_buffers
from ringplane.dataplane.failures import record_failure
from ringplane.dataplane.fetch import take_packed
from ringplane.dataplane.io_time import begin_tick
from ringplane.dataplane.requests import begin_other
from ringplane.dataplane.slots import Slots
from ringplane.dataplane.state import (
    ALWAYS,
    COALESCE,
    NEVER,
    POLICIES,
    POLL,
    SLEEP,
    TALLY,
    WORKER,
    WORKER_ONE,
)
from ringplane.dataplane.tune import end_sample
from ringplane.engines.aio import Aio
from ringplane.engines.uring import Uring
from ringplane.metrics.histogram import POWERS

# What a plain disk on a split ring does not do for each request is not compiled into the loop, which is the longest job
# of a first start, but beside it. The longest comes first. The fields of WORKER have the same names.
UNITS: tuple[Unit, ...] = (
    take_packed,
    end_sample,
    publish_tracked,
    begin_other,
    record_buffers,
    mark_request,
    mark_ring,
    record_failure,
    begin_tick,
)


class WorkerState:
    """Owns a WORKER struct: `array` holds it, `record` is it, `address` is its address."""

    def __init__(self, engine: Aio | Uring, slots: int, poll_us: int | None) -> None:
        """`poll_us`: how many microseconds to poll the rings at most before sleeping; None: never sleep."""
        self.array: npt.NDArray[np.void] = np.zeros(1, WORKER)
        self.record = self.array[0]
        self.address = int(self.array.ctypes.data)
        self.slots = Slots(slots)
        self.channel = Channel(engine.address, slots)
        self.tallies: npt.NDArray[np.void] = np.zeros(POLICIES, TALLY)
        record = self.record
        record["one"] = 1
        for name, address in addresses(UNITS).items():
            record[name] = address
        record["channel"], record["requests"] = self.channel.address, self.slots.address
        record["tallies"] = self.tallies.ctypes.data
        self.batches: npt.NDArray[np.int64] = np.zeros(POWERS, np.int64)
        record["batches"] = self.batches.ctypes.data
        self._set_policies(poll_us, engine.fine_timeouts)

    def _set_policies(self, poll_us: int | None, fine_timeouts: bool) -> None:
        """Set which polling policies the worker may choose from (tune.py)."""
        record = self.record
        if poll_us is None:
            record["policy"], record["poll_ns"], record["sample_end"] = POLL, ALWAYS, NEVER
        else:
            record["poll_ns"] = 1000 * poll_us
            record["policies"] = 1 << SLEEP | fine_timeouts << COALESCE | (poll_us > 0) << POLL
            # No trial before the first requests come.
            record["until_trial"] = 1

    @property
    def address_of_one(self) -> int:
        """The address of the number 1, which is written to eventfds."""
        return self.address + WORKER_ONE
