"""Exports a recording as fio's iolog, version 3: what was done when, without the data (fio(1), "Trace file format v3").

Requests are in the order in which they began; times are microseconds since the first one.
"""

from __future__ import annotations

from typing import BinaryIO

from ringplane.recordings.entries import DISCARD, FLUSH, MARK, SECURE_ERASE
from ringplane.recordings.reader import Recording

# fio finds its file by this name, or takes the one of --replay_redirect.
NAME = "disk"

ACTIONS = {FLUSH: "datasync", DISCARD: "trim", SECURE_ERASE: "trim"}


def export(recording: Recording, file: BinaryIO) -> int:
    """Write the log; returns how many entries it has no place for: marks. Raises OSError."""
    entries = sorted(recording, key=lambda entry: (entry.begin_ns, entry.index))
    start = entries[0].begin_ns if entries else 0
    time = 0
    file.write(f"fio version 3 iolog\n0 {NAME} add\n0 {NAME} open\n".encode())
    for entry in entries:
        if entry.kind != MARK:
            time = (entry.begin_ns - start) // 1000
            action = ACTIONS.get(entry.kind, "write")
            file.write(f"{time} {NAME} {action} {entry.offset} {entry.length}\n".encode())
    file.write(f"{time} {NAME} close\n".encode())
    return sum(entry.kind == MARK for entry in entries)
