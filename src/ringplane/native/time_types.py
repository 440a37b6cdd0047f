"""The kernel's include/uapi/linux/time_types.h."""

from __future__ import annotations

import numpy as np

# struct __kernel_timespec
TIMESPEC = np.dtype([("tv_sec", "<i8"), ("tv_nsec", "<i8")])
# struct __kernel_itimerspec
ITIMERSPEC = np.dtype([("interval_sec", "<i8"), ("interval_nsec", "<i8"), ("value_sec", "<i8"), ("value_nsec", "<i8")])
