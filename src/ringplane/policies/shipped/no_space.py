"""A thinly provisioned volume whose pool becomes full: new places cannot be written, those that have data can.

Space is given out in chunks. What the guest discards is free again, unless it discards several ranges at once.
"""

from errno import ENOSPC

from ringplane.policies import DISCARD, PASS, SIZE, WRITE, Policy, compiled, counter, fail, parameter, policy, state

CHUNKS = 1 << 20


class NoSpace(Policy):
    """Writes fail where nothing was written before, once some bytes are in use."""

    space: int = parameter(0, "how many bytes can be in use; what was written before is not counted", 0, kind=SIZE)
    chunk: int = parameter("1M", "bytes that are given out at a time; the first 2^20 are known", 512, kind=SIZE)
    errno: int = parameter(ENOSPC, "the error, a number of errno(3); guests see an I/O error", 1, 4095)
    allocated: int = counter("bytes that were given out")
    freed: int = counter("bytes of them that were discarded")
    failed: int = counter("writes that failed")
    # A bit for each chunk.
    map: int = state(CHUNKS // 64)


@policy(NoSpace)
def no_space(io, my):
    if io.operation == WRITE:
        return write(my, io.offset // my.chunk, (io.offset + io.length - 1) // my.chunk)
    if io.operation == DISCARD and io.ranges == 1:
        # Only what is discarded whole. Of several ranges only the first one is known.
        free(my, -(-io.offset // my.chunk), (io.offset + io.length) // my.chunk)
    return PASS


@compiled
def write(my, first, last):
    needed = 0
    for chunk in range(first, last + 1):
        needed += my.chunk * (1 - is_used(my, chunk))
    if needed > 0 and my.allocated - my.freed + needed > my.space:
        my.failed += 1
        return fail(my.errno)
    for chunk in range(first, min(last + 1, CHUNKS)):
        allocate(my, chunk)
    return PASS


@compiled
def free(my, first, end):
    for chunk in range(first, min(end, CHUNKS)):
        if is_used(my, chunk):
            my.map[chunk // 64] ^= 1 << chunk % 64
            my.freed += my.chunk


@compiled
def allocate(my, chunk):
    if not is_used(my, chunk):
        my.map[chunk // 64] ^= 1 << chunk % 64
        my.allocated += my.chunk


@compiled
def is_used(my, chunk):
    """1 or 0. Chunks beyond those that are known are never used, so writes there need space each time."""
    return my.map[chunk // 64] >> chunk % 64 & 1 if chunk < CHUNKS else 0
