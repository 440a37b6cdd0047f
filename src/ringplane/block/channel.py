"""The channel of an I/O thread: what it needs for its block I/Os (io.py)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ringplane.block.bounce_buffers import BounceBuffers
from ringplane.block.io import BLOCK_IO, CHANNEL
from ringplane.native.structs import new


class Channel:
    """Owns a CHANNEL and its BLOCK_IO structs: `record` is the first, `ios` are the others."""

    def __init__(self, engine: int, slots: int) -> None:
        """`engine` is the address of an ENGINE; `slots`: how many I/Os can be in progress at a time."""
        self.ios: npt.NDArray[np.void] = new(BLOCK_IO, slots)
        self.ios["slot"] = np.arange(slots)
        self._bounce = BounceBuffers()
        self._array = new(CHANNEL)
        self.record = self._array[0]
        self.address = int(self._array.ctypes.data)
        self.record["engine"], self.record["ios"] = engine, self.ios.ctypes.data
        self.record["bounce_free"] = self._bounce.first

    def connect(self, jobs_fd: int, done_fd: int) -> None:
        """Use the helper threads behind these pipes (helper_threads.py)."""
        self.record["jobs_fd"], self.record["done_fd"] = jobs_fd, done_fd
