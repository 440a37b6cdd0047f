"""The memory that a worker allocates once for its requests: a slot for each that can be in flight.

A slot is a REQUEST struct with room for the iovecs and ranges of its request. The system calls of the engine refer to
it, so it never moves, and it lives as long as the worker.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ringplane.block.ranges import RANGE
from ringplane.dataplane.state import MAX_IOVECS, MAX_RANGES, REQUEST
from ringplane.native.uio import IOVEC


class Slots:
    """All slots of a worker, each linked to the next: the list of free slots begins with slot 0."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.requests: npt.NDArray[np.void] = np.zeros(count, REQUEST)
        self.address = int(self.requests.ctypes.data)
        self.requests["slot"] = np.arange(count)
        self.requests["next"] = np.arange(1, count + 1)
        self.requests["next"][-1] = -1
        # A room is not touched, and so without memory, until its first use: the ranges until the first discard, the
        # iovecs of the log until the first migration.
        self._rooms = [
            self._make_room("iovecs", MAX_IOVECS, IOVEC),
            self._make_room("ranges", MAX_RANGES, RANGE),
            self._make_room("log_iovecs", MAX_IOVECS, IOVEC),
        ]

    def _make_room(self, field: str, count: int, kind: np.dtype[np.void]) -> npt.NDArray[np.void]:
        """Give each slot room for `count` structs, whose address is in this field."""
        room = np.zeros((self.count, count), kind)
        self.requests[field] = room.ctypes.data + np.arange(self.count) * room.strides[0]
        return room
