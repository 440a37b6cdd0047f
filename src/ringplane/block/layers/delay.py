"""Layer `delay`: reads, writes and flushes take longer, each by a fixed time."""

from __future__ import annotations

from ringplane.block.io import BLOCK_IO, FLUSH, READ, WRITE
from ringplane.block.stack import CONTINUE, WAIT
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.native.access import view
from ringplane.native.structs import new, struct
from ringplane.native.syscalls import monotonic_ns

# In nanoseconds.
DELAY = struct("read", "write", "flush")


@unit
def down(layer, io_address):
    delay, io = view(layer, DELAY), view(io_address, BLOCK_IO)
    time = time_for(delay, io.operation)
    if time == 0:
        return CONTINUE
    io.due = monotonic_ns() + time
    return WAIT


@compiled
def time_for(delay, operation):
    if operation == READ:
        return delay.read
    if operation == WRITE:
        return delay.write
    return delay.flush if operation == FLUSH else 0


class DelayPart:
    """The part of the layer for one I/O thread."""

    up = help = 0

    def __init__(self, *, read: int = 0, write: int = 0, flush: int = 0) -> None:
        """By how many nanoseconds these take longer."""
        self._record = new(DELAY)
        self._record["read"], self._record["write"], self._record["flush"] = read, write, flush
        self.state = int(self._record.ctypes.data)
        self.down = down.address()
