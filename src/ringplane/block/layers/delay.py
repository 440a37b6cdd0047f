"""Layer `delay`: reads, writes and flushes take longer, each by a fixed time."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from ringplane.block.io import BLOCK_IO, FLUSH, READ, WRITE
from ringplane.block.layers.layer import Layer
from ringplane.block.stack import CONTINUE, WAIT, LayerPart
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.native.access import view
from ringplane.native.structs import new, struct
from ringplane.native.syscalls import monotonic_ns
from ringplane.options.delay_options import Delay, DelayOptions

if TYPE_CHECKING:
    from ringplane.block.sources.source import Source
    from ringplane.opener.opener import Opener

NS_PER_MS = 1_000_000

# In nanoseconds.
DELAY = struct("read", "write", "flush")


@unit
def down(layer, channel, io_address):
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


class DelayPart(LayerPart):
    """The part of the layer for one I/O thread."""

    def __init__(self, *, read: int = 0, write: int = 0, flush: int = 0) -> None:
        """By how many nanoseconds these take longer."""
        self._record = new(DELAY)
        self._record["read"], self._record["write"], self._record["flush"] = read, write, flush
        self.state = int(self._record.ctypes.data)
        self.down = down.address()


class DelayLayer(Layer):
    """The layer of one disk."""

    units = (down,)

    def __init__(self, delay: Delay) -> None:
        self._delay = delay

    def part(self, backing: int, slots: int) -> DelayPart:
        times = {name: int(time * NS_PER_MS) for name, time in asdict(self._delay).items()}
        return DelayPart(**times)


def open_layer(config: DelayOptions, source: Source, *, shared: bool, opener: Opener) -> Layer | None:
    return DelayLayer(config.delay) if config.delay else None


def check(config: DelayOptions, source: Source) -> type[Layer] | None:
    return DelayLayer if config.delay else None
