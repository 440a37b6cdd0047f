"""What a recording consists of: a header, and entries in the order in which they ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# Kinds of entries. END: the recording was ended as it should. FAILED: it could not be written any more, because of the
# -errno that is the result. Both are the last one, and not among the entries that the reader returns.
WRITE, ZERO, DISCARD, SECURE_ERASE, FLUSH, MARK, END, FAILED = range(1, 9)
KIND_NAMES = {
    WRITE: "write",
    ZERO: "zero",
    DISCARD: "discard",
    SECURE_ERASE: "secure erase",
    FLUSH: "flush",
    MARK: "mark",
}

# Those that change a range of the disk.
CHANGES = (WRITE, ZERO, DISCARD, SECURE_ERASE)

# Flags. FUA: it was stable when it ended. UNMAP: zeros could become holes. UNFINISHED: it had begun, but not ended when
# the recording ended. REPEATED: a process that has ended may have done it before.
FUA, UNMAP, UNFINISHED, REPEATED = 1, 2, 4, 8


@dataclass(frozen=True, slots=True)
class Entry:
    """What the disk's storage was asked for once.

    Times are nanoseconds of CLOCK_MONOTONIC. `index`: its place in the recording. `began`: so many entries were in the
    recording when it began; those between were in flight at the same time. `result`: 0 or -errno. `length`: of the
    range, in bytes. `data`: what was written, or the text of a mark; it is read from the file when it is used.
    """

    kind: int
    index: int
    began: int
    begin_ns: int
    end_ns: int
    offset: int
    length: int
    flags: int
    result: int
    queue: int
    data: memoryview

    @property
    def fua(self) -> bool:
        """Whether it was stable when it ended, if it succeeded."""
        return bool(self.flags & FUA)

    @property
    def may_unmap(self) -> bool:
        """Whether the zeros could become holes."""
        return bool(self.flags & UNMAP)

    @property
    def unfinished(self) -> bool:
        """Whether it had not ended: its range has what was there before, the new data, or a part of it."""
        return bool(self.flags & UNFINISHED)

    @property
    def text(self) -> str:
        """Of a mark."""
        return str(self.data, "utf-8", "replace")

    def pieces(self, most: int) -> Iterator[tuple[int, int]]:
        """The offsets and lengths of parts of its range, of at most so many bytes each."""
        for start in range(0, self.length, most):
            yield self.offset + start, min(most, self.length - start)

    def covers(self, other: Entry) -> bool:
        """Whether the other one, which succeeded, is stable because this is a flush that began later and succeeded."""
        return self.kind == FLUSH and self.result == 0 and other.index < self.began


@dataclass(frozen=True, slots=True)
class Header:
    """What is known when a recording begins."""

    # Bytes.
    size: int
    block_size: int = 512
    physical_block_size: int = 512
    # Whether the disk offers its guest a cache that has to be flushed. A guest without one writes with FUA.
    write_cache: bool = True
    # A write of one block that begins with it is a mark (marks.py); empty: there are no such marks.
    token: str = ""
    # The name of the disk, and its image: a path or an address.
    disk: str = ""
    image: str = ""
    # The beginning: the date in UTC (ISO 8601), and the same moment in nanoseconds of CLOCK_MONOTONIC.
    started: str = ""
    started_ns: int = 0
