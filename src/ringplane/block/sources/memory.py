"""Source `memory`: the image is in memory (tmpfs, hugetlbfs). The I/O thread itself copies the data.

In a large image most of a copy's time is the walk through the page tables. All copies of a turn are prefetched first,
so that their walks run in parallel.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ringplane.block import mapped_image, ranges
from ringplane.block.helper_threads import send_to_helpers
from ringplane.block.image import Image, ImageError
from ringplane.block.io import CHANNEL, FLUSH, WRITE, io_at
from ringplane.block.mapped_image import MAPPED_IMAGE
from ringplane.block.sources.file import FileSource
from ringplane.block.sources.image_source import ImageSource
from ringplane.block.sources.source import Source
from ringplane.block.stack import STACK, SourcePart
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.engines.common import complete
from ringplane.native.access import view

if TYPE_CHECKING:
    from ringplane.block.ranges import Backing
    from ringplane.block.storage_limits import Limits
    from ringplane.engines.choose_engine import Engine

log = logging.getLogger(__name__)

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


class MemorySource(ImageSource):
    """The source of a disk."""

    units = (submit, ranges.apply)
    mapped: mapped_image.MappedImage | None = None

    def __init__(self, image: Image, *, required: bool = True) -> None:
        """Take over the image. `required`: if it cannot be mapped, it is not served with system calls instead."""
        super().__init__(image)
        self._required = required

    def check(self, engines: Sequence[Engine]) -> Limits | None:
        """Huge pages that are reserved for other files are not noticed: the kernel does not show which they are."""
        if mapped_image.has_huge_pages(self._image.fd) and not mapped_image.has_room(self._image.fd, self.size):
            raise self._no_huge_pages(os.strerror(errno.ENOMEM))
        return self.limits_beside()

    def prepare(self, engines: Sequence[Engine]) -> Source:
        """Map the image, or return a FileSource of it."""
        try:
            self.mapped = mapped_image.MappedImage(self._image.fd, self.size, read_only=self.read_only)
        except OSError as error:
            return self._unmapped(error).prepare(engines)
        self.backing.use_mapping(self.mapped.address)
        return self

    def _unmapped(self, error: OSError) -> Source:
        """The source in its place. Raises ImageError unless system calls may serve the image."""
        why = error.strerror or str(error)
        if mapped_image.has_huge_pages(self._image.fd):
            raise self._no_huge_pages(why)
        if self._required:
            raise ImageError(f"{self.title}: cannot be mapped: {why}; --engine auto serves it by system calls")
        log.warning(
            "%s: cannot be mapped: %s; it is served by system calls, which take more CPU per I/O", self.title, why
        )
        return FileSource(self._image)

    def _no_huge_pages(self, why: str) -> ImageError:
        return ImageError(
            f"{self.title}: cannot be mapped: {why}; huge pages are reserved for all of it: "
            "raise sysctl vm.nr_hugepages"
        )

    def part(self, slots: int) -> MemoryPart:
        assert self.mapped
        return MemoryPart(self.mapped, self.backing)

    def how(self, engines: str) -> str:
        return "engine memory"

    def resize(self, size: int) -> None:
        assert self.mapped
        self.mapped.resize(size)

    def close(self) -> None:
        if self.mapped:
            self.mapped.close()
        super().close()
