"""Bits of the data are flipped, in what is written or in what is read."""

from ringplane.policies import (
    PASS,
    READ,
    WRITE,
    Policy,
    below,
    chance,
    counter,
    load8,
    one_of,
    parameter,
    policy,
    store8,
)

WHERE = one_of("written", "read")
WRITTEN, WAS_READ = 0, 1


class Corrupt(Policy):
    """A bit of the data flips, on its way to storage or back."""

    where: int = parameter("written", "which data: what is written, or what is read", kind=WHERE)
    probability: float = parameter(1.0, "how many requests have a wrong bit", 0.0, 1.0)
    corrupted: int = counter("requests with a wrong bit")


@policy(Corrupt, data=True)
def corrupt(io, my):
    if io.operation == WRITE and my.where == WRITTEN and chance(io, my.probability):
        my.corrupted += 1
        position = below(io, io.length)
        store8(io, position, load8(io, position) ^ 1 << below(io, 8))
    return PASS


@corrupt.result
def corrupt_result(io, my):
    if io.operation == READ and my.where == WAS_READ and io.result == 0 and chance(io, my.probability):
        my.corrupted += 1
        position = below(io, io.length)
        store8(io, position, load8(io, position) ^ 1 << below(io, 8))
    return PASS
