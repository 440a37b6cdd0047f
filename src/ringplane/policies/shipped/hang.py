"""Requests hang until the policy is switched off or removed: then they continue."""

from ringplane.policies import (
    ANY,
    FILE,
    HANG,
    OPERATION,
    PASS,
    RANGE,
    Policy,
    chance,
    counter,
    is_a,
    is_turn,
    parameter,
    policy,
    touches,
)


class Hang(Policy):
    """Requests hang until the policy is switched off or removed."""

    operation: int = parameter(ANY, "which operation", kind=OPERATION)
    where: int = parameter("all", "only requests that touch this range", kind=RANGE)
    skip: int = parameter(0, "how many of these pass first", 0)
    every: int = parameter(1, "then one in so many hangs", 1)
    times: int = parameter(0, "how many hang at most; 0: no limit", 0)
    probability: float = parameter(1.0, "the probability with which each of them hangs", 0.0, 1.0)
    trigger: int = parameter("", "a path: only while this file exists", kind=FILE)
    matched: int = counter("requests of this operation and range")
    hung: int = counter("requests that hung, or do")


@policy(Hang)
def hang(io, my):
    if not (my.trigger and is_a(io, my.operation) and touches(io, my.where[0], my.where[1])):
        return PASS
    my.matched += 1
    if not (is_turn(my.matched, my.hung, my.skip, my.every, my.times) and chance(io, my.probability)):
        return PASS
    my.hung += 1
    return HANG
