"""readv(2): the kernel's include/uapi/linux/uio.h."""

from __future__ import annotations

import numpy as np

# struct iovec, and how many of them one call takes at most
IOVEC = np.dtype([("base", "<i8"), ("len", "<i8")])
IOVEC_SIZE = IOVEC.itemsize
IOV_MAX = 1024
