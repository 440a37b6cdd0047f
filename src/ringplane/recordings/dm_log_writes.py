"""Exports a recording as a log of the kernel's device-mapper target `log-writes`, for replay-log and xfstests.

The format and the order are those of the kernel's drivers/md/dm-log-writes.c. A write is logged when a flush has
succeeded that began after the write had ended, in the order in which the writes ended, and before that flush; one with
FUA at once, when it ends. What no flush covers comes at the end.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from typing import BinaryIO

from ringplane.recordings.entries import DISCARD, FLUSH, MARK, SECURE_ERASE, ZERO, Entry
from ringplane.recordings.reader import Recording
from ringplane.recordings.recording_format import RecordingError

MAGIC, VERSION = 0x6A_7366_7773_6872, 1
LOG_FLUSH, LOG_FUA, LOG_DISCARD, LOG_MARK = 1, 2, 4, 8

# magic, version, number of entries, sector size; and sector, number of sectors, flags, length of a mark
SUPER, ENTRY = struct.Struct("<QQQI"), struct.Struct("<QQQQ")

# The mark with which the kernel ends a log.
END_MARK = b"dm-log-writes-end"

# Zeros become writes of at most so many bytes: replay-log has the data of one in memory.
MOST_ZEROS = 64 << 20


def export(recording: Recording, file: BinaryIO) -> int:
    """Write the log to an empty file; returns how many entries it has no place for: what has failed or not ended.

    Raises RecordingError, OSError.
    """
    log = _Log(file, recording.header.block_size)
    for entry in in_order_of_stability(recording):
        log.add(entry)
    log.add_mark(END_MARK)
    log.end()
    return sum(left_out(entry) for entry in recording)


def left_out(entry: Entry) -> bool:
    """Whether the log has no place for it."""
    return entry.unfinished or entry.result != 0


def in_order_of_stability(recording: Recording) -> Iterator[Entry]:
    """The entries in the kernel's order."""
    return (recording[index] for index in _indices_in_order(recording))


def _indices_in_order(recording: Recording) -> Iterator[int]:
    kinds = recording.column("kind")
    flushes = sorted(
        (recording[index] for index, kind in enumerate(kinds) if kind == FLUSH),
        key=lambda each: (each.began, each.begin_ns),
    )
    begun: dict[int, array[int]] = {}
    next_flush = 0
    # What has ended, and belongs to no flush that has begun.
    waiting = array("q")
    for entry in recording:
        while next_flush < len(flushes) and flushes[next_flush].began <= entry.index:
            begun[flushes[next_flush].index], waiting = waiting, array("q")
            next_flush += 1
        if entry.kind == FLUSH:
            covered = begun.pop(entry.index)
            if left_out(entry):
                # They are as unstable as before.
                waiting = covered + waiting
            else:
                yield from covered
                yield entry.index
        elif left_out(entry):
            continue
        elif entry.fua or entry.kind == MARK:
            yield entry.index
        else:
            waiting.append(entry.index)
    for covered in begun.values():
        yield from covered
    yield from waiting


class _Log:
    """A log that is being written."""

    def __init__(self, file: BinaryIO, sector: int) -> None:
        self._file, self._sector = file, sector
        self._count = 0
        # The super block comes last.
        file.seek(sector)

    def add(self, entry: Entry) -> None:
        """Raises RecordingError for what is not whole sectors."""
        if entry.kind == FLUSH:
            self._entry(0, 0, LOG_FLUSH)
        elif entry.kind == MARK:
            self.add_mark(bytes(entry.data))
        elif entry.offset % self._sector or entry.length % self._sector:
            raise RecordingError(f"entry {entry.index} is not whole sectors of {self._sector} bytes")
        elif entry.kind == ZERO:
            self._add_zeros(entry)
        elif entry.length:
            flags = (LOG_FUA if entry.fua else 0) | (LOG_DISCARD if entry.kind in (DISCARD, SECURE_ERASE) else 0)
            self._entry(entry.offset, entry.length, flags)
            self._file.write(entry.data)

    def _add_zeros(self, entry: Entry) -> None:
        """As writes, whose data are a hole in the file."""
        for offset, size in entry.pieces(MOST_ZEROS):
            self._entry(offset, size, LOG_FUA if entry.fua else 0)
            self._file.seek(size, 1)

    def add_mark(self, text: bytes) -> None:
        """Its text is in the sector of its entry, with a zero at its end."""
        self._entry(0, 0, LOG_MARK, text[: self._sector - ENTRY.size - 1])

    def _entry(self, offset: int, length: int, flags: int, text: bytes = b"") -> None:
        head = ENTRY.pack(offset // self._sector, length // self._sector, flags, len(text))
        self._file.write((head + text).ljust(self._sector, b"\0"))
        self._count += 1

    def end(self) -> None:
        """Write the super block."""
        self._file.seek(0)
        self._file.write(SUPER.pack(MAGIC, VERSION, self._count, self._sector).ljust(self._sector, b"\0"))
