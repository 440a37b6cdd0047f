"""fallocate(2): the kernel's include/uapi/linux/falloc.h."""

from __future__ import annotations

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 0x01, 0x02, 0x10
