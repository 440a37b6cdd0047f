"""A hard disk: seeks, rotation, a queue that it orders, and a write cache that a flush empties.

Requests are served one after the other. Each needs a seek, whose time grows with the square root of the distance, a
part of a revolution, and the time in which its bytes pass under the head. What follows the request before needs neither
seek nor rotation, because the drive reads ahead. With more requests in its queue the drive has shorter ways: the time
for seek and rotation falls with the logarithm of their number, to 3/8 with 32. Writes into the cache end at once, and
are written while no reads wait; a flush, and a write that finds no room, wait for that.
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
    log2,
    parameter,
    policy,
    square_root,
    state,
)

SECOND = 1_000_000_000
HOUR = 3_600_000_000
READS, WRITES = 0, 1


class SpinningDisk(Policy):
    """A hard disk: seeks, rotation, an ordered queue, and a write cache."""

    rpm: int = parameter(7200, "revolutions per minute", 1, 1_000_000)
    mb_per_s: int = parameter(200, "megabytes per second that pass under the head", 1, 100_000)
    track_seek: int = parameter("1ms", "the time of a seek to the next track", 0, HOUR, kind=DURATION)
    full_seek: int = parameter("16ms", "the time of a seek across the whole disk", 0, HOUR, kind=DURATION)
    size: int = parameter(0, "bytes across which such a seek goes; 0: the size of the disk", 0, 1 << 60, kind=SIZE)
    queue: int = parameter(32, "how many requests the drive orders", 1, 32)
    cache: int = parameter("64M", "bytes of the write cache; 0: none", 0, 1 << 32, kind=SIZE)
    cache_time: int = parameter("100us", "the time of a write into the cache", 0, HOUR, kind=DURATION)
    seeks: int = counter("requests that needed a seek")
    # Of reads and of cached writes: where the head is then, and until when the drive works on them, in nanoseconds.
    head: int = state(2)
    busy_until: int = state(2)
    # Bytes in the cache, at some time.
    cached: int = state()
    cached_at: int = state()


@policy(SpinningDisk)
def spinning_disk(io, my):
    if io.operation == READ:
        return delay((end_of_direct(io, my) - io.time) // 1000)
    if io.operation == WRITE:
        return delay((end_of_write(io, my) - io.time) // 1000)
    if io.operation == FLUSH:
        return delay(max(0, my.busy_until[WRITES] - io.time) // 1000)
    return PASS


@compiled
def end_of_direct(io, my):
    begin = max(io.time, my.busy_until[READS])
    end = begin + time_of(io, my, READS, begin, requests_before(my, begin - io.time))
    # The cached writes have to wait.
    if my.busy_until[WRITES] > io.time:
        my.busy_until[WRITES] += end - begin
    my.busy_until[READS] = end
    return end


@compiled
def end_of_write(io, my):
    if io.fua or io.length > my.cache:
        return end_of_direct(io, my)
    update_cache(my, io.time)
    room_at = when_room(io, my)
    begin = max(io.time, my.busy_until[READS], my.busy_until[WRITES])
    my.busy_until[WRITES] = begin + time_of(io, my, WRITES, begin, my.queue)
    my.cached += io.length
    return max(room_at, io.time + my.cache_time * 1000)


@compiled
def time_of(io, my, kind, begin, requests):
    """How long the drive works on a request."""
    time = 0
    if io.offset != my.head[kind]:
        my.seeks += 1
        seek = time_of_seek(io, my, abs(io.offset - my.head[kind]))
        time = ordered(seek + time_of_rotation(io, my, begin + seek), min(requests + 1, my.queue))
    my.head[kind] = io.offset + io.length
    return time + io.length * 1000 // my.mb_per_s


@compiled
def time_of_seek(io, my, distance):
    if distance < bytes_of_track(my):
        return 0
    size = my.size if my.size else io.disk_size
    further = (my.full_seek - my.track_seek) * square_root(min(distance, size)) // square_root(size)
    return (my.track_seek + further) * 1000


@compiled
def time_of_rotation(io, my, now):
    """From the place that is under the head to that of the request."""
    track, revolution = bytes_of_track(my), time_of_revolution(my)
    return (io.offset % track * revolution // track - now) % revolution


@compiled
def time_of_revolution(my):
    return 60 * SECOND // my.rpm


@compiled
def bytes_of_track(my):
    return my.mb_per_s * time_of_revolution(my) // 1000


@compiled
def ordered(time, requests):
    """The time for seek and rotation if the drive can choose among so many requests."""
    return time * 3 * 65536 // (3 * 65536 + log2(requests))


@compiled
def requests_before(my, waiting):
    """About how many requests wait, if each needs half a revolution."""
    return waiting // (time_of_revolution(my) // 2 + 1)


# The cache empties evenly until the drive has written all of it.


@compiled
def update_cache(my, now):
    now = max(now, my.cached_at)
    left = max(0, my.busy_until[WRITES] - now)
    all_left = my.busy_until[WRITES] - my.cached_at
    my.cached = part(my.cached, left, all_left) if left > 0 else 0
    my.cached_at = now


@compiled
def when_room(io, my):
    """When there is room for a write, after `update_cache`."""
    over = my.cached + io.length - my.cache
    return io.time if over <= 0 else io.time + part(my.busy_until[WRITES] - io.time, over, my.cached)


@compiled
def part(number, dividend, divisor):
    """A number below 2^46 times a fraction of at most 1."""
    while dividend >= 1 << 16:
        dividend >>= 1
        divisor >>= 1
    return number * dividend // max(1, divisor)
