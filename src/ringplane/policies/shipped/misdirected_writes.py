"""Writes are acknowledged, but their data is written at another place of the disk."""

from ringplane.policies import (
    FILE,
    PASS,
    RANGE,
    SIZE,
    WRITE,
    Policy,
    below,
    chance,
    compiled,
    counter,
    is_turn,
    parameter,
    policy,
    redirect,
    touches,
)


class MisdirectedWrites(Policy):
    """Writes are acknowledged, but written at another place."""

    where: int = parameter("all", "only writes that touch this range", kind=RANGE)
    distance: int = parameter(0, "by how many bytes they miss their place; 0: they go to a random one", kind=SIZE)
    unit: int = parameter(4096, "random places are multiples of so many bytes", 512, kind=SIZE)
    skip: int = parameter(0, "how many of these pass first", 0)
    every: int = parameter(1, "then one in so many is misdirected", 1)
    times: int = parameter(0, "how many are misdirected at most; 0: no limit", 0)
    probability: float = parameter(1.0, "the probability with which each of them is misdirected", 0.0, 1.0)
    trigger: int = parameter("", "a path: only while this file exists", kind=FILE)
    matched: int = counter("writes of this range")
    misdirected: int = counter("writes that were misdirected")


@policy(MisdirectedWrites)
def misdirected_writes(io, my):
    if io.operation != WRITE or not (my.trigger and touches(io, my.where[0], my.where[1])):
        return PASS
    my.matched += 1
    if not (is_turn(my.matched, my.misdirected, my.skip, my.every, my.times) and chance(io, my.probability)):
        return PASS
    place = other_place(io, my)
    if place < 0 or place + io.length > io.disk_size:
        return PASS
    my.misdirected += 1
    return redirect(place)


@compiled
def other_place(io, my):
    if my.distance:
        return io.offset + my.distance
    return below(io, (io.disk_size - io.length) // my.unit + 1) * my.unit
