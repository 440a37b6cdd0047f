"""A volume of a cloud: so many I/Os and bytes per second, and more of them as long as there are credits.

The volume works at its burst rate while it has credits, and at its lasting rate when it has none. It earns credits at
the lasting rate, and spends what it works. There are two such accounts, of I/Os and of bytes; the slower one counts.
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

HOUR = 3_600_000_000

IOS, BYTES = 0, 1
# Of the accounts: work and credits are in rates times nanoseconds, thus in billionths of an I/O, thousandths of a byte.
WHOLE_IO, WHOLE_BYTE = 1_000_000_000, 1_000
MB = 1_000_000 * WHOLE_BYTE


class CloudVolume(Policy):
    """A cloud volume: I/Os and bytes per second, and credits for bursts."""

    iops: int = parameter(300, "I/Os per second that last", 1, 10_000_000)
    burst_iops: int = parameter(3000, "I/Os per second while there are credits", 1, 10_000_000)
    io_credits: int = parameter(5_400_000, "credits for I/Os at first, and at most", 0, 1_000_000_000)
    mb_per_s: int = parameter(125, "megabytes per second that last", 1, 100_000)
    burst_mb_per_s: int = parameter(250, "megabytes per second while there are credits", 1, 100_000)
    mb_credits: int = parameter(100_000, "credits for megabytes at first, and at most", 0, 1_000_000_000)
    io_size: int = parameter("256K", "bytes up to which an I/O counts as one", 512, kind=SIZE)
    latency: int = parameter("500us", "the time that each I/O takes besides", 0, HOUR, kind=DURATION)
    without_io_credits: int = counter("I/Os for which there were too few credits for I/Os")
    without_mb_credits: int = counter("I/Os for which there were too few credits for megabytes")
    # The accounts: until when they are busy, and the credits at that time.
    started: int = state()
    busy_until: int = state(2)
    credits: int = state(2)


@policy(CloudVolume)
def cloud_volume(io, my):
    if io.operation == READ or io.operation == WRITE:
        return delay(my.latency + waiting(my, io.time, io.length) // 1000)
    return delay(my.latency) if io.operation == FLUSH else PASS


@compiled
def waiting(my, now, length):
    """The nanoseconds that an I/O has to wait; book it in both accounts."""
    if not my.started:
        my.started = 1
        my.credits[IOS] = my.io_credits * WHOLE_IO
        my.credits[BYTES] = my.mb_credits * MB
        my.busy_until[IOS] = now
        my.busy_until[BYTES] = now
    earn(my, IOS, now, my.iops, my.io_credits * WHOLE_IO)
    earn(my, BYTES, now, my.mb_per_s, my.mb_credits * MB)
    for_ios = spend(my, IOS, -(-length // my.io_size) * WHOLE_IO, my.iops, my.burst_iops)
    for_bytes = spend(my, BYTES, length * WHOLE_BYTE, my.mb_per_s, my.burst_mb_per_s)
    my.without_io_credits += my.credits[IOS] == 0
    my.without_mb_credits += my.credits[BYTES] == 0
    return max(for_ios, for_bytes) - now


@compiled
def earn(my, account, now, rate, most):
    """Add the credits of the time since the account was busy."""
    idle = now - my.busy_until[account]
    if idle > 0:
        credits = my.credits[account]
        my.credits[account] = most if idle > (most - credits) // rate else credits + idle * rate
        my.busy_until[account] = now


@compiled
def spend(my, account, work, rate, burst):
    """Book the work; returns when it begins. What the credits are too few for is done at the lasting rate."""
    begin = my.busy_until[account]
    burst = max(burst, rate)
    time = work // burst
    left = my.credits[account] - (burst - rate) * time
    if left < 0:
        fast = my.credits[account] // (burst - rate)
        time = fast + (work - burst * fast) // rate
    my.credits[account] = max(0, left)
    my.busy_until[account] = begin + time
    return begin
