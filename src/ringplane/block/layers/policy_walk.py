"""The policies of a disk, asked one after the other about each I/O, in the loop.

On the way down each policy is asked in order. Times add up, changes of place and data apply in order, and the first one
that fails, hangs, drops or tears the I/O is the last that is asked. On the way up those that want to know the result
are asked in the opposite order: all of them, or those above the one that ended the I/O.

What was changed of an I/O stands in a CHANGE, one for each slot, and is undone when the I/O comes back. So an I/O that
waits or is in storage depends on no policy: the list of policies can be another one when it comes back.
"""

from __future__ import annotations

from errno import EIO, ENOMEM

from ringplane.block.io import BLOCK_IO, CHANNEL, DISCARD, FUA, READ, SECURE_ERASE, WRITE, io_at, put
from ringplane.block.stack import CONTINUE, KEEP, WAIT, resume, turn_round
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import call, unit
from ringplane.native.access import address_of, view
from ringplane.native.allocation import free
from ringplane.native.mutex import lock, unlock
from ringplane.native.structs import struct
from ringplane.native.syscalls import monotonic_ns
from ringplane.native.uio import IOVEC_SIZE
from ringplane.policies.answers import (
    DROPPED,
    FAILED,
    HUNG,
    PASS,
    REDIRECTED,
    SECTOR,
    TORN,
    delay_of,
    kind_of,
    number_of,
    valid,
)
from ringplane.policies.io_view import COPIED, HEADER, HEADER_SIZE, IN_PLACE, MUTEX, NO_DATA, SEEN, copy_data

NS_PER_US = 1000
# Smaller results are not of storage (block/io.py).
LEAST_ERRNO = -4095

# A policy: addresses of its functions (0: it has none, or is off) and of its memory, and what it needs.
ENTRY = struct("down", "up", "memory", "shared", "time", "data")
ENTRY_SIZE = ENTRY.itemsize

# What was changed of the I/O in a slot. changed: 1 if something was; the fields of the I/O before; buffer: the copy of
# its data, or 0, and its size; iov_base, iov_len: an IOVEC that describes it; hung_by: the memory of the policy that
# has it hang.
CHANGE = struct(
    *("changed", "offset", "length", "iov", "iov_count", "iov_room"),
    *("buffer", "buffer_size", "iov_base", "iov_len", "hung_by"),
)
CHANGE_SIZE = CHANGE.itemsize
CHANGE_IOV: int = CHANGE.fields["iov_base"][1]  # type: ignore[index]

# Of one I/O thread.
POLICIES = struct(
    "entries",  # ENTRY structs
    "count",
    "results",  # whether one of them wants results
    "changes",  # CHANGE structs, one per slot
    "seen",  # SEEN
    "size",  # of the disk, in bytes
    "block_mask",  # the logical block size - 1
    "hung_first = -1",  # IO_LIST: those that hang
    "hung_last",
)
HUNG_LIST: int = POLICIES.fields["hung_first"][1]  # type: ignore[index]


@unit
def down(layer, channel_address, io_address):
    policies, io = view(layer, POLICIES), view(io_address, BLOCK_IO)
    seen, change = view(policies.seen, SEEN), change_at(policies, io.slot)
    describe(io, seen)
    wait = 0
    for index in range(policies.count):
        entry = entry_at(policies, index)
        if entry.down:
            answer = ask_about(entry, io, seen)
            if answer != PASS:
                wait += delay_of(answer)
                kind = kind_of(answer)
                if kind == REDIRECTED:
                    move_to(policies, seen, change, io, number_of(answer) * SECTOR)
                elif FAILED <= kind <= TORN:
                    return end_with(policies, channel_address, io, index, answer, wait)
    return continue_with_copy(policies, channel_address, io, policies.count, wait)


@unit
def up(layer, channel_address, io_address):
    policies, io = view(layer, POLICIES), view(io_address, BLOCK_IO)
    change = change_at(policies, io.slot)
    if change.changed:
        undo(policies, change, io)
    if not policies.results:
        return CONTINUE
    describe(io, view(policies.seen, SEEN))
    return pass_result(policies, channel_address, io, policies.count, 0)


@compiled
def entry_at(policies, index):
    return view(policies.entries + index * ENTRY_SIZE, ENTRY)


@compiled
def change_at(policies, slot):
    return view(policies.changes + slot * CHANGE_SIZE, CHANGE)


# Asking.


@compiled
def describe(io, seen):
    """What all policies see of it."""
    seen.operation, seen.offset, seen.length = io.operation, io.offset, io.length
    seen.queue, seen.fua, seen.result = io.queue, io.flags & FUA, 0
    seen.ranges = io.range_count if DISCARD <= io.operation <= SECURE_ERASE else 1
    seen.time = seen.data = seen.buffer = seen.no_memory = 0


@compiled
def ask_about(entry, io, seen):
    """The answer to an I/O on its way down."""
    if entry.data and io.operation == WRITE:
        seen.data, seen.iov, seen.iov_count = COPIED, io.iov, io.iov_count
    answer = ask(entry, entry.down, seen, 1)
    seen.data = NO_DATA
    return answer


@compiled
def ask(entry, function, seen, count):
    """Call a function of a policy: no two threads are in functions of the same policy."""
    if entry.time and seen.time == 0:
        seen.time = monotonic_ns()
    header = view(entry.memory, HEADER)
    if entry.shared:
        lock(entry.memory + MUTEX)
    seen.policy, seen.sequence = entry.memory, header.entered
    header.entered += count
    answer = call(function, entry.memory + HEADER_SIZE, address_of(seen))
    if entry.shared:
        unlock(entry.memory + MUTEX)
    return valid(answer)


# What becomes of the I/O.


@compiled
def continue_with_copy(policies, channel_address, io, index, wait):
    """It goes to storage, with the data that policies have changed; the one at this index is the last of them."""
    if not use_changes(policies, io):
        return end_here(policies, channel_address, io, index, -ENOMEM, wait)
    return continue_after(io, wait)


@compiled
def continue_after(io, wait):
    if wait == 0:
        return CONTINUE
    io.due = monotonic_ns() + wait * NS_PER_US
    return WAIT


@compiled
def end_with(policies, channel_address, io, index, answer, wait):
    """The policy at this index is the last one that is asked."""
    kind = kind_of(answer)
    if kind == FAILED:
        return end_here(policies, channel_address, io, index, -number_of(answer), wait)
    if kind == DROPPED:
        return end_here(policies, channel_address, io, index, 0, wait)
    if kind == TORN:
        return tear_at(policies, channel_address, io, index, number_of(answer) & ~policies.block_mask, wait)
    # Released, it continues with what was changed until now.
    if not use_changes(policies, io):
        return end_here(policies, channel_address, io, index, -ENOMEM, wait)
    return hang(policies, channel_address, io, index)


@compiled
def hang(policies, channel_address, io, index):
    """Keep it until `release`."""
    change_at(policies, io.slot).hung_by = entry_at(policies, index).memory
    put(view(channel_address, CHANNEL), address_of(policies) + HUNG_LIST, io)
    return KEEP


@compiled
def end_here(policies, channel_address, io, index, result, wait):
    """The I/O does not reach storage; the policies above this index see its result."""
    seen, change = view(policies.seen, SEEN), change_at(policies, io.slot)
    if seen.buffer:
        free_buffer(policies, seen.buffer, seen.buffer_size)
        seen.buffer = 0
    if change.changed:
        undo(policies, change, io)
    # All of it was done, as far as the guest learns.
    io.done = io.length if result == 0 else 0
    turn_round(io, result)
    return pass_result(policies, channel_address, io, index, wait)


@compiled
def tear_at(policies, channel_address, io, index, size, wait):
    """Only the first `size` bytes of a write reach storage."""
    if io.operation != WRITE or size >= io.length:
        return continue_with_copy(policies, channel_address, io, index, wait)
    if size == 0:
        return end_here(policies, channel_address, io, index, 0, wait)
    if not use_copy(policies, io, size):
        return end_here(policies, channel_address, io, index, -ENOMEM, wait)
    io.length = size
    return continue_after(io, wait)


@compiled
def move_to(policies, seen, change, io, offset):
    """Let a read or write go to another place; what is not on the disk fails there."""
    if io.operation > WRITE:
        return
    note(change, io)
    last = policies.size - io.length
    io.offset = seen.offset = max(min(offset, last), 0) & ~policies.block_mask


@compiled
def note(change, io):
    """Note what the I/O was, before the first change."""
    if change.changed:
        return
    change.changed = 1
    change.buffer = 0
    change.offset, change.length = io.offset, io.length
    change.iov, change.iov_count, change.iov_room = io.iov, io.iov_count, io.iov_room


@compiled
def use_changes(policies, io):
    """Have the data of a write that was changed come from the copy; False: there was no memory to change it."""
    seen = view(policies.seen, SEEN)
    if seen.buffer or seen.no_memory:
        return use_copy(policies, io, io.length)
    return True


@compiled
def use_copy(policies, io, size):
    """Have the first `size` bytes of a write come from a copy; False: there is no memory for it."""
    seen, change = view(policies.seen, SEEN), change_at(policies, io.slot)
    if seen.buffer == 0 and not seen.no_memory:
        copy_data(seen, io.iov, size)
    if seen.buffer == 0:
        return False
    note(change, io)
    change.buffer, change.buffer_size, seen.buffer = seen.buffer, seen.buffer_size, 0
    change.iov_base, change.iov_len = change.buffer, size
    io.iov, io.iov_count = address_of(change) + CHANGE_IOV, 1
    io.iov_room = io.iov + IOVEC_SIZE
    return True


@compiled
def undo(policies, change, io):
    """The I/O has come back, and is again what it was."""
    io.offset, io.length = change.offset, change.length
    io.iov, io.iov_count, io.iov_room = change.iov, change.iov_count, change.iov_room
    if io.result == 0:
        io.done = io.length
    if change.buffer:
        free_buffer(policies, change.buffer, change.buffer_size)
    change.changed = change.buffer = 0


@compiled
def free_buffer(policies, buffer, size):
    free(buffer)
    view(policies.seen, SEEN).room += size


# Results.


@compiled
def pass_result(policies, channel_address, io, count, wait):
    """Ask the first `count` policies about the result, the last of them first."""
    seen = view(policies.seen, SEEN)
    if policies.results:
        seen.result = io.result if io.result >= LEAST_ERRNO else -EIO
        for index in range(count - 1, -1, -1):
            entry = entry_at(policies, index)
            if entry.up:
                answer = ask_about_result(entry, io, seen)
                kind = kind_of(answer)
                wait += delay_of(answer)
                if kind == HUNG:
                    return hang(policies, channel_address, io, index)
                if kind == FAILED:
                    io.result = seen.result = -number_of(answer)
                elif kind == DROPPED:
                    io.result = seen.result = 0
                    io.done = io.length
    return continue_after(io, wait)


@compiled
def ask_about_result(entry, io, seen):
    if entry.data and io.operation == READ and seen.result == 0:
        seen.data, seen.iov, seen.iov_count = IN_PLACE, io.iov, io.iov_count
    answer = ask(entry, entry.up, seen, 0)
    seen.data = NO_DATA
    return answer


@unit
def forget(layer, channel_address, slot):
    """The I/O in this slot hangs, and is in no list from now on; between two runs of the loop."""
    policies, channel = view(layer, POLICIES), view(channel_address, CHANNEL)
    each = policies.hung_first
    policies.hung_first = -1
    while each >= 0:
        io = io_at(channel, each)
        each = io.next
        if io.slot != slot:
            put(channel, layer + HUNG_LIST, io)
        elif change_at(policies, slot).changed:
            undo(policies, change_at(policies, slot), io)
    return 0


@unit
def release(layer, channel_address, memory):
    """Have the I/Os continue that the policy with this memory lets hang, or all (0); between two runs of the loop."""
    policies, channel = view(layer, POLICIES), view(channel_address, CHANNEL)
    slot = policies.hung_first
    policies.hung_first = -1
    while slot >= 0:
        io = io_at(channel, slot)
        slot = io.next
        if memory == 0 or change_at(policies, io.slot).hung_by == memory:
            resume(channel, io)
        else:
            put(channel, layer + HUNG_LIST, io)
    return 0
