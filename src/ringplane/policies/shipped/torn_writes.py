"""Of a write only the beginning is written, and all of it is acknowledged.

How many blocks of it are written is random: at least one, and not all. A write of one block is not torn: to lose it is
the policy lost_writes.
"""

from ringplane.policies import (
    FILE,
    PASS,
    RANGE,
    SIZE,
    WRITE,
    Policy,
    below,
    chance,
    counter,
    is_turn,
    parameter,
    policy,
    tear,
    touches,
)


class TornWrites(Policy):
    """Only the beginning of a write is written, and all of it is acknowledged."""

    where: int = parameter("all", "only writes that touch this range", kind=RANGE)
    unit: int = parameter(512, "bytes that are written whole or not at all; no write of them is torn", 512, kind=SIZE)
    skip: int = parameter(0, "how many of these pass first", 0)
    every: int = parameter(1, "then one in so many is torn", 1)
    times: int = parameter(0, "how many are torn at most; 0: no limit", 0)
    probability: float = parameter(1.0, "the probability with which each of them is torn", 0.0, 1.0)
    trigger: int = parameter("", "a path: only while this file exists", kind=FILE)
    matched: int = counter("writes of this range that can be torn")
    torn: int = counter("writes that were torn")


@policy(TornWrites)
def torn_writes(io, my):
    if io.operation != WRITE or io.length <= my.unit or not (my.trigger and touches(io, my.where[0], my.where[1])):
        return PASS
    my.matched += 1
    if not (is_turn(my.matched, my.torn, my.skip, my.every, my.times) and chance(io, my.probability)):
        return PASS
    my.torn += 1
    return tear(my.unit * (1 + below(io, (io.length - 1) // my.unit)))
