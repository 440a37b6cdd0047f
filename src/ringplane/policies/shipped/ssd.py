"""A solid-state disk: chips that work side by side, a write buffer, and pauses for garbage collection.

The pages of the disk lie on the chips in turn. A read waits for its chips, and for a program operation that one of them
has begun. A write ends when it is in the buffer; its pages are programmed onto one chip after the other. After some
bytes written a chip erases a block: it does nothing else meanwhile.
"""

from ringplane.policies import (
    DURATION,
    FLUSH,
    PASS,
    READ,
    SIZE,
    WRITE,
    Policy,
    compiled,
    counter,
    delay,
    parameter,
    policy,
    state,
)

MOST_CHIPS = 64
HOUR = 3_600_000_000


class Ssd(Policy):
    """A solid-state disk: chips, a write buffer, pauses for garbage collection."""

    chips: int = parameter(32, "how many chips work side by side", 1, MOST_CHIPS)
    page: int = parameter("16K", "bytes that a chip reads or programs at once", 512, 1 << 20, kind=SIZE)
    read: int = parameter("60us", "the time of reading a page", 0, HOUR, kind=DURATION)
    program: int = parameter("500us", "the time of programming a page", 0, HOUR, kind=DURATION)
    buffer: int = parameter("32M", "bytes of the write buffer", 0, 1 << 40, kind=SIZE)
    buffer_time: int = parameter("15us", "the time of a write into the buffer", 0, HOUR, kind=DURATION)
    mb_per_s: int = parameter(3000, "megabytes per second between disk and host", 1, 1_000_000)
    collect_every: int = parameter("64M", "after so many bytes written a chip collects garbage", 512, kind=SIZE)
    collect: int = parameter("8ms", "the time of that", 0, HOUR, kind=DURATION)
    protected: bool = parameter(False, "the buffer survives a power cut, so a flush has nothing to do")
    collections: int = counter("pauses for garbage collection")
    # Of the chips, in nanoseconds: until when they read or erase, and until when pages are programmed besides.
    busy_until: int = state(MOST_CHIPS)
    programs_until: int = state(MOST_CHIPS)
    bus_until: int = state()
    next_chip: int = state()
    unfilled: int = state()
    written: int = state()


@policy(Ssd)
def ssd(io, my):
    if io.operation == READ:
        return delay((end_of_read(io, my) - io.time) // 1000)
    if io.operation == WRITE:
        return delay((end_of_write(io, my) - io.time) // 1000)
    if io.operation == FLUSH:
        return delay((end_of_flush(io, my) - io.time) // 1000)
    return PASS


@compiled
def end_of_read(io, my):
    """When the read ends."""
    end = io.time
    for page in range(io.offset // my.page, (io.offset + io.length - 1) // my.page + 1):
        end = max(end, read_page(my, page % my.chips, io.time))
    return transfer(io, my, end)


@compiled
def read_page(my, chip, now):
    programming = min(max(0, my.programs_until[chip] - now), my.program * 1000)
    end = max(now + programming, my.busy_until[chip]) + my.read * 1000
    my.busy_until[chip] = end
    return end


@compiled
def transfer(io, my, begin):
    my.bus_until = max(io.time, my.bus_until) + io.length * 1000 // my.mb_per_s
    return max(begin + io.length * 1000 // my.mb_per_s, my.bus_until)


@compiled
def end_of_write(io, my):
    """When the write ends: it is in the buffer, and there was room for it."""
    # How far the chips may lag behind.
    room = my.buffer // (my.page * my.chips) * my.program * 1000
    end = io.time + my.buffer_time * 1000
    # What does not fill a page is programmed with what follows.
    my.unfilled += io.length
    for _ in range(my.unfilled // my.page):
        end = max(end, program_page(my, io.time) - room)
    my.unfilled %= my.page
    collect_garbage(my, io.time, io.length)
    return transfer(io, my, end)


@compiled
def program_page(my, now):
    """Have the next chip program a page; returns when this ends."""
    chip = my.next_chip % my.chips
    my.next_chip = chip + 1
    my.programs_until[chip] = max(now, my.programs_until[chip], my.busy_until[chip]) + my.program * 1000
    return my.programs_until[chip]


@compiled
def collect_garbage(my, now, written):
    my.written += written
    if my.written >= my.collect_every:
        my.written %= my.collect_every
        my.collections += 1
        chip = my.next_chip % my.chips
        my.busy_until[chip] = max(now, my.busy_until[chip]) + my.collect * 1000


@compiled
def end_of_flush(io, my):
    """When all that was written is programmed."""
    end = io.time
    if not my.protected:
        for chip in range(my.chips):
            end = max(end, my.programs_until[chip])
    return end
