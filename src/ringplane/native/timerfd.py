"""timerfd_create(2): constants of the kernel's include/uapi/linux/timerfd.h."""

from __future__ import annotations

import os
import time

from ringplane.system import libc
from ringplane.system.syscall_numbers import NUMBERS

TFD_TIMER_ABSTIME = 1


def create() -> int:
    """A timer of CLOCK_MONOTONIC; raises OSError."""
    return libc.system_call(NUMBERS["timerfd_create"], time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
