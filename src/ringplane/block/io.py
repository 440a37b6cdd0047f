"""The block I/O: one operation on a disk, whoever asks for it, on its way down to storage and up again.

A ring's request becomes a block I/O, but nothing here knows of rings: the code that begins an I/O fills in the first
fields, passes it to `stack.submit`, and finds it in the list `ended` of its channel when it has ended. Each I/O thread
has a *channel*: its I/Os, and the lists that they are in.

An I/O has one of these operations. `offset` and `length` are in bytes and were checked: they lie within the disk.
- READ, WRITE, ZONE_REPORT: `iov` are `iov_count` IOVEC structs, `length` bytes in all. ZONE_APPEND too: `offset` is the
  start of the zone, and when the I/O has ended, the place where the data is.
- FLUSH: what has ended before is stable when this has ended.
- DISCARD, ZERO, SECURE_ERASE: `ranges` are `range_count` RANGE structs (ranges.py).
- ZONE_OPEN, ZONE_CLOSE, ZONE_FINISH, ZONE_RESET, ZONE_RESET_ALL: `offset` is the start of the zone.
"""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.engines.common import (
    DISCARD,
    FLUSH,
    READ,
    SECURE_ERASE,
    WRITE,
    ZERO,
    ZONE_APPEND,
    ZONE_CLOSE,
    ZONE_FINISH,
    ZONE_OPEN,
    ZONE_REPORT,
    ZONE_RESET,
    ZONE_RESET_ALL,
)
from ringplane.native.access import view
from ringplane.native.structs import struct

# Flags. FUA (force unit access): what is written is stable when the I/O ends. REPEATED: a process that has ended may
# have done it already.
FUA, REPEATED = 1, 2

# Results: 0, or -errno of the storage, or one of the following. ENDS_EARLY: nothing was transferred, because storage
# ends there. Up to REFUSED: the I/O was refused with the virtio status REFUSED - result; storage has not failed.
ENDS_EARLY, REFUSED = -4096, -0x10000

# Phases of the transfer step. PIECES: results are bytes transferred. WHOLE: results are 0 or -errno. SYNC: the first of
# the I/Os that an fdatasync(2) is for. HELPED: a helper thread works for a layer.
PIECES, WHOLE, SYNC, HELPED = range(4)

# Its slot in the channel is its index. What every read and write uses comes first, in few cache lines.
BLOCK_IO = struct(
    "slot",
    "next = -1",  # the slot of the next I/O in the list that it is in; -1 ends the list
    "stack",  # STACK: the disk as this I/O thread sees it (stack.py)
    "operation",
    "flags",
    "offset",
    "length",
    "iov",  # the IOVEC structs that are still to be transferred
    "iov_count",
    "iov_room",  # address of the end of the room that the list can grow into (merge.py)
    "done",  # bytes transferred so far
    "result",
    # The transfer step (transfer.py)
    "phase",
    "dsync",  # its last piece carried RWF_DSYNC
    "joined = -1",  # slot of the I/O that follows in the same merged one, or -1 (merge.py)
    "whole_length",  # bytes, and IOVEC structs, of the merged I/O that begins with this one
    "whole_iov_count",
    "bounce",  # address of the bounce buffer in use, or 0
    "bounce_iov_base",  # one IOVEC that describes it
    "bounce_iov_len",
    "consumed",  # bytes that were dropped from the front of the list of buffers, and where the list began
    "first_iov",
    # Its way through the layers (stack.py)
    "level",  # the number of layers above the place where it is
    "upward",
    "due",  # nanoseconds, CLOCK_MONOTONIC: when it continues after a layer has returned WAIT
    "earlier",  # slot of the one before it in the list of those that wait, or -1
    "queue",  # the number of the queue that it came from, for layers that want to know
    "help",  # address of the compiled function that a helper thread calls for it, and its first argument
    "helped",
    "ranges",
    "range_count",
    "zeros_iov_base",  # one IOVEC for zeros that are written
    "zeros_iov_len",
)
BLOCK_IO_SIZE = BLOCK_IO.itemsize
BOUNCE_IOV: int = BLOCK_IO.fields["bounce_iov_base"][1]  # type: ignore[index]
ZEROS_IOV: int = BLOCK_IO.fields["zeros_iov_base"][1]  # type: ignore[index]

# A list of I/Os, first in first out.
IO_LIST = struct("first = -1", "last")

CHANNEL = struct(
    "engine",  # ENGINE
    "ios",  # BLOCK_IO structs
    "now",  # nanoseconds, CLOCK_MONOTONIC, of the present turn of the loop
    "ended_first = -1",  # IO_LIST: have ended, to be taken by those who have begun them
    "ended_last",
    "moving_first = -1",  # IO_LIST: to be passed through layers
    "moving_last",
    "due_first = -1",  # those that wait for their time (route.py); the earliest one is the first
    "due_last = -1",
    "held = -1",  # first I/O of a merged one that is held back so that adjacent ones may join; -1: none (merge.py)
    "held_last",  # last I/O of it
    "batches",  # list of STACK structs whose sources get the I/Os of this turn at its end; 0: none
    "waiting_first = -1",  # IO_LIST: wait for a bounce buffer
    "waiting_last",
    "bounce_free",  # list of free bounce buffers, each holding the address of the next; 0: none
    "attention",  # not 0: Python has something to do
    "pause",  # nanoseconds to sleep whatever happens, so that replies come together (sources/moderation.py)
    "jobs_fd",  # the pipes to and from the helper threads (helper_threads.py)
    "done_fd",
    "helper_slot",  # room for a COMPLETION from a helper
    "helper_result",
)
ENDED: int = CHANNEL.fields["ended_first"][1]  # type: ignore[index]
MOVING: int = CHANNEL.fields["moving_first"][1]  # type: ignore[index]
WAITING: int = CHANNEL.fields["waiting_first"][1]  # type: ignore[index]
HELPER_MESSAGE: int = CHANNEL.fields["helper_slot"][1]  # type: ignore[index]

__all__ = [
    "DISCARD",
    "FLUSH",
    "READ",
    "SECURE_ERASE",
    "WRITE",
    "ZERO",
    "ZONE_APPEND",
    "ZONE_CLOSE",
    "ZONE_FINISH",
    "ZONE_OPEN",
    "ZONE_REPORT",
    "ZONE_RESET",
    "ZONE_RESET_ALL",
]


@compiled
def io_at(channel, slot):
    return view(channel.ios + slot * BLOCK_IO_SIZE, BLOCK_IO)


@compiled
def bytes_left(io):
    """How many bytes the source has to transfer: those of a merged I/O, or the rest of this one."""
    return io.whole_length if io.joined >= 0 else io.length - io.done


@compiled
def iovecs_left(io):
    """The number of their IOVEC structs at `iov`."""
    return io.whole_iov_count if io.joined >= 0 else io.iov_count


@compiled
def put(channel, address, io):
    """Append the I/O to the IO_LIST at `address`; it is in no other list."""
    some = view(address, IO_LIST)
    io.next = -1
    if some.first < 0:
        some.first = io.slot
    else:
        io_at(channel, some.last).next = io.slot
    some.last = io.slot
