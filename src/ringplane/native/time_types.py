"""The kernel's include/uapi/linux/time_types.h."""

from __future__ import annotations

import numpy as np

# struct __kernel_timespec
TIMESPEC = np.dtype([("tv_sec", "<i8"), ("tv_nsec", "<i8")])
