"""How a worker sleeps until it has something to do, for a disk at its limit or a layer that waits.

A sleep with a timeout sets a timer of the kernel, and cancels it if something else ends the sleep. In a virtual machine
each of the two can be an exit. For a busy disk beside one at its limit that was 2.1 us per request, and cost it a third
of its requests. So only the first sleep until a certain time has a timeout. If something else ends that, a timerfd is
set to the same time, and stays set: the next sleeps need no timer.
"""

from __future__ import annotations

import logging
import os

import numpy as np
import numpy.typing as npt

from ringplane.compiler.jit import compiled
from ringplane.native import timerfd
from ringplane.native.access import view
from ringplane.native.structs import struct
from ringplane.native.syscalls import timerfd_settime
from ringplane.native.time_types import ITIMERSPEC

log = logging.getLogger(__name__)

# Times are in nanoseconds, CLOCK_MONOTONIC.
ALARM = struct(
    "fd",
    "spec",  # ITIMERSPEC
    "set_to",  # what the timerfd was set to last
    "slept_until",  # the time of the last sleep that had a timeout
)


@compiled
def find_timeout_until(address, time, now):
    """How many nanoseconds to sleep if there is something to do at this time; -1: until the timerfd ends the sleep.

    `address` is that of an ALARM; 0: every sleep has a timeout.
    """
    if time <= now:
        return 0
    if not address:
        return time - now
    alarm = view(address, ALARM)
    if time != alarm.set_to:
        if time != alarm.slept_until:
            alarm.slept_until = time
            return time - now
        set_to(alarm, time)
    return -1


@compiled
def set_to(alarm, time):
    spec = view(alarm.spec, ITIMERSPEC)
    spec.value_sec, spec.value_nsec = time // 1_000_000_000, time % 1_000_000_000
    timerfd_settime(alarm.fd, timerfd.TFD_TIMER_ABSTIME, alarm.spec, 0)
    alarm.set_to = time


class Alarm:
    """Owns an ALARM struct and its timerfd. `address` is 0 where timerfds are unavailable."""

    def __init__(self) -> None:
        self._spec: npt.NDArray[np.void] = np.zeros(1, ITIMERSPEC)
        self._record: npt.NDArray[np.void] = np.zeros(1, ALARM)
        self.address, self.fd = 0, -1
        try:
            self.fd = timerfd.create()
        except OSError as error:
            log.warning("timerfd_create(2) is unavailable (%s): limited disks slow down others", error.strerror)
            return
        self.address = int(self._record.ctypes.data)
        self._record["fd"], self._record["spec"] = self.fd, self._spec.ctypes.data

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
