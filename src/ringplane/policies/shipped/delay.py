"""Requests take longer, by a fixed or a random time."""

from ringplane.policies import (
    ANY,
    DISTRIBUTION,
    DURATION,
    FILE,
    FIXED,
    OPERATION,
    PASS,
    RANGE,
    Policy,
    after,
    chance,
    counter,
    is_a,
    is_turn,
    parameter,
    policy,
    random_time,
    touches,
)

HOUR = 3_600_000_000


class Delay(Policy):
    """Requests take longer, by a fixed or a random time."""

    operation: int = parameter(ANY, "which operation", kind=OPERATION)
    where: int = parameter("all", "only requests that touch this range", kind=RANGE)
    skip: int = parameter(0, "how many of these pass first", 0)
    every: int = parameter(1, "then one in so many is delayed", 1)
    times: int = parameter(0, "how many are delayed at most; 0: no limit", 0)
    probability: float = parameter(1.0, "the probability with which each of them is delayed", 0.0, 1.0)
    distribution: int = parameter("fixed", "how the times are distributed", kind=DISTRIBUTION)
    time: int = parameter("1ms", "the time; half of the random times are shorter", 0, HOUR, kind=DURATION)
    p99: int = parameter(0, "one random time in a hundred is longer; 0: twice `time`", 0, HOUR, kind=DURATION)
    longest: int = parameter("30s", "no random time is longer", 0, HOUR, kind=DURATION)
    trigger: int = parameter("", "a path: only while this file exists", kind=FILE)
    matched: int = counter("requests of this operation and range")
    delayed: int = counter("requests that were delayed")
    delays: int = counter("microseconds by which they were delayed")


@policy(Delay)
def delay(io, my):
    if not (my.trigger and is_a(io, my.operation) and touches(io, my.where[0], my.where[1])):
        return PASS
    my.matched += 1
    if not (is_turn(my.matched, my.delayed, my.skip, my.every, my.times) and chance(io, my.probability)):
        return PASS
    p99 = my.p99 if my.p99 else 2 * my.time
    time = random_time(io, my.distribution, my.time, p99)
    if my.distribution != FIXED:
        time = min(time, my.longest)
    my.delayed += 1
    my.delays += time
    return after(time, PASS)
