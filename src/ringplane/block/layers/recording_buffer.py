"""The ring buffer through which entries of a recording get from the I/O threads to the thread that writes the file.

`head`, `tail` and `wrap` count bytes since the beginning; a place in the ring buffer is the number modulo `room`. Each
entry is in one piece, so what is left at the end of the ring buffer may stay empty: `wrap` is where that begins. Many
I/O threads append. Each reserves the room and the index of its entry with the mutex held, and fills in the entry
without it; the first field, `kind`, is stored last, and is 0 until then. The order in the file is that of the indices.

The writing thread sleeps in two ways (`wake_above`). After it has written it waits for a millisecond, or until half of
the ring buffer is full: so under load the I/O threads need no system call to wake it. If nothing has come meanwhile it
sleeps until the next entry.
"""

from __future__ import annotations

from errno import EINTR

import numpy as np

from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.native.access import (
    address_of,
    copy,
    fence,
    load64,
    load64_acquire,
    store64,
    store64_release,
    view,
)
from ringplane.native.mutex import MUTEX_SIZE, lock, unlock
from ringplane.native.structs import struct
from ringplane.native.syscalls import epoll_wait, monotonic_ns, read, write
from ringplane.recordings.entries import MARK
from ringplane.recordings.recording_format import HEAD_FIELDS, SEAL

HEAD = struct(*HEAD_FIELDS)
HEAD_SIZE = HEAD.itemsize

RECORDING = np.dtype(
    [
        *(
            (name, "<i8")
            for name in (
                "count",  # entries so far
                "head",  # what is reserved
                "tail",  # what is in the file
                "wrap",
                "room",  # a power of two
                "ring",  # its address
                "wake_above",  # the writing thread wants to be woken when so many bytes wait for it
                "closed",  # nothing is appended any more
                "stopping",  # the writing thread ends when all is written
                "wake_fd",  # eventfd that wakes it
                "epoll_fd",  # with which it waits for that
                "epoll_event",  # room for an EPOLL_EVENT
                "number",  # the number 1, for eventfds; and room for one that is read
                "taken",
                "fd",  # the file
                "written",  # bytes in the file
                "last",  # where the last entry is in the file; -1: there is none
                "count_in_file",
                "parts",  # addresses of PART structs
                "part_count",
            )
        ),
        ("mutex", "u1", (MUTEX_SIZE,)),
    ]
)
COUNT, FIRST_HEAD, TAIL, WAKE_ABOVE, CLOSED, STOPPING, NUMBER, TAKEN, MUTEX = (
    RECORDING.fields[name][1]  # type: ignore[index]
    for name in ("count", "head", "tail", "wake_above", "closed", "stopping", "number", "taken", "mutex")
)

# Of an I/O thread: what it needs while its entries wait for room (record.py has the rest).
PART = struct(
    "waiting",  # its I/Os wait for room: write to the eventfd when there is some
    "fd",
    "number",  # that was read from it
    "first = -1",  # IO_LIST: the I/Os, in their order
    "last",
    "recording",  # RECORDING
    "notes",  # NOTE structs, one per slot
    "token",  # address of the text that marks begin with
    "scratch",  # room for a block
)

# `wake_above`: never.
AWAKE = 1 << 62

# Milliseconds.
NAP = 1
# The most that is written with one system call.
LARGEST_WRITE = 1 << 20


# The I/O threads.


@compiled
def reserve(recording, size):
    """The address of a HEAD with its index, and room for so many bytes in all; 0: there is no room now."""
    place = address_of(recording)
    lock(place + MUTEX)
    start = recording.head
    end = (start | (recording.room - 1)) + 1
    if start + size > end:
        start = end
    if start + size - load64_acquire(place + TAIL) > recording.room:
        unlock(place + MUTEX)
        return 0
    if start != recording.head:
        recording.wrap = recording.head
    entry = view(recording.ring + (start & (recording.room - 1)), HEAD)
    entry.index = recording.count
    store64(address_of(entry), 0)
    store64(place + COUNT, recording.count + 1)
    # Release: the thread that writes finds `wrap`, and that the entry is not complete.
    store64_release(place + FIRST_HEAD, start + size)
    unlock(place + MUTEX)
    return address_of(entry)


@compiled
def publish(recording, entry, kind):
    """The entry is complete, but for its kind and seal."""
    entry.seal = (
        SEAL
        ^ kind
        ^ entry.index
        ^ entry.began
        ^ entry.begin_ns
        ^ entry.end_ns
        ^ entry.offset
        ^ entry.length
        ^ entry.flags
        ^ entry.result
        ^ entry.queue
        ^ entry.size
    )
    # Release: whoever finds the kind finds the rest.
    store64_release(address_of(entry), kind)
    # It pairs with that of `sleep`: either the writing thread finds the entry, or this one finds that it sleeps.
    fence()
    place = address_of(recording)
    if load64(place + FIRST_HEAD) - load64(place + TAIL) > load64(place + WAKE_ABOVE):
        store64(place + WAKE_ABOVE, AWAKE)
        write(recording.wake_fd, place + NUMBER, 8)


@unit
def append_mark(address, text, size):
    """A mark of any thread, with this text; 0: there is no room now."""
    recording = view(address, RECORDING)
    if is_closed(recording):
        return 1
    head = reserve(recording, HEAD_SIZE + padded(size))
    if head == 0:
        return 0
    entry = view(head, HEAD)
    entry.began = entry.index
    entry.begin_ns = entry.end_ns = monotonic_ns()
    entry.offset = entry.flags = entry.result = entry.queue = 0
    fill_mark(recording, entry, text, size)
    return 1


@compiled
def fill_mark(recording, entry, text, size):
    """Its text, and what all marks have."""
    entry.length = entry.size = size
    data = address_of(entry) + HEAD_SIZE
    if size:
        # The zeros behind the text.
        store64(data + padded(size) - 8, 0)
    copy(data, text, size)
    publish(recording, entry, MARK)


@compiled
def padded(size):
    """In whole 64-bit words."""
    return (size + 7) // 8 * 8


@compiled
def is_closed(recording):
    return load64(address_of(recording) + CLOSED) != 0


# The writing thread.


@unit
def write_out(address):
    """Write entries until `stopping` is set and all are written; returns 0, or the -errno of what failed."""
    recording = view(address, RECORDING)
    napped = 0
    while True:
        stopping = load64(address + STOPPING)
        end = find_end(recording, recording.tail)
        if end > recording.tail:
            result = write_until(recording, end)
            wake_parts(recording)
            if result < 0:
                return result
            napped = 0
        elif load64_acquire(address + FIRST_HEAD) != recording.tail:
            # Behind the end of the ring buffer, or not complete yet.
            if recording.tail == recording.wrap:
                skip(recording)
            else:
                sleep(recording, recording.room // 2, NAP)
        elif stopping:
            return 0
        else:
            sleep(recording, recording.room // 2 if not napped else 0, NAP if not napped else -1)
            napped = 1


@compiled
def find_end(recording, start):
    """The end of the complete entries from there on that are in one piece."""
    head = load64_acquire(address_of(recording) + FIRST_HEAD)
    end_of_ring = (start | (recording.room - 1)) + 1
    place = start
    while place < head and place < end_of_ring and place != recording.wrap and place - start < LARGEST_WRITE:
        address = recording.ring + (place & (recording.room - 1))
        if load64_acquire(address) == 0:
            return place
        place += HEAD_SIZE + padded(view(address, HEAD).size)
    return place


@compiled
def write_until(recording, end):
    """Write these entries; returns 0 or -errno. Entries of which only a part is in the file do not count."""
    start, written = recording.tail, recording.tail
    while written < end:
        result = write(recording.fd, recording.ring + (written & (recording.room - 1)), end - written)
        if result < 0 and result != -EINTR:
            store64(address_of(recording) + CLOSED, 1)
            count_whole(recording, start, written)
            return result
        written += max(result, 0)
    count_whole(recording, start, end)
    # Release: the room is free when its bytes have been read.
    store64_release(address_of(recording) + TAIL, end)
    return 0


@compiled
def count_whole(recording, start, end):
    """Entries between these places are in the file, but for the last one perhaps."""
    while start < end:
        entry = view(recording.ring + (start & (recording.room - 1)), HEAD)
        size = HEAD_SIZE + padded(entry.size)
        if start + size <= end:
            recording.last = recording.written
            recording.written += size
            recording.count_in_file += 1
        start += size


@compiled
def skip(recording):
    """Continue at the start of the ring buffer."""
    store64_release(address_of(recording) + TAIL, (recording.tail | (recording.room - 1)) + 1)


@compiled
def sleep(recording, above, milliseconds):
    """Sleep for this time (-1: any) or until more than so many bytes wait."""
    place = address_of(recording)
    store64(place + WAKE_ABOVE, above)
    fence()
    if load64(place + FIRST_HEAD) - recording.tail <= above and not load64(place + STOPPING):
        epoll_wait(recording.epoll_fd, recording.epoll_event, 1, milliseconds)
    store64(place + WAKE_ABOVE, AWAKE)
    read(recording.wake_fd, place + TAKEN, 8)


@compiled
def wake_parts(recording):
    """There is room, or none will come: wake the I/O threads that wait for it."""
    # It pairs with that of `record.py`: either that thread finds the room, or this one finds that it waits.
    fence()
    for number in range(recording.part_count):
        part = load64(recording.parts + 8 * number)
        if load64(part):
            store64(part, 0)
            write(view(part, PART).fd, address_of(recording) + NUMBER, 8)
