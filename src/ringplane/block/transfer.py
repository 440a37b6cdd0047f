"""The transfer step, between the layers and the source: nobody above it ever sees a piece of an I/O.

It begins I/Os at the source, continues after short transfers and EINTR, and lends bounce buffers for O_DIRECT. Its
results come from the engine's completions, where sources without the engine put theirs too.
"""

from __future__ import annotations

from errno import EINTR, EOPNOTSUPP, ETIMEDOUT

from ringplane.block.flush import begin_flush, flush
from ringplane.block.helper_threads import send_to_helpers
from ringplane.block.io import (
    BOUNCE_IOV,
    ENDS_EARLY,
    FLUSH,
    FUA,
    MOVING,
    PIECES,
    READ,
    REFUSED,
    SECURE_ERASE,
    SYNC,
    WAITING,
    WHOLE,
    WRITE,
    io_at,
    put,
)
from ringplane.block.merge import hold
from ringplane.block.ranges import BACKING
from ringplane.block.sources.file import file_of, is_aligned, queue_io
from ringplane.block.stack import STACK, add_to_batch, finish
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import call
from ringplane.native.access import address_of, load64, store64, view
from ringplane.native.buffers import consume, copy_from, copy_to, restore
from ringplane.virtio.blk import VIRTIO_BLK_S_IOERR

BOUNCE_SIZE = 256 * 1024
BOUNCE_ALIGNMENT = 4096


@compiled
def start(channel, stack, io):
    """Begin the I/O at the source. An unknown operation does not reach it."""
    io.done = 0
    if io.operation == READ or io.operation == WRITE:
        io.phase = PIECES
        if stack.merges or (stack.submit == 0 and is_aligned(file_of(io), io.iov, io.iov_count)):
            hold(channel, io)
        else:
            issue(channel, stack, io)
    elif FLUSH <= io.operation <= SECURE_ERASE:
        io.phase = WHOLE
        start_whole(channel, stack, io)
    else:
        finish(channel, io, -EOPNOTSUPP)


@compiled
def start_whole(channel, stack, io):
    """Begin an operation without partial results."""
    if stack.submit:
        add_to_batch(channel, stack, io)
    elif io.operation == FLUSH:
        start_flush(channel, file_of(io), io)
    else:
        send_to_helpers(channel, io, stack.ranges, stack.backing)


@compiled
def start_flush(channel, file, io):
    if view(file.backing, BACKING).flush_failed:
        # It was logged when it happened.
        finish(channel, io, REFUSED - VIRTIO_BLK_S_IOERR)
    else:
        flush(channel, file, io)


@compiled
def issue(channel, stack, io):
    """Have the source read or write the rest of the I/O."""
    if stack.submit:
        add_to_batch(channel, stack, io)
    else:
        issue_to_file(channel, file_of(io), io)


@compiled
def reissue(channel, io):
    issue(channel, view(io.stack, STACK), io)


@compiled
def issue_to_file(channel, file, io):
    """Queue the I/O with the engine, through a bounce buffer if O_DIRECT needs one."""
    iov, iov_count = io.iov, io.iov_count
    io.bounce_iov_len = 0
    if not is_aligned(file, iov, iov_count):
        if io.bounce == 0:
            if channel.bounce_free == 0:
                put(channel, address_of(channel) + WAITING, io)
                return
            take_bounce(channel, io)
        fill_bounce(io)
        iov, iov_count = address_of(io) + BOUNCE_IOV, 1
    queue_io(channel, io, iov, iov_count)


# Sources without the engine get all I/Os of a turn at its end: copies of images in memory can then be prefetched, and
# requests to other machines can be sent together.


@compiled
def submit_batches(channel):
    """Pass the I/Os of this turn to their sources, which take them from the list `batch`."""
    while channel.batches:
        stack = view(channel.batches, STACK)
        channel.batches = stack.next_batch
        first = stack.batch_first
        stack.batch_first = -1
        call(stack.submit, address_of(stack), address_of(channel), first)


# Bounce buffers: aligned memory that an I/O with unaligned buffers borrows until it ends. It transfers up to
# BOUNCE_SIZE at a time and continues as after a short read or write. Free bounce buffers form a list, each holding the
# address of the next; I/Os that find none wait in a first-in first-out list.


@compiled
def take_bounce(channel, io):
    io.bounce = channel.bounce_free
    channel.bounce_free = load64(io.bounce)


@compiled
def give_bounce(channel, io):
    """Return the I/O's bounce buffer, if it has one, and give it to the I/O that has waited longest."""
    if io.bounce == 0:
        return
    store64(io.bounce, channel.bounce_free)
    channel.bounce_free = io.bounce
    # The next I/O in this slot may be of another disk, whose source has no bounce buffers and leaves both as they are.
    io.bounce = io.bounce_iov_len = 0
    if channel.waiting_first >= 0:
        waiter = io_at(channel, channel.waiting_first)
        channel.waiting_first = waiter.next
        issue_to_file(channel, file_of(waiter), waiter)


@compiled
def fill_bounce(io):
    io.bounce_iov_base = io.bounce
    io.bounce_iov_len = min(BOUNCE_SIZE, io.length - io.done)
    if io.operation == WRITE:
        copy_from(io.iov, io.bounce, io.bounce_iov_len)


# Completions: `result` is the number of bytes, for operations without partial results 0, or -errno.


@compiled
def progress_all(channel, io, result):
    """An operation has ended, which can be a larger one that several I/Os were merged into."""
    if io.joined < 0:
        progress(channel, io, result)
        return
    whole = result == io.whole_length
    # Each I/O is retried alone: only those whose own part is bad fail.
    retries = not (whole or is_final(io, result))
    slot = io.slot
    while slot >= 0:
        io = io_at(channel, slot)
        slot = io.joined
        io.joined = -1
        if retries:
            reissue(channel, io)
        else:
            progress(channel, io, io.length if whole else result)


@compiled
def is_final(io, result):
    """Whether each part would have the same result: a server that does not answer takes as long for each."""
    return view(io.stack, STACK).submit and (result == -ETIMEDOUT or result <= REFUSED)


@compiled
def progress(channel, io, result):
    """Continue the I/O if it was short, else finish it."""
    if io.phase == PIECES:
        end_piece(channel, io, result)
    elif io.phase == WHOLE:
        end_whole(channel, io, result)
    elif io.phase == SYNC:
        end_flush(channel, file_of(io), result)
    else:
        # A layer's helper has ended.
        io.result = result
        put(channel, address_of(channel) + MOVING, io)


@compiled
def end_piece(channel, io, result):
    if result == -EINTR:
        reissue(channel, io)
        return
    if result <= 0:
        fail_piece(channel, io, result)
        return
    if io.bounce_iov_len > 0 and io.operation == READ:
        copy_to(io.iov, io.bounce, result)
    io.done += result
    if io.done < io.length:
        drop_front(io, result)
        reissue(channel, io)
    elif needs_flush(io):
        flush(channel, file_of(io), io)
    else:
        end_transfer(channel, io, 0)


@compiled
def needs_flush(io):
    """Whether it changed the disk, must be stable when it ends, and is not yet."""
    return io.flags & FUA and io.operation != READ and not io.dsync and not view(io.stack, STACK).submit


@compiled
def fail_piece(channel, io, result):
    # Other sources leave `dsync` as an earlier I/O in this slot had it, and have no FILE.
    if result == -EOPNOTSUPP and io.dsync and not view(io.stack, STACK).submit:
        # Storage without RWF_DSYNC: from now on a flush follows each write that must be stable.
        file_of(io).dsync = 0
        reissue(channel, io)
        return
    # 0: nothing was transferred, although something was asked for: the image has become shorter.
    end_transfer(channel, io, result if result < 0 else ENDS_EARLY)


@compiled
def end_whole(channel, io, result):
    if result < 0:
        finish(channel, io, result)
        return
    io.done = io.length
    io.dsync = 0
    if io.operation != FLUSH and needs_flush(io):
        flush(channel, file_of(io), io)
    else:
        finish(channel, io, 0)


@compiled
def end_flush(channel, file, result):
    """An fdatasync(2) has ended: finish all I/Os that it was for, and begin one for those that came meanwhile."""
    backing = view(file.backing, BACKING)
    if result < 0:
        backing.flush_failed = 1
    elif backing.flush_failed:
        # Of another I/O thread, meanwhile.
        result = REFUSED - VIRTIO_BLK_S_IOERR
    slot, file.flushing = file.flushing, -1
    while slot >= 0:
        io = io_at(channel, slot)
        slot = io.next
        if result < 0:
            io.done = 0
        end_transfer(channel, io, min(result, 0))
    if file.first >= 0:
        begin_flush(channel, file)


@compiled
def drop_front(io, size):
    """The first `size` bytes of the buffers have been transferred."""
    if io.consumed:
        # From the beginning: then all but one IOVEC are always as they came.
        restore(io, io.first_iov, io.consumed)
    io.first_iov = io.iov
    io.consumed += size
    consume(io, io.consumed)


@compiled
def end_transfer(channel, io, result):
    give_bounce(channel, io)
    if io.consumed:
        # Layers see the buffers as they were, and can submit the I/O again.
        restore(io, io.first_iov, io.consumed)
        io.consumed = 0
    finish(channel, io, result)
