"""Source `memory`: the image is in memory (tmpfs, hugetlbfs). The I/O thread itself copies the data.

In a large image most of a copy's time is the walk through the page tables. All copies of a turn are prefetched first,
so that their walks run in parallel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringplane.block import mapped_image, ranges
from ringplane.block.helper_threads import send_to_helpers
from ringplane.block.io import CHANNEL, FLUSH, WRITE, io_at
from ringplane.block.mapped_image import MAPPED_IMAGE
from ringplane.block.stack import STACK, SourcePart
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.engines.common import complete
from ringplane.native.access import view

if TYPE_CHECKING:
    from ringplane.block.image import Image
    from ringplane.block.ranges import Backing

LOST_PAGES = (
    "pages of the image were lost (it was truncated, or no memory is left for them); from now on "
    "it is served with system calls, and reads beyond its end fail"
)


@unit
def submit(stack_address, channel_address, first):
    """Do the I/Os of a turn, a list that begins with slot `first`."""
    stack = view(stack_address, STACK)
    channel = view(channel_address, CHANNEL)
    image = view(stack.source, MAPPED_IMAGE)
    slot = first
    while slot >= 0:
        io = io_at(channel, slot)
        if io.operation <= WRITE:
            mapped_image.prefetch_pages(image, io.offset + io.done)
        slot = io.next
    slot = first
    while slot >= 0:
        io = io_at(channel, slot)
        slot = io.next
        do(channel, stack, image, io)
    if image.lost and not image.reported:
        image.reported = 1
        channel.attention = 1
    return 0


@compiled
def do(channel, stack, image, io):
    if io.operation <= WRITE:
        offset, size = io.offset + io.done, io.length - io.done
        result = mapped_image.read_or_write(image, io.operation, io.iov, io.iov_count, offset, size)
        complete(channel.engine, io.slot, result)
    elif io.operation == FLUSH:
        # The data is in memory already, and there is no storage below it.
        complete(channel.engine, io.slot, 0)
    else:
        send_to_helpers(channel, io, stack.ranges, stack.backing)


class MemoryPart(SourcePart):
    """The part of the source for one I/O thread."""

    def __init__(self, mapped: mapped_image.MappedImage, backing: Backing) -> None:
        self._mapped = mapped
        self.address, self.submit = mapped.address, submit.address()
        self.ranges, self.backing = ranges.apply.address(), backing.address

    def warning(self) -> str:
        """Once: pages of the image were lost."""
        return LOST_PAGES if self._mapped.take_loss() else ""


class MemorySource:
    """The source of a disk; the image stays the caller's."""

    through_page_cache = False
    units = (submit, ranges.apply)

    def __init__(self, image: Image) -> None:
        """Raises OSError when the image cannot be mapped."""
        self.mapped = mapped_image.MappedImage(image.fd, image.size, read_only=image.read_only)
        self.backing = ranges.Backing(image.fd, image=self.mapped.address)

    def part(self) -> MemoryPart:
        """For one more I/O thread."""
        return MemoryPart(self.mapped, self.backing)

    def resize(self, size: int) -> None:
        """Prepare for this size of the image; raises OSError."""
        self.mapped.resize(size)

    def sync(self) -> None:
        """fdatasync(2); raises OSError."""
        self.backing.sync()

    def close(self) -> None:
        """Unmap the image; no queue may be running. A second call does nothing."""
        self.mapped.close()
