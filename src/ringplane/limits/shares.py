"""Fair shares: disks of a group receive what its limit allows in proportion to their weights.

Which thread is first when a bucket is no longer full is luck, and the same thread can be lucky each time. So each disk
has a clock of its own that counts what it has received, divided by its weight (start-time fair queueing). Disks whose
requests wait are compared: one that is more than TOLERANCE ahead of the one that has received the least has to wait
until that one has caught up. Within the tolerance luck does not matter.

A disk that has no request waiting is not compared. When it returns its clock is set forward to that of the group, so
nobody saves up what he has not used. What is not used by some is used by the others: at the latest when SPARE of the
limit was not used, nobody waits for anybody.
"""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.limits.meters import TICKS, fill_in, full_until, push_back
from ringplane.native.access import address_of, compare_and_swap, load64, store64
from ringplane.native.structs import struct

# A disk.
MEMBER = struct(
    "weight = 1",
    "received",  # its clock: ticks of the limit that it has used, divided by its weight; changed by all threads
    "waits_until",  # when this has passed, no request of it waits for the limit
    "throttled",  # nanoseconds in which requests of it waited
    "counted_until",  # nanoseconds, CLOCK_MONOTONIC: what was before this time is in `throttled`
)
RECEIVED, WAITS_UNTIL, THROTTLED, COUNTED_UNTIL = (
    MEMBER.fields[name][1]  # type: ignore[index]
    for name in ("received", "waits_until", "throttled", "counted_until")
)

# The limits of a disk or of a group. Only `clock`, `pause_until` and the meters' levels change.
LIMITS = struct(
    "meters",  # METER structs
    "meter_count",
    "members",  # the addresses of the MEMBER structs
    "member_count",
    "clock",  # what the disk that waits has received that has received the least
    "pause_until",  # nanoseconds: until when queues that have to wait are held at least (dataplane/limit_gate.py)
)
CLOCK: int = LIMITS.fields["clock"][1]  # type: ignore[index]

# In ticks: 2 ms of the limit. A disk within it of the last one need not wait for that.
TOLERANCE = 2_000_000 * TICKS
# Nobody waits for another disk if so much of the limit was not used: that disk is too slow to use its share.
SPARE = 4_000_000 * TICKS
# How long a disk that is ahead waits until it looks again, and for how long a disk whose thread is late still counts as
# one that waits.
SHORTEST_WAIT, LONGEST_WAIT, GRACE = 100_000 * TICKS, 2_000_000 * TICKS, 100_000_000 * TICKS


@compiled
def may_begin_at(limits, member, kind, now):
    """When a request of this kind may begin; up to `now`: at once. 0: nothing limits it."""
    until = full_until(limits.meters, limits.meter_count, kind)
    if until > now or until < now - SPARE or limits.member_count == 1:
        return until
    ahead = find_lead(limits, member, now) - TOLERANCE
    return now if ahead <= 0 else now + min(max(ahead, SHORTEST_WAIT), LONGEST_WAIT)


@compiled
def find_lead(limits, member, now):
    """By how much this disk is ahead of the one that has received the least of those that wait."""
    earliest = load64(address_of(limits) + CLOCK) - TOLERANCE
    own = max(load64(address_of(member) + RECEIVED), earliest)
    least = own
    for index in range(limits.member_count):
        other = load64(limits.members + 8 * index)
        if load64(other + WAITS_UNTIL) > now:
            least = min(least, max(load64(other + RECEIVED), earliest))
    if least > earliest + TOLERANCE:
        store64(address_of(limits) + CLOCK, least)
    return own - least


@compiled
def wait_in_group(member, until):
    """A request of this disk waits; returns until when it counts as one that waits."""
    store64(address_of(member) + WAITS_UNTIL, until + GRACE)
    return until + GRACE


@compiled
def end_wait(member, waited_until):
    """A request begins for which `wait_in_group` returned this time; another one of the disk may wait since then."""
    if load64(address_of(member) + WAITS_UNTIL) == waited_until:
        store64(address_of(member) + WAITS_UNTIL, 0)


@compiled
def count_request(limits, member, kind, size, now):
    """A request has begun."""
    cost = fill_in(limits.meters, limits.meter_count, kind, size, now)
    if limits.member_count > 1:
        earliest = load64(address_of(limits) + CLOCK) - TOLERANCE
        push_back(address_of(member) + RECEIVED, earliest, (cost + member.weight // 2) // member.weight)


@compiled
def count_throttled(member, start, end):
    """Requests of this disk waited from `start` to `end`; several threads may report the same time."""
    place = address_of(member) + COUNTED_UNTIL
    while True:
        counted = load64(place)
        if end <= counted:
            return
        if compare_and_swap(place, counted, end) == counted:
            push_back(address_of(member) + THROTTLED, 0, end - max(start, counted))
            return
