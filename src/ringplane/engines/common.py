"""What all engines share: operations, the struct that the data plane sees, completions and tokens."""

from __future__ import annotations

import numpy as np

from ringplane.native.access import view
from ringplane.native.jit import compiled

# What a request asks of storage. From FLUSH on it is done whole or not at all; from DISCARD on a helper thread does it
# (engines/ranges.py, engines/zones.py).
READ, WRITE, FLUSH, DISCARD, ZERO, SECURE_ERASE, SYNC_ZONES, RESET_ZONES = range(8)

# Which engine a struct belongs to.
AIO, IO_URING = 0, 1

# How the I/O of a disk is done: through its worker's engine, by engine `memory`, or not at all (engine `null`).
THROUGH_WORKER, IN_MEMORY, NOWHERE = 0, 1, 2

# What `wait` reports beside completions: the token of each watched fd that became readable.
MAX_TOKENS = 64

# kind: one of the above; capacity: how many slots there are; prepared: operations queued and not yet taken by the
# kernel; stuck: the kernel did not take all of them, so that a new attempt makes sense only after a completion or some
# time; submits_in_wait: `wait` submits what is prepared with the system call that it makes anyway; merges: a large I/O
# of many buffers costs less than several small ones; completed: how many operations have ended and were not yet reaped;
# completions, tokens: addresses of COMPLETION structs, the first `completed` of them filled, and of MAX_TOKENS int64.
ENGINE_FIELDS = [
    (name, "<i8")
    for name in (
        "kind",
        "capacity",
        "prepared",
        "stuck",
        "submits_in_wait",
        "merges",
        "completed",
        "completions",
        "tokens",
    )
]
ENGINE = np.dtype(ENGINE_FIELDS)

# result: bytes transferred, or -errno
COMPLETION = np.dtype([("slot", "<i8"), ("result", "<i8")])
COMPLETION_SIZE = COMPLETION.itemsize


@compiled
def complete(address, slot, result):
    """The operation of `slot` has ended: note it for `reap` of the engine at `address`."""
    engine = view(address, ENGINE)
    completion = view(engine.completions + engine.completed * COMPLETION_SIZE, COMPLETION)
    completion.slot = slot
    completion.result = result
    engine.completed += 1
