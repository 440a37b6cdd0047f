"""Writes are acknowledged and forgotten, some or all of them: reads return what was there before."""

from ringplane.policies import (
    DROP,
    FILE,
    PASS,
    RANGE,
    WRITE,
    Policy,
    chance,
    counter,
    is_turn,
    parameter,
    policy,
    touches,
)


class LostWrites(Policy):
    """Writes are acknowledged and forgotten."""

    where: int = parameter("all", "only writes that touch this range", kind=RANGE)
    skip: int = parameter(0, "how many of these pass first", 0)
    every: int = parameter(1, "then one in so many is lost", 1)
    times: int = parameter(0, "how many are lost at most; 0: no limit", 0)
    probability: float = parameter(1.0, "the probability with which each of them is lost", 0.0, 1.0)
    trigger: int = parameter("", "a path: only while this file exists", kind=FILE)
    matched: int = counter("writes of this range")
    lost: int = counter("writes that were lost")


@policy(LostWrites)
def lost_writes(io, my):
    if io.operation != WRITE or not (my.trigger and touches(io, my.where[0], my.where[1])):
        return PASS
    my.matched += 1
    if not (is_turn(my.matched, my.lost, my.skip, my.every, my.times) and chance(io, my.probability)):
        return PASS
    my.lost += 1
    return DROP
