"""Reads and writes of a range fail, some or all of them."""

from errno import EIO

from ringplane.policies import (
    ANY,
    OPERATION,
    PASS,
    RANGE,
    Policy,
    chance,
    counter,
    fail,
    is_a,
    parameter,
    policy,
    touches,
)


class Error(Policy):
    """Requests fail: some operation, some of them, in some range."""

    operation: int = parameter(ANY, "the operation that fails", kind=OPERATION)
    range: int = parameter("all", "the bytes whose requests fail", kind=RANGE)
    probability: float = parameter(1.0, "how many of them fail", 0.0, 1.0)
    errno: int = parameter(EIO, "the error that storage reports", 1, 133)
    failed: int = counter("requests that were failed")


@policy(Error)
def error(io, my):
    if is_a(io, my.operation) and touches(io, my.range[0], my.range[1]) and chance(io, my.probability):
        my.failed += 1
        return fail(my.errno)
    return PASS
