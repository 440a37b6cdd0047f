"""What all engines share: operations, the part of their structs that the data plane uses, completions and tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from ringplane.compiler.jit import compiled
from ringplane.native.access import view

# The operations of block I/Os (block/io.py). Engines do the first two (`prepare_io`).
READ, WRITE, FLUSH, DISCARD, ZERO, SECURE_ERASE = range(6)
ZONE_APPEND, ZONE_REPORT, ZONE_OPEN, ZONE_CLOSE, ZONE_FINISH, ZONE_RESET, ZONE_RESET_ALL = range(6, 13)

# `wait` reports the token of each watched fd that became readable, at most this many per call.
MAX_TOKENS = 64

# prepare_io, prepare_flush, submit, wait, has_events, collect: addresses of units (see __init__.py), 0 if the engine
# needs none; capacity: the number of slots; prepared: operations queued and not yet accepted by the kernel;
# stuck: the kernel did not accept all of them, so a retry makes sense only after a completion or some time; merges: one
# large I/O with many buffers costs less than several small ones; completed: how many operations have ended and were not
# yet reaped; completions, tokens: addresses of COMPLETION structs, the first `completed` of them filled, and of
# MAX_TOKENS int64.
ENGINE_FIELDS = [
    (name, "<i8")
    for name in (
        "prepare_io",
        "prepare_flush",
        "submit",
        "wait",
        "has_events",
        "collect",
        "capacity",
        "prepared",
        "stuck",
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


class EngineUnavailable(OSError):
    """This engine is unavailable; the message says which system call failed, why, and what to do."""

    def __init__(self, engine: str, call: str, error: OSError, remedies: Mapping[int, str]) -> None:
        """`remedies`: what to do, by errno."""
        why = f"{engine} is unavailable ({call}: {os.strerror(error.errno or 0)})"
        remedy = remedies.get(error.errno or 0)
        super().__init__(error.errno, f"{why}: {remedy}" if remedy else why)

    def __str__(self) -> str:
        return str(self.strerror)


@compiled
def complete(address, slot, result):
    """The operation of `slot` has ended: store its result for `reap` of the engine at `address`."""
    engine = view(address, ENGINE)
    completion = view(engine.completions + engine.completed * COMPLETION_SIZE, COMPLETION)
    completion.slot = slot
    completion.result = result
    engine.completed += 1
