"""Reads of bad blocks fail until the blocks are written: then the drive has put good ones in their place.

Several of these policies on a disk are several ranges with bad blocks: to add or remove a policy adds or removes them.
"""

from errno import EIO

from ringplane.policies import (
    PASS,
    RANGE,
    READ,
    SIZE,
    WRITE,
    Policy,
    compiled,
    counter,
    fail,
    parameter,
    policy,
    state,
    touches,
)

# Blocks from the beginning of the range on that can heal.
KNOWN = 1 << 20
MASK, MIX = (1 << 32) - 1, 0x45D9F3B


class BadBlocks(Policy):
    """Reads of bad blocks fail until they are written."""

    where: int = parameter("all", "the range of the disk in which bad blocks are", kind=RANGE)
    density: float = parameter(1.0, "which part of the blocks there is bad; which ones follows from the seed", 0.0, 1.0)
    block: int = parameter(4096, "bytes of a block", 512, 1 << 30, kind=SIZE)
    failed: int = counter("reads that failed")
    healed: int = counter("blocks that were written, and are good now")
    # A bit for each block.
    good: int = state(KNOWN // 64)


@policy(BadBlocks)
def bad_blocks(io, my):
    if io.operation == READ and touches(io, my.where[0], my.where[1]) and has_bad_block(io, my):
        my.failed += 1
        return fail(EIO)
    return PASS


@bad_blocks.result
def bad_blocks_written(io, my):
    if io.operation == WRITE and io.result == 0 and touches(io, my.where[0], my.where[1]):
        # Only what is written whole.
        for block in range(-(-io.offset // my.block), (io.offset + io.length) // my.block):
            heal(my, block)
    return PASS


@compiled
def has_bad_block(io, my):
    found = 0
    for block in range(io.offset // my.block, (io.offset + io.length - 1) // my.block + 1):
        found += is_bad(my, block)
    return found > 0


@compiled
def is_bad(my, block):
    """Blocks are numbered from the beginning of the disk."""
    start = block * my.block
    if start + my.block <= my.where[0] or start >= my.where[1] or not was_bad(my, block):
        return False
    index = place_of(my, block)
    return index >= KNOWN or not my.good[index // 64] >> index % 64 & 1


@compiled
def heal(my, block):
    index = place_of(my, block)
    if index < KNOWN and is_bad(my, block):
        my.good[index // 64] |= 1 << index % 64
        my.healed += 1


@compiled
def place_of(my, block):
    return block - my.where[0] // my.block


@compiled
def was_bad(my, block):
    """Whether the block was bad at first: a hash of its number and the seed says so."""
    number = mixed(mixed(block & MASK) + (my.seed & MASK) & MASK)
    return number < my.density * (1 << 32)


@compiled
def mixed(number):
    """Another number below 2^32 that looks random."""
    number = (number ^ number >> 16) * MIX & MASK
    number = (number ^ number >> 16) * MIX & MASK
    return number ^ number >> 16
