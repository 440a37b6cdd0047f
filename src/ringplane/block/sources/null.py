"""Source `null`: nothing is read or written. It serves to measure everything else."""

from __future__ import annotations

from ringplane.block.io import CHANNEL, WRITE, io_at
from ringplane.block.sources.image_source import ImageSource
from ringplane.block.stack import SourcePart
from ringplane.block.storage_limits import Limits
from ringplane.compiler.units import unit
from ringplane.engines.common import complete
from ringplane.native.access import view


@unit
def submit(stack_address, channel_address, first):
    """End the I/Os of a turn, a list that begins with slot `first`."""
    channel = view(channel_address, CHANNEL)
    slot = first
    while slot >= 0:
        io = io_at(channel, slot)
        slot = io.next
        complete(channel.engine, io.slot, io.length if io.operation <= WRITE else 0)
    return 0


class NullPart(SourcePart):
    """The part of the source for one I/O thread."""

    address = ranges = 0

    def __init__(self, backing: int = 0) -> None:
        """`backing`: the address of the BACKING that a layer may use (ranges.py)."""
        self.submit, self.backing = submit.address(), backing


class NullSource(ImageSource):
    """The source of a disk; an image gives the disk its size."""

    units = (submit,)

    def part(self, slots: int) -> NullPart:
        return NullPart(self.backing.address)

    def limits(self) -> Limits:
        return Limits()

    def how(self, engines: str) -> str:
        return "engine null: nothing is read or written"

    def sync(self) -> None:
        """Nothing."""
