"""Reads return what the first write has stored there, although later writes have succeeded.

The policy remembers the first data of up to 64 sectors that are written while it is there.
"""

from ringplane.policies import (
    PASS,
    RANGE,
    READ,
    WRITE,
    Policy,
    chance,
    compiled,
    counter,
    load8,
    parameter,
    policy,
    state,
    store8,
    touches,
)

SECTOR = 512
REMEMBERED, WORDS = 64, 64


class OldData(Policy):
    """Reads return the first data of sectors that were written again."""

    where: int = parameter("all", "only requests that touch this range", kind=RANGE)
    probability: float = parameter(1.0, "the probability with which a read of them gets old data", 0.0, 1.0)
    sectors: int = counter("sectors of which the first data is known")
    read: int = counter("reads that got old data")
    # For each place: the number of the sector plus 1, whether it was written again, and its first data.
    sector: int = state(REMEMBERED)
    rewritten: int = state(REMEMBERED)
    data: int = state(REMEMBERED * WORDS)


@policy(OldData, data=True)
def old_data(io, my):
    if io.operation == WRITE and touches(io, my.where[0], my.where[1]):
        for place in range(0, io.length, SECTOR):
            remember(io, my, (io.offset + place) // SECTOR, place)
    return PASS


@old_data.result
def return_old_data(io, my):
    if io.operation == READ and io.result == 0 and has_old(io, my) and chance(io, my.probability):
        my.read += 1
        for place in range(0, io.length, SECTOR):
            if is_old(my, (io.offset + place) // SECTOR):
                store_first(io, my, (io.offset + place) // SECTOR % REMEMBERED, place)
    return PASS


@compiled
def remember(io, my, sector, place):
    """Store the data of this sector if it is the first, and note it if it is not."""
    index = sector % REMEMBERED
    if my.sector[index] == sector + 1:
        my.rewritten[index] = 1
    elif my.sector[index] == 0:
        my.sector[index] = sector + 1
        my.sectors += 1
        for word in range(WORDS):
            my.data[index * WORDS + word] = load_word(io, place + 8 * word)


@compiled
def load_word(io, place):
    word = 0
    for number in range(8):
        word |= load8(io, place + number) << 8 * number
    return word


@compiled
def has_old(io, my):
    found = 0
    for place in range(0, io.length, SECTOR):
        found += is_old(my, (io.offset + place) // SECTOR)
    return found > 0


@compiled
def is_old(my, sector):
    return my.sector[sector % REMEMBERED] == sector + 1 and my.rewritten[sector % REMEMBERED] == 1


@compiled
def store_first(io, my, index, place):
    for number in range(SECTOR):
        store8(io, place + number, my.data[index * WORDS + number // 8] >> number % 8 * 8)
