"""Exports a recording in blktrace's binary format, for blkparse(1), btt(1) and fio (include/uapi/linux/blktrace_api.h).

Each request is queued and issued when it began, and completed when it ended; marks are messages. The data is not in it.
"""

from __future__ import annotations

import heapq
import itertools
import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from ringplane.recordings.entries import DISCARD, FLUSH, MARK, SECURE_ERASE, ZERO, Entry
from ringplane.recordings.reader import Recording

MAGIC, VERSION = 0x6561_7400, 7

# struct blk_io_trace: magic | version, sequence, time, sector, bytes, action, pid, device, cpu, error, pdu_len
TRACE = struct.Struct("<IIQQIIIIIHH")

# Actions, and their categories in the upper half.
QUEUE, ISSUE, COMPLETE = 1, 7, 8
PROCESS, MESSAGE = 0, 2
TC_WRITE, TC_FLUSH, TC_QUEUE, TC_ISSUE, TC_COMPLETE, TC_NOTIFY = 1 << 1, 1 << 2, 1 << 4, 1 << 6, 1 << 7, 1 << 10
TC_DISCARD, TC_FUA = 1 << 13, 1 << 15

# A major number for local use, which no disk has: fio would write to a device of this number.
DEVICE = 120 << 20

# A mark is at most so long (BLK_TN_MAX_MSG).
LONGEST_MESSAGE = 127

SECTOR = 512

# The largest range of one request, which has 32 bits for it; and of zeros, of which fio allocates a buffer.
MOST_BYTES, MOST_ZEROS = 1 << 31, 1 << 20


def export(recording: Recording, file: BinaryIO) -> int:
    """Write the trace; returns how many entries it has no place for: none. Raises OSError."""
    in_order = _in_order(recording)
    first = list(itertools.islice(in_order, 1))
    start = first[0][0] if first else 0
    events = itertools.chain(_names(recording, start), first, in_order)
    for sequence, (time, _, sector, size, action, queue, error, text) in enumerate(events, 1):
        head = (MAGIC | VERSION, sequence, time - start, sector, size, action, queue + 1, DEVICE, 0, error, len(text))
        file.write(TRACE.pack(*head) + text)
    return 0


# time, order of events at the same time, sector, bytes, action, queue, errno, text
Event = tuple[int, int, int, int, int, int, int, bytes]


def _names(recording: Recording, start: int) -> Iterator[Event]:
    """Each queue is a process for these programs."""
    for queue in sorted(set(recording.column("queue"))):
        name = f"queue-{queue}".encode()[:15].ljust(16, b"\0")
        yield start, 0, 0, 0, PROCESS | TC_NOTIFY << 16, queue, 0, name


def _in_order(recording: Recording) -> Iterator[Event]:
    begun = (event for index in recording.ordered_by("begin_ns") for event in _of_beginning(recording[index]))
    ended = (event for index in recording.ordered_by("end_ns") for event in _of_end(recording[index]))
    return heapq.merge(begun, ended)


def _of_beginning(entry: Entry) -> Iterator[Event]:
    if entry.kind != MARK:
        for order, action in enumerate((QUEUE | TC_QUEUE << 16, ISSUE | TC_ISSUE << 16)):
            yield from _of_ranges(entry, entry.begin_ns, order, action, 0)


def _of_end(entry: Entry) -> Iterator[Event]:
    if entry.kind == MARK:
        text = bytes(entry.data[:LONGEST_MESSAGE])
        yield entry.end_ns, 4 * entry.index, 0, 0, MESSAGE | TC_NOTIFY << 16, entry.queue, 0, text
    elif not entry.unfinished:
        yield from _of_ranges(entry, entry.end_ns, 2, COMPLETE | TC_COMPLETE << 16, -entry.result)


def _of_ranges(entry: Entry, time: int, order: int, action: int, error: int) -> Iterator[Event]:
    what = TC_WRITE | (TC_FUA if entry.fua else 0)
    what |= TC_FLUSH if entry.kind == FLUSH else TC_DISCARD if entry.kind in (DISCARD, SECURE_ERASE) else 0
    for offset, size in _ranges(entry):
        yield time, 4 * entry.index + order, offset // SECTOR, size, action | what << 16, entry.queue, error, b""


def _ranges(entry: Entry) -> Iterable[tuple[int, int]]:
    """The ranges of the requests that it becomes."""
    if entry.length <= MOST_ZEROS:
        return ((entry.offset, entry.length),)
    return entry.pieces(MOST_ZEROS if entry.kind == ZERO else MOST_BYTES)
