"""What all engines share: operations, the struct that the data plane sees, completions and tokens."""

from __future__ import annotations

import numpy as np

READ, WRITE = 0, 1

# Which engine a struct belongs to.
AIO, IO_URING = 0, 1

# What `wait` reports beside completions: the token of each watched fd that became readable.
MAX_TOKENS = 64

# kind: one of the above; capacity: how many slots there are; prepared: operations queued and not yet taken by the
# kernel; stuck: the kernel did not take all of them, so that a new attempt makes sense only after a completion or some
# time; submits_in_wait: `wait` submits what is prepared with the system call that it makes anyway; completions, tokens:
# addresses of COMPLETION structs and of MAX_TOKENS int64.
ENGINE_FIELDS = [
    (name, "<i8")
    for name in (
        "kind",
        "capacity",
        "prepared",
        "stuck",
        "submits_in_wait",
        "completions",
        "tokens",
    )
]
ENGINE = np.dtype(ENGINE_FIELDS)

# result: bytes transferred, or -errno
COMPLETION = np.dtype([("slot", "<i8"), ("result", "<i8")])
COMPLETION_SIZE = COMPLETION.itemsize
