"""Exports a recording as fio's iolog, version 3: what was done when, without the data (fio(1), "Trace file format v3").

Requests are in the order in which they began. Times are microseconds, and the first request is at 1: fio does not wait
after one at 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from ringplane.recordings.entries import DISCARD, FLUSH, MARK, SECURE_ERASE, ZERO, Entry
from ringplane.recordings.reader import Recording

# fio finds its file by this name, or takes the one of --replay_redirect.
NAME = "disk"

ACTIONS = {FLUSH: "datasync", DISCARD: "trim", SECURE_ERASE: "trim"}

# Zeros become writes of at most so many bytes: fio allocates a buffer of the largest size for each request in flight.
MOST_ZEROS = 1 << 20


def export(recording: Recording, file: BinaryIO) -> int:
    """Write the log; returns how many entries it has no place for: marks. Raises OSError."""
    times, kinds = recording.column("begin_ns"), recording.column("kind")
    order = [index for index in recording.ordered_by("begin_ns") if kinds[index] != MARK]
    time = 1
    file.write(f"fio version 3 iolog\n0 {NAME} add\n0 {NAME} open\n".encode())
    for index in order:
        time = 1 + (times[index] - times[order[0]]) // 1000
        for line in _lines(recording[index]):
            file.write(f"{time} {NAME} {line}\n".encode())
    file.write(f"{time} {NAME} close\n".encode())
    return len(times) - len(order)


def _lines(entry: Entry) -> Iterator[str]:
    if entry.kind == ZERO:
        for offset, size in entry.pieces(MOST_ZEROS):
            yield f"write {offset} {size}"
    else:
        yield f"{ACTIONS.get(entry.kind, 'write')} {entry.offset} {entry.length}"
