"""Layer `record`: everything that changes the disk is recorded, with its data, when it has ended (docs/recordings.md).

It is the lowest layer, so it records what the storage is given. What has ended is recorded before it goes up, and so
before the driver can reuse its buffers. If there is no room for the entry, the I/O waits until there is some
(recording_buffer.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from errno import EIO
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ringplane.block.events import Event
from ringplane.block.image import ImageError
from ringplane.block.io import (
    BLOCK_IO,
    CHANNEL,
    DISCARD,
    FLUSH,
    FUA,
    READ,
    REPEATED,
    SECURE_ERASE,
    WRITE,
    ZERO,
    io_at,
    put,
)
from ringplane.block.layers.layer import Layer
from ringplane.block.layers.recording_buffer import (
    HEAD,
    HEAD_SIZE,
    PART,
    RECORDING,
    append_mark,
    fill_mark,
    is_closed,
    padded,
    publish,
    reserve,
    write_out,
)
from ringplane.block.ranges import RANGE, RANGE_SIZE
from ringplane.block.stack import CONTINUE, KEEP, LayerPart, call_again, resume
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.native.access import address_of, copy, fence, load8, load64, load64_acquire, store64, view
from ringplane.native.buffers import consume, copy_from, restore
from ringplane.native.structs import new, struct
from ringplane.native.syscalls import monotonic_ns, read
from ringplane.native.uio import IOVEC, IOVEC_SIZE
from ringplane.options.record_options import path_of_recording
from ringplane.recordings import entries
from ringplane.recordings.entries import Header
from ringplane.recordings.marks import LARGEST_MARK, TOKEN_SIZE, new_token
from ringplane.recordings.recording_format import EXISTS

if TYPE_CHECKING:
    from ringplane.block.layers.recording_file import RecordingFile
    from ringplane.block.sources.source import Source
    from ringplane.log.event_bus import Emit
    from ringplane.opener.opener import Opener
    from ringplane.options.disk_config import DiskConfig

# What is noted of each I/O on its way down. `began`: -1 when all of it has been recorded; `done`: how much of it has
# been; `unfinished`: the flag, if it was recorded before it has ended.
NOTE = struct("began = -1", "begin_ns", "done", "unfinished")
NOTE_SIZE = NOTE.itemsize

# A longer write becomes several entries: the ring buffer has room for some of these.
PIECE = 512 << 10

COUNT: int = RECORDING.fields["count"][1]  # type: ignore[index]
KEPT, TAKEN = (PART.fields[name][1] for name in ("first", "number"))  # type: ignore[index]


@unit
def down(layer, channel, io_address):
    part, io = view(layer, PART), view(io_address, BLOCK_IO)
    if is_recorded(io):
        note = note_of(part, io)
        # Acquire: what is counted has ended before this begins.
        note.began = load64_acquire(part.recording + COUNT)
        note.begin_ns = monotonic_ns()
        note.done = note.unfinished = 0
    return CONTINUE


@unit
def up(layer, channel, io_address):
    part, io = view(layer, PART), view(io_address, BLOCK_IO)
    if not is_recorded(io):
        return CONTINUE
    recording = view(part.recording, RECORDING)
    if part.first < 0 and (record_all(part, recording, io) or record_all_or_wait(part, recording, io)):
        note_of(part, io).began = -1
        return CONTINUE
    # Behind those that wait already.
    put(view(channel, CHANNEL), layer + KEPT, io)
    call_again(io)
    return KEEP


@unit
def ready(state, channel):
    """There may be room again: those that waited for it try once more, in their order."""
    part = view(state, PART)
    read(part.fd, state + TAKEN, 8)
    slot, part.first = part.first, -1
    while slot >= 0:
        io = io_at(view(channel, CHANNEL), slot)
        slot = io.next
        resume(view(channel, CHANNEL), io)
    return 0


@unit
def leave(state, channel_address, slots):
    """The recording ends: record what waits for room, then what has not ended; 0: there is no room now."""
    part, channel = view(state, PART), view(channel_address, CHANNEL)
    recording = view(part.recording, RECORDING)
    while part.first >= 0:
        io = io_at(channel, part.first)
        if not record_all(part, recording, io):
            return 0
        note_of(part, io).began = -1
        part.first = io.next
        resume(channel, io)
    for slot in range(slots):
        began = view(part.notes + slot * NOTE_SIZE, NOTE).began
        if began >= 0 and not record_unfinished(part, recording, io_at(channel, slot)):
            return 0
    return 1


@compiled
def record_unfinished(part, recording, io):
    """Storage works on it, and may have transferred a part of it. Whether there was room."""
    note = note_of(part, io)
    note.unfinished = entries.UNFINISHED
    if io.consumed:
        restore(io, io.first_iov, io.consumed)
    recorded = record_all(part, recording, io)
    if io.consumed:
        consume(io, io.consumed)
    if recorded:
        note.began = -1
    return recorded


@compiled
def is_recorded(io):
    return io.operation != READ and io.operation <= SECURE_ERASE


@compiled
def note_of(part, io):
    return view(part.notes + io.slot * NOTE_SIZE, NOTE)


@compiled
def record_all_or_wait(part, recording, io):
    """Try once more, after the writing thread has been asked to say when there is room."""
    store64(address_of(part), 1)
    # It pairs with that of `wake_parts`.
    fence()
    return record_all(part, recording, io)


@compiled
def record_all(part, recording, io):
    """Record the rest of the I/O; whether there was room for all of it, or nothing is recorded any more."""
    note = note_of(part, io)
    if io.operation == WRITE:
        return record_write(part, recording, io, note)
    count = 1 if io.operation == FLUSH else io.range_count
    while note.done < count:
        if is_closed(recording):
            return True
        head = reserve(recording, HEAD_SIZE)
        if head == 0:
            return False
        record_one(recording, io, note, view(head, HEAD))
        note.done += 1
    return True


@compiled
def record_one(recording, io, note, entry):
    """A flush, or the next one of the ranges."""
    entry.size = 0
    fill(io, note, entry)
    if io.operation == FLUSH:
        entry.offset = entry.length = 0
        publish(recording, entry, entries.FLUSH)
        return
    piece = view(io.ranges + note.done * RANGE_SIZE, RANGE)
    entry.offset, entry.length = piece.start, piece.length
    if io.operation == ZERO:
        entry.flags |= entries.UNMAP if piece.unmap else 0
        publish(recording, entry, entries.ZERO)
    else:
        publish(recording, entry, entries.DISCARD if io.operation == DISCARD else entries.SECURE_ERASE)


@compiled
def fill(io, note, entry):
    """What all entries have."""
    entry.began, entry.begin_ns, entry.end_ns = note.began, note.begin_ns, monotonic_ns()
    entry.flags = (entries.FUA if io.flags & FUA else 0) | (entries.REPEATED if io.flags & REPEATED else 0)
    entry.flags |= note.unfinished
    if note.unfinished:
        entry.result = 0
    else:
        # What is not an errno: the storage has become shorter, or an earlier flush has failed.
        entry.result = io.result if -4096 < io.result <= 0 else -EIO
    entry.queue = io.queue


@compiled
def record_write(part, recording, io, note):
    """In pieces. Behind one that has ended, and is a mark, comes the mark."""
    while note.done < io.length:
        if is_closed(recording):
            return True
        size = min(PIECE, io.length - note.done)
        head = reserve(recording, HEAD_SIZE + padded(size))
        if head == 0:
            return False
        entry = view(head, HEAD)
        entry.offset, entry.length, entry.size = io.offset + note.done, size, size
        fill(io, note, entry)
        copy_piece(io.iov, note.done, head + HEAD_SIZE, size)
        publish(recording, entry, entries.WRITE)
        note.done += size
    if note.done == io.length and io.length <= LARGEST_MARK and not note.unfinished and is_mark(part, io):
        return record_mark(part, recording, io, note)
    return True


@compiled
def copy_piece(iov, start, target, size):
    """Copy `size` bytes of the buffers, from `start` on."""
    while size > 0:
        iovec = view(iov, IOVEC)
        if start >= iovec.len:
            start -= iovec.len
        else:
            part = min(size, iovec.len - start)
            copy(target, iovec.base + start, part)
            target += part
            size -= part
            start = 0
        iov += IOVEC_SIZE


@compiled
def is_mark(part, io):
    """Whether it begins with the token."""
    copy_from(io.iov, part.scratch, min(TOKEN_SIZE, io.length))
    place = 0
    while place < TOKEN_SIZE and load64(part.scratch + place) == load64(part.token + place):
        place += 8
    return place == TOKEN_SIZE


@compiled
def record_mark(part, recording, io, note):
    """The text behind the token, up to a zero byte or the end of the line."""
    if is_closed(recording):
        return True
    copy_from(io.iov, part.scratch, io.length)
    end = TOKEN_SIZE
    while end < io.length and load8(part.scratch + end) != 0 and load8(part.scratch + end) != 10:
        end += 1
    size = end - TOKEN_SIZE
    head = reserve(recording, HEAD_SIZE + padded(size))
    if head == 0:
        return False
    entry = view(head, HEAD)
    entry.offset = io.offset
    fill(io, note, entry)
    fill_mark(recording, entry, part.scratch + TOKEN_SIZE, size)
    note.done += 1
    return True


class RecordPart(LayerPart):
    """The part of the layer for one I/O thread."""

    def __init__(self, file: RecordingFile, slots: int) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._notes = new(NOTE, slots)
        self._token = np.frombuffer(file.token.encode(), np.uint8)
        self._scratch = np.zeros(LARGEST_MARK, np.uint8)
        self.record = new(PART)
        self.state = int(self.record.ctypes.data)
        record = self.record[0]
        record["fd"], record["recording"], record["notes"] = self.fd, file.address, self._notes.ctypes.data
        record["token"], record["scratch"] = self._token.ctypes.data, self._scratch.ctypes.data
        self.down, self.up = down.address(), up.address()
        self.events = (Event(self.fd, ready.address(), self.state),)

    def leave(self, channel: int) -> bool:
        return leave(self.state, channel, len(self._notes)) != 0

    @property
    def misses_some(self) -> bool:
        """Whether an I/O that has begun is not recorded."""
        return bool((self._notes["began"] >= 0).any())

    def close(self) -> None:
        """No I/O is in progress. A second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class RecordLayer(Layer):
    """The layer of one disk."""

    units = (down, up, ready, leave, write_out, append_mark)
    below_policies = True
    fixed_size = "a disk that is recorded cannot get another size"

    def __init__(self, file: RecordingFile) -> None:
        self.file = file
        self._parts: list[RecordPart] = []

    def part(self, backing: int, slots: int) -> RecordPart:
        # A confined process loads nothing later.
        for each in self.units:
            each.address()
        part = RecordPart(self.file, slots)
        self._parts.append(part)
        self.file.add_part(part.state)
        return part

    def start_threads(self, emit: Emit) -> None:
        self.file.start(emit)
        self.file.announce()

    def close(self) -> None:
        if any(part.misses_some for part in self._parts):
            # Its I/O thread has failed.
            self.file.give_up(EIO)
        self.file.close()
        _close_all(self._parts)

    def abandon(self) -> None:
        """What the next process does is not in this recording. That process does not wait until it is written."""
        # Until then the thread that writes the file uses them.
        parts, self._parts = self._parts, []
        self.file.leave(partial(_close_all, parts))

    def unlink(self) -> None:
        self.file.unlink()


def _close_all(parts: Sequence[RecordPart]) -> None:
    for part in parts:
        part.close()


def open_layer(config: DiskConfig, source: Source, *, shared: bool, opener: Opener) -> Layer | None:
    return record_to(config.record, config, source, opener) if config.record else None


def record_to(path: Path, config: DiskConfig, source: Source, opener: Opener) -> RecordLayer:
    """The layer that records a disk to a new file, whose path may have fields. Raises ImageError, OpenerEnded."""
    # Few disks need it.
    from ringplane.block.layers.recording_file import RecordingFile

    header = Header(
        size=source.size,
        block_size=config.block_size,
        # As its guest sees it.
        physical_block_size=source.limits().for_blocks(config.block_size, config.physical_block_size).physical_block,
        write_cache=config.features.get("flush", True),
        token=new_token(),
        disk=config.name or "",
        image=source.title,
    )
    return RecordLayer(RecordingFile(path_of_recording(path, header.disk), header, opener))


def check(config: DiskConfig, source: Source) -> type[Layer] | None:
    if config.record is None:
        return None
    path = path_of_recording(config.record, config.name or "")
    if path.exists():
        raise ImageError(EXISTS.format(path))
    return RecordLayer
