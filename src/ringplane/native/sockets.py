"""sendmsg(2): the kernel's include/linux/socket.h."""

from __future__ import annotations

import numpy as np

# struct user_msghdr
MESSAGE = np.dtype([(name, "<i8") for name in ("name", "name_length", "iov", "iov_count", "control", "size", "flags")])
