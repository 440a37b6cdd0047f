"""Source `file`: a regular file or block device, whose I/O the engine of the I/O thread does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ringplane.block import ranges
from ringplane.block.image import Image, ImageError
from ringplane.block.io import FUA
from ringplane.block.sources.image_source import ImageSource
from ringplane.block.sources.source import Source
from ringplane.block.stack import STACK, SourcePart
from ringplane.compiler.jit import compiled
from ringplane.engines.common import ENGINE, WRITE
from ringplane.engines.dispatch import prepare_io
from ringplane.native.access import view
from ringplane.native.structs import new, struct
from ringplane.native.uio import IOVEC, IOVEC_SIZE

if TYPE_CHECKING:
    from ringplane.block.ranges import Backing
    from ringplane.block.storage_limits import Limits
    from ringplane.engines.choose_engine import Engine

# An open file of the image, used by one I/O thread.
FILE = struct(
    "file",  # what `add_file` of the engine returned
    "backing",  # BACKING (ranges.py), shared by all I/O threads
    "memory_mask",  # must be clear in the address of each buffer, for O_DIRECT; 0 when buffered
    "segment_mask",  # must be clear in the length of each buffer, for O_DIRECT; 0 when buffered
    "dsync",  # writes that must be stable carry RWF_DSYNC; 0: they are followed by a flush
    # The flushes of this open file (flush.py). Slots, or -1.
    "flushing = -1",  # the first of the I/Os that the running fdatasync(2) is for
    "first = -1",  # IO_LIST: wait for the next one
    "last",
)
FLUSHES: int = FILE.fields["first"][1]  # type: ignore[index]


@compiled
def file_of(io):
    return view(view(io.stack, STACK).source, FILE)


@compiled
def is_aligned(file, iov, iov_count):
    """Whether O_DIRECT accepts these buffers."""
    if file.memory_mask == 0 and file.segment_mask == 0:
        return True
    bases, lengths = 0, 0
    for index in range(iov_count):
        iovec = view(iov + index * IOVEC_SIZE, IOVEC)
        bases |= iovec.base
        lengths |= iovec.len
    return bases & file.memory_mask == 0 and lengths & file.segment_mask == 0


@compiled
def queue_io(channel, io, iov, iov_count):
    """Queue a read or write of these buffers, at the place where the rest of the I/O begins, with the engine."""
    file = file_of(io)
    io.dsync = io.flags & FUA and io.operation == WRITE and file.dsync
    engine = view(channel.engine, ENGINE)
    prepare_io(engine, io.slot, io.operation, file.file, iov, iov_count, io.offset + io.done, io.dsync)


class FilePart(SourcePart):
    """The part of the source for one I/O thread."""

    submit = 0

    def __init__(self, fd: int, backing: Backing, alignment: tuple[int, int]) -> None:
        """`alignment`: (memory, segment length) in bytes, (1, 1) through the page cache; the fd stays the caller's."""
        self.fd = fd
        self._record = new(FILE)
        self.address = int(self._record.ctypes.data)
        self.ranges, self.backing = ranges.apply.address(), backing.address
        record = self._record[0]
        record["backing"] = backing.address
        record["memory_mask"], record["segment_mask"] = alignment[0] - 1, alignment[1] - 1
        record["dsync"] = not backing.page_cache

    def attach(self, engine: Engine) -> None:
        """Register the file with the engine, on the I/O thread."""
        self._record["file"] = engine.add_file(self.fd)

    def detach(self, engine: Engine) -> None:
        engine.remove_file(int(self._record["file"][0]))


class FileSource(ImageSource):
    """The source of a disk."""

    units = (ranges.apply,)

    def __init__(self, image: Image) -> None:
        """Take over the image."""
        super().__init__(image, page_cache=not image.direct)
        if image.direct_was_refused:
            self.notice = "its file system refuses O_DIRECT; using the page cache"
        self._alignment = (image.alignment.memory, image.alignment.block)
        self._parts = 0

    def check(self, engines: Sequence[Engine]) -> Limits | None:
        self.prepare(engines)
        return self.limits_beside()

    def prepare(self, engines: Sequence[Engine]) -> Source:
        for engine in engines:
            if engine.without_io:
                raise ImageError(
                    f"{self.title}: no engine for files and devices here, only for images on tmpfs: {engine.without_io}"
                )
        return self

    def part(self, slots: int) -> FilePart:
        """Through the page cache each one has its own open file: lost writes are reported once to each (flush.py)."""
        fd = self._image.fd
        if self._parts and not self.direct and not self.read_only:
            fd = self._image.open_again()
        self._parts += 1
        return FilePart(fd, self.backing, self._alignment)

    def how(self, engines: str) -> str:
        return f"engine {engines}, {'O_DIRECT' if self.direct else 'buffered'}"
