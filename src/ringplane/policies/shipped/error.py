"""Requests fail, some or all of them.

One shot: times=1. The next ten: times=10. Every hundredth: every=100. The fifth only: skip=4,times=1.
"""

from errno import EIO

from ringplane.policies import (
    ANY,
    FILE,
    OPERATION,
    PASS,
    RANGE,
    Policy,
    chance,
    counter,
    fail,
    is_a,
    is_turn,
    parameter,
    policy,
    touches,
)


class Error(Policy):
    """Requests fail, some or all of them."""

    operation: int = parameter(ANY, "which operation", kind=OPERATION)
    where: int = parameter("all", "only requests that touch this range", kind=RANGE)
    skip: int = parameter(0, "how many of these pass first", 0)
    every: int = parameter(1, "then one in so many fails", 1)
    times: int = parameter(0, "how many fail at most; 0: no limit", 0)
    probability: float = parameter(1.0, "the probability with which each of them fails", 0.0, 1.0)
    errno: int = parameter(EIO, "the error, a number of errno(3); guests see an I/O error", 1, 4095)
    trigger: int = parameter("", "a path: only while this file exists", kind=FILE)
    matched: int = counter("requests of this operation and range")
    failed: int = counter("requests that failed")


@policy(Error)
def error(io, my):
    if not (my.trigger and is_a(io, my.operation) and touches(io, my.where[0], my.where[1])):
        return PASS
    my.matched += 1
    if not (is_turn(my.matched, my.failed, my.skip, my.every, my.times) and chance(io, my.probability)):
        return PASS
    my.failed += 1
    return fail(my.errno)
