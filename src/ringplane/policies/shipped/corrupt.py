"""Data is changed: of a write on its way to storage, so that it stays wrong, or of a read on its way to the guest.

Old data in place of new is what the policy old_data returns.
"""

from ringplane.policies import (
    ANY,
    FILE,
    OPERATION,
    PASS,
    RANGE,
    READ,
    WRITE,
    Policy,
    below,
    chance,
    compiled,
    counter,
    is_a,
    is_turn,
    load8,
    one_of,
    parameter,
    policy,
    store8,
    touches,
)

BITS, ZEROS, STUCK = range(3)
SECTOR = 512


class Corrupt(Policy):
    """The data of reads, writes or both is changed."""

    operation: int = parameter(ANY, "which operation; read and write have data", kind=OPERATION)
    where: int = parameter("all", "only data of this range", kind=RANGE)
    kind: int = parameter("bits", "what becomes of the data", kind=one_of("bits", "zeros", "stuck"))
    bits: int = parameter(1, "bits: how many are flipped in each request", 1, 4096)
    bit: int = parameter(0, "stuck: which bit of each sector is always the same", 0, 8 * SECTOR - 1)
    stuck_at: int = parameter(1, "stuck: its value", 0, 1)
    skip: int = parameter(0, "how many of the requests pass first", 0)
    every: int = parameter(1, "then one in so many is corrupted", 1)
    times: int = parameter(0, "how many are corrupted at most; 0: no limit", 0)
    probability: float = parameter(1.0, "the probability with which each of them is corrupted", 0.0, 1.0)
    trigger: int = parameter("", "a path: only while this file exists", kind=FILE)
    matched: int = counter("requests of this operation and range")
    corrupted: int = counter("requests that were corrupted")


@policy(Corrupt, data=True)
def corrupt(io, my):
    if io.operation == WRITE:
        corrupt_some(io, my)
    return PASS


@corrupt.result
def corrupt_what_was_read(io, my):
    if io.operation == READ and io.result == 0:
        corrupt_some(io, my)
    return PASS


@compiled
def corrupt_some(io, my):
    if my.trigger and is_a(io, my.operation) and touches(io, my.where[0], my.where[1]):
        my.matched += 1
        if is_turn(my.matched, my.corrupted, my.skip, my.every, my.times) and chance(io, my.probability):
            my.corrupted += 1
            damage(io, my, max(0, my.where[0] - io.offset), min(io.length, my.where[1] - io.offset))


@compiled
def damage(io, my, first, end):
    """Change something from byte `first` of the data to before `end`."""
    if my.kind == BITS:
        flip_bits(io, my.bits, first, end)
    elif my.kind == ZEROS:
        clear_sector(io, first, end)
    else:
        set_stuck_bit(io, my, first, end)


@compiled
def flip_bits(io, count, first, end):
    for _ in range(count):
        place = first + below(io, end - first)
        store8(io, place, load8(io, place) ^ 1 << below(io, 8))


@compiled
def clear_sector(io, first, end):
    start = first + below(io, (end - first + SECTOR - 1) // SECTOR) * SECTOR
    for place in range(start, min(start + SECTOR, end)):
        store8(io, place, 0)


@compiled
def set_stuck_bit(io, my, first, end):
    mask = 1 << my.bit % 8
    for place in range(my.bit // 8, end, SECTOR):
        if place >= first:
            store8(io, place, load8(io, place) | mask if my.stuck_at else load8(io, place) & ~mask)
