"""How an I/O thread spends its time. The kernel and the loop count it anyway, so that it costs the thread nothing."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np

# The clock of a thread's CPU time, as pthread_getcpuclockid(3) makes it; clock_gettime(2) fails if there is no such
# thread. From include/linux/posix-timers_types.h: CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED.
THREAD_CPU_CLOCK = 4 | 2


@dataclass(frozen=True, slots=True)
class ThreadTimes:
    """In nanoseconds. `busy` and `polling` are CPU time; all other time since the thread was started is `asleep`."""

    busy: int = 0
    polling: int = 0
    asleep: int = 0


class ThreadClock:
    """Reads the times of a thread with this WORKER struct. Any thread may call."""

    def __init__(self, record: np.void) -> None:
        self._record = record
        self._lock = threading.Lock()
        self._times = ThreadTimes()
        self._thread: threading.Thread | None = None

    def start(self, thread: threading.Thread) -> None:
        """The thread has been started."""
        self._began = time.monotonic_ns()
        # Last, because other threads may read the clock from now on.
        self._thread = thread

    def read(self) -> ThreadTimes:
        """The times so far. None of them is ever less than before, although they are not read at one moment."""
        with self._lock:
            if self._thread is not None and self._thread.native_id is not None:
                try:
                    used = time.clock_gettime_ns(~self._thread.native_id << 3 | THREAD_CPU_CLOCK)
                except OSError:
                    # The thread has ended.
                    return self._times
                self._times = self._advanced(used, time.monotonic_ns() - self._began)
            return self._times

    def _advanced(self, used: int, lasted: int) -> ThreadTimes:
        """The times after `used` nanoseconds of CPU time in `lasted` nanoseconds."""
        before = self._times
        # A thread that waits for a CPU while it polls needs less than the time that it measures.
        polling = max(before.polling, min(int(self._record["polled"]), used))
        return ThreadTimes(max(before.busy, used - polling), polling, max(before.asleep, lasted - used))
