"""Source `null`: nothing is read or written. It serves to measure everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringplane.block import ranges
from ringplane.block.io import CHANNEL, WRITE, io_at
from ringplane.block.stack import SourcePart
from ringplane.compiler.units import unit
from ringplane.engines.common import complete
from ringplane.native.access import view

if TYPE_CHECKING:
    from ringplane.block.image import Image


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

    address = ranges = backing = 0

    def __init__(self) -> None:
        self.submit = submit.address()


class NullSource:
    """The source of a disk."""

    through_page_cache = False
    units = (submit,)

    def __init__(self, image: Image) -> None:
        """The image gives the disk its size."""
        self.backing = ranges.Backing(image.fd)

    def part(self) -> NullPart:
        """For one more I/O thread."""
        return NullPart()

    def resize(self, size: int) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
