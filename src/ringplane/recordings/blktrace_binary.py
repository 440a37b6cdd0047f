"""Exports a recording in blktrace's binary format, for blkparse(1), btt(1) and fio (include/uapi/linux/blktrace_api.h).

Each request is queued and issued when it began, and completed when it ended; marks are messages. The data is not in it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

from ringplane.recordings.entries import DISCARD, FLUSH, MARK, SECURE_ERASE, Entry
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

SECTOR, MOST_BYTES = 512, (1 << 32) - 512


def export(recording: Recording, file: BinaryIO) -> int:
    """Write the trace; returns how many entries it has no place for: none. Raises OSError."""
    events = sorted(event for entry in recording for event in _events(entry))
    start = events[0][0] if events else 0
    for sequence, (time, _, sector, size, action, queue, error, text) in enumerate(
        [*_names(recording, start), *events], 1
    ):
        head = (MAGIC | VERSION, sequence, time - start, sector, size, action, queue + 1, DEVICE, 0, error, len(text))
        file.write(TRACE.pack(*head) + text)
    return 0


# time, order of events at the same time, sector, bytes, action, queue, errno, text
Event = tuple[int, int, int, int, int, int, int, bytes]


def _names(recording: Recording, start: int) -> Iterator[Event]:
    """Each queue is a process for these programs."""
    for queue in sorted({entry.queue for entry in recording}):
        name = f"queue-{queue}".encode()[:15].ljust(16, b"\0")
        yield start, 0, 0, 0, PROCESS | TC_NOTIFY << 16, queue, 0, name


def _events(entry: Entry) -> Iterator[Event]:
    if entry.kind == MARK:
        text = bytes(entry.data[:LONGEST_MESSAGE])
        yield entry.end_ns, 4 * entry.index, 0, 0, MESSAGE | TC_NOTIFY << 16, entry.queue, 0, text
        return
    what = TC_WRITE | (TC_FUA if entry.fua else 0)
    what |= TC_FLUSH if entry.kind == FLUSH else TC_DISCARD if entry.kind in (DISCARD, SECURE_ERASE) else 0
    place = entry.offset // SECTOR, min(entry.length, MOST_BYTES)
    for order, (time, action, category) in enumerate(
        ((entry.begin_ns, QUEUE, TC_QUEUE), (entry.begin_ns, ISSUE, TC_ISSUE), (entry.end_ns, COMPLETE, TC_COMPLETE))
    ):
        error = -entry.result if action == COMPLETE else 0
        if not (entry.unfinished and action == COMPLETE):
            yield time, 4 * entry.index + order, *place, action | (category | what) << 16, entry.queue, error, b""
