"""A state as a recording: replayed onto a copy of the base image, it makes the image of that state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from ringplane.crash.crash_states import ALL, State
from ringplane.crash.disk_state import bit_runs
from ringplane.crash.timeline import SECTOR, Timeline, Write
from ringplane.recordings.entries import MARK, Entry
from ringplane.recordings.reader import Recording
from ringplane.recordings.writer import RecordingWriter


def write_failing(file: BinaryIO, recording: Recording, timeline: Timeline, state: State, time: int) -> None:
    """Write what is on the disk in this state, and the marks before the power cut at this time. Raises OSError."""
    writer = RecordingWriter(file, recording.header)
    marks = [mark.index for mark in timeline.marks if mark.index < time]
    for write, kept in there(state):
        while marks and marks[0] < write.index:
            add_mark(writer, recording[marks.pop(0)])
        add_parts(writer, recording[write.index], kept, write.count)
    for index in marks:
        add_mark(writer, recording[index])
    writer.mark(f"power cut after {time} of {timeline.entries} entries")
    writer.end()


def there(state: State) -> Iterator[tuple[Write, int]]:
    """The writes in the order in which they reached the disk, and which of their sectors."""
    cut = state.cut
    for write in sorted(cut.landed[: cut.settled], key=lambda write: write.index):
        yield write, ALL
    for place in state.order or range(len(cut.pending)):
        yield cut.pending[place], state.kept[place]


def add_mark(writer: RecordingWriter, entry: Entry) -> None:
    writer.add(MARK, data=entry.data, begin_ns=entry.begin_ns, end_ns=entry.end_ns)


def add_parts(writer: RecordingWriter, entry: Entry, kept: int, sectors: int) -> None:
    """The kept sectors of a write, as writes of adjacent ones."""
    for start, end in [(0, sectors)] if kept == ALL else bit_runs(kept):
        first, behind = start * SECTOR, end * SECTOR
        writer.add(
            entry.kind,
            data=entry.data[first:behind],
            offset=entry.offset + first,
            length=behind - first,
            begin_ns=entry.begin_ns,
            end_ns=entry.end_ns,
            queue=entry.queue,
        )
