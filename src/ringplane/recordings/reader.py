"""Reads recordings: `open_recording` for all who use them.

A recording whose writer was killed, or whose file system was full, is read up to its last whole entry; `warning` says
so. Nothing in the file is trusted: an entry that does not fit ends the recording.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

from ringplane.recordings.entries import CHANGES, END, FAILED, FLUSH, MARK, WRITE, Entry
from ringplane.recordings.recording_format import (
    HEAD,
    HEAD_FIELDS,
    NUMBER,
    RecordingError,
    is_sealed,
    padded,
    unpack_header,
)

# The largest errno of the kernel.
MAX_ERRNO = 4095

# The queues of a virtio device have numbers of 16 bits.
MOST_QUEUES = 1 << 16


class Recording(Sequence[Entry]):
    """The entries of a recording, in their order, and its `header`. Its file must not become shorter meanwhile."""

    def __init__(self, content: memoryview) -> None:
        """Of the bytes of a file. Raises RecordingError."""
        self._content = content
        self.header, self._end = unpack_header(content)
        # Where the HEAD of each entry is.
        self._heads = array("q")
        # -errno if the recording could not be written any more, 0 if it was ended as it should; None: it just ends.
        self._result: int | None = None
        while self._result is None and self._take_one():
            pass

    def _take_one(self) -> bool:
        """Find the next entry; whether there is one."""
        place = self._end
        if place + HEAD.size > len(self._content):
            return False
        fields = HEAD.unpack_from(self._content, place)
        end = place + HEAD.size + padded(fields[10])
        if not is_sealed(fields) or not self._fits(fields) or end > len(self._content):
            return False
        if fields[0] in (END, FAILED):
            self._result = fields[8]
        else:
            self._heads.append(place)
        self._end = end
        return True

    def _fits(self, fields: tuple[int, ...]) -> bool:
        kind, index, began, begin, end, offset, length, _, result, queue, size, _ = fields
        if not (index == len(self._heads) and 0 <= began <= index and size >= 0 and -MAX_ERRNO <= result <= 0):
            return False
        if min(begin, end) < 0 or not 0 <= queue < MOST_QUEUES:
            return False
        if kind in CHANGES:
            inside = 0 <= offset <= self.header.size and 0 <= length <= self.header.size - offset
            return inside and size == (length if kind == WRITE else 0)
        return kind in (FLUSH, MARK) or kind == (FAILED if result else END)

    @property
    def complete(self) -> bool:
        """Whether it was ended as it should, so that nothing is missing."""
        return self._result == 0

    @property
    def warning(self) -> str:
        """What is missing, in one line; empty: nothing."""
        if self._result is None:
            return f"it was cut off, or is still being recorded; entries that can be read: {len(self)}"
        if self._result:
            return f"it could not be written any more: {os.strerror(-self._result)}; what came later is missing"
        return ""

    def __len__(self) -> int:
        return len(self._heads)

    def __iter__(self) -> Iterator[Entry]:
        return map(self._entry_at, self._heads)

    @overload
    def __getitem__(self, index: int) -> Entry: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Entry]: ...

    def __getitem__(self, index: int | slice) -> Entry | Sequence[Entry]:
        if isinstance(index, slice):
            return [self._entry_at(place) for place in self._heads[index]]
        return self._entry_at(self._heads[index])

    def column(self, field: str) -> array[int]:
        """One field (docs/recordings.md) of all entries, in 8 bytes for each of them."""
        place = NUMBER.size * HEAD_FIELDS.index(field)
        return array("q", (NUMBER.unpack_from(self._content, head + place)[0] for head in self._heads))

    def ordered_by(self, field: str) -> list[int]:
        """The indices of all entries in the order of a field."""
        return sorted(range(len(self)), key=self.column(field).__getitem__)

    def _entry_at(self, place: int) -> Entry:
        kind, index, began, begin, end, offset, length, flags, result, queue, size, _ = HEAD.unpack_from(
            self._content, place
        )
        data = self._content[place + HEAD.size : place + HEAD.size + size]
        return Entry(kind, index, began, begin, end, offset, length, flags, result, queue, data)


def open_recording(path: str | os.PathLike[str]) -> Recording:
    """Read a file. The entries refer to it as long as they exist. Raises RecordingError, OSError."""
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        # An empty file cannot be mapped.
        content = memoryview(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) if size else b"")
    try:
        return Recording(content)
    except RecordingError as error:
        raise RecordingError(f"{path}: {error}") from None
