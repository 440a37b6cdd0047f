"""The bounce buffers of an I/O thread: aligned memory for I/Os whose own buffers do not suit O_DIRECT."""

from __future__ import annotations

import numpy as np

from ringplane.block.transfer import BOUNCE_ALIGNMENT, BOUNCE_SIZE

BOUNCE_BUFFERS = 16


class BounceBuffers:
    """A list of free buffers, each of which begins with the address of the next; `first` is the address of the first.

    Without memory until their first use, but for the links.
    """

    def __init__(self, count: int = BOUNCE_BUFFERS) -> None:
        self._memory = np.zeros(count * BOUNCE_SIZE + BOUNCE_ALIGNMENT, np.uint8)
        base = int(self._memory.ctypes.data)
        start = -(-base // BOUNCE_ALIGNMENT) * BOUNCE_ALIGNMENT
        self.first = 0
        for address in range(start, start + count * BOUNCE_SIZE, BOUNCE_SIZE):
            self._memory[address - base :][:8].view(np.int64)[0] = self.first
            self.first = address
