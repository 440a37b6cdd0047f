"""What an I/O thread has counted: it continues the counters of the thread of its name in a previous process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ringplane.dataplane.thread_clock import ThreadClock
from ringplane.dataplane.worker_state import WorkerState
from ringplane.metrics.histogram import POWERS

# In nanoseconds (thread_clock.py), and as in WORKER.
TIMES, COUNTS = ("busy", "polling", "asleep"), ("wakeups", "completed", "fetched")

THREAD_COUNTERS = np.dtype([*((name, "<i8") for name in TIMES + COUNTS), ("batches", "<i8", (POWERS,))])
# What each of the numbers is that one process hands over to the next.
LAYOUT = [*TIMES, *COUNTS, POWERS]


class ThreadCounters:
    """Any thread may read them."""

    def __init__(self, state: WorkerState, clock: ThreadClock) -> None:
        self._state, self._clock = state, clock
        # What another process has counted, and what this one had counted when it handed over.
        self._before: npt.NDArray[np.int64] = np.zeros(THREAD_COUNTERS.itemsize // 8, np.int64)
        self._frozen: npt.NDArray[np.int64] | None = None

    def read(self) -> np.void:
        """A THREAD_COUNTERS. None of the numbers is ever less than before."""
        counted: np.void = self._read().view(THREAD_COUNTERS)[0]
        return counted

    def hand_over(self) -> list[int]:
        """The same for another process. They stay as they are until `thaw`, because that process continues them."""
        self._frozen = self._read()
        numbers: list[int] = self._frozen.tolist()
        return numbers

    def thaw(self) -> None:
        """No other process continues them."""
        self._frozen = None

    def resume(self, numbers: Sequence[int]) -> None:
        """Continue with the numbers of another process. Raises ValueError."""
        self._before += np.array(numbers, np.int64) - self._read()

    def _read(self) -> npt.NDArray[np.int64]:
        if (frozen := self._frozen) is not None:
            return frozen
        counted = np.zeros(1, THREAD_COUNTERS)
        times, record = self._clock.read(), self._state.record
        for name in TIMES:
            counted[name] = getattr(times, name)
        for name in COUNTS:
            counted[name] = record[name]
        counted["batches"] = self._state.batches
        return counted.view(np.int64) + self._before
