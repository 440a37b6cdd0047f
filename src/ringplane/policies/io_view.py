"""What a policy sees of an I/O, and the functions that it has for it.

A policy gets a POLICY_IO, in whose fields it finds what the request is. The functions find more behind it: SEEN is the
same memory with what a policy must not reach by itself. So they are safe only with what a policy is called with; the
check of policies (compiler/policy_flow.py) rejects anything else.
"""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.native.access import (
    address_of,
    count_leading_zeros,
    view,
    wrapping_add,
    wrapping_mul,
)
from ringplane.native.access import (
    load8 as load_byte,
)
from ringplane.native.access import (
    store8 as store_byte,
)
from ringplane.native.allocation import allocate
from ringplane.native.buffers import copy_from
from ringplane.native.structs import struct
from ringplane.native.uio import IOVEC, IOVEC_SIZE

# Any operation, as the value of a parameter.
ANY = -1

FIELDS = (
    "operation",
    "offset",  # bytes; of a request with several ranges: the first one
    "length",  # bytes, of all ranges
    "queue",
    "time",  # nanoseconds, CLOCK_MONOTONIC
    "sequence",  # how many I/Os this policy has seen before
    "fua",  # 1: what is written has to be stable when it ends
    "result",  # on the way up: 0, or -errno
    "disk_size",  # bytes
    "ranges",  # how many; only operations of ranges can have several
)
POLICY_IO = struct(*FIELDS)

# Bytes of all copies of an I/O thread together: guests decide how large their writes are.
MOST_COPIED = 512 << 20

# data: whether the policy may use the data now; NO_DATA, COPIED (a write: what is changed is a copy) or IN_PLACE (what
# was read).
NO_DATA, COPIED, IN_PLACE = range(3)
SEEN = struct(
    *FIELDS,
    "policy",  # HEADER of the policy that is called
    "data",
    "iov",  # IOVEC structs
    "iov_count",
    "buffer",  # address of the copy of the data; 0: there is none
    "buffer_size",
    "no_memory",  # 1: there is no memory for it
    f"room = {MOST_COPIED}",  # bytes that copies of this I/O thread may take besides those that they take now
)

# Precedes the fields of a policy. `shared`: several I/O threads use it, so `mutex` is held while it is called.
HEADER = struct("entered", "random", *(f"mutex{index}" for index in range(6)))
HEADER_SIZE = HEADER.itemsize
MUTEX: int = HEADER.fields["mutex0"][1]  # type: ignore[index]

# Of copies: what O_DIRECT needs at most.
ALIGNMENT = 4096

# Randomness: SplitMix64.
GAMMA, MIX1, MIX2 = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
ONES_63, POWER_63, SHARE = (1 << 63) - 1, float(1 << 63), 2.0**-63


@compiled
def random(io):
    """A random number from 0 to 2^63 - 1."""
    policy = view(view(address_of(io), SEEN).policy, HEADER)
    policy.random = wrapping_add(policy.random, GAMMA)
    mixed = policy.random
    mixed = wrapping_mul(mixed ^ shifted(mixed, 30), MIX1)
    mixed = wrapping_mul(mixed ^ shifted(mixed, 27), MIX2)
    return (mixed ^ shifted(mixed, 31)) & ONES_63


@compiled
def shifted(number, count):
    """Shifted right by `count` bits, with zeros in front."""
    return number >> count & ((1 << 64 - count) - 1)


@compiled
def chance(io, probability):
    """True with this probability, from 0 to 1. It is asked for, and used up, whatever the probability is."""
    return random(io) < probability * POWER_63


@compiled
def below(io, count):
    """A random whole number from 0 to count - 1."""
    return random(io) % max(int(count), 1)


@compiled
def uniform(io, lowest, highest):
    """A random number between these two, as a float."""
    return lowest + (highest - lowest) * (random(io) * SHARE)


@compiled
def normal(io, mean, deviation):
    """A random number of this mean and standard deviation, as a float; never more than 6 deviations from the mean."""
    total = 0.0
    for _ in range(12):
        total += random(io) * SHARE
    return mean + deviation * (total - 6.0)


# Fractions are multiplied by 2^30; ln(2).
ONE, ONE_SHIFT, LN2 = 1 << 30, 30, 744261118
PART_OF_ONE = 2.0**-30


@compiled
def exponential(io, mean):
    """A random number, exponentially distributed, of this mean, as a float: most are small, few are very large."""
    number = random(io) | 1
    # number = 2^(62 - zeros) * fraction, 1 <= fraction < 2; ln(fraction) = 2 artanh((fraction - 1) / (fraction + 1)).
    zeros = count_leading_zeros(number) - 1
    fraction = number << zeros >> 32
    ratio = ((fraction - ONE) << ONE_SHIFT) // (fraction + ONE)
    square = ratio * ratio >> ONE_SHIFT
    total, power = ratio, ratio
    for index in range(3, 16, 2):
        power = power * square >> ONE_SHIFT
        total += power // index
    return mean * (((zeros + 1) * LN2 - 2 * total) * PART_OF_ONE)


@compiled
def is_a(io, operation):
    """Whether the I/O is this operation; ANY: every one is."""
    return operation == ANY or io.operation == operation


@compiled
def touches(io, first, end):
    """Whether the I/O has bytes from `first` to before `end`. What has no bytes, as a flush, touches only "all".

    Of several ranges only the first one is known; it is taken as long as all of them.
    """
    if io.length == 0:
        return first == 0 and end == ONES_63
    return io.offset < end and first < io.offset + io.length


# Data.


@compiled
def load8(io, position):
    """The byte at this position of the data, from 0; 0 if it is not there."""
    place = find(view(address_of(io), SEEN), io.length, position)
    return load_byte(place) if place else 0


@compiled
def store8(io, position, value):
    """Change this byte of the data: what will be written, or what was read. Elsewhere nothing happens."""
    seen = view(address_of(io), SEEN)
    if seen.data == COPIED and seen.buffer == 0:
        copy_data(seen, seen.iov, io.length)
    place = find(seen, io.length, position) if seen.data == IN_PLACE or seen.buffer else 0
    if place:
        store_byte(place, value)


@compiled
def find(seen, length, position):
    """The address of a byte of the data, or 0."""
    if seen.data == NO_DATA or position < 0 or position >= length:
        return 0
    if seen.buffer:
        return seen.buffer + position
    iov = seen.iov
    for _ in range(seen.iov_count):
        iovec = view(iov, IOVEC)
        if position < iovec.len:
            return iovec.base + position
        position -= iovec.len
        iov += IOVEC_SIZE
    return 0


@compiled
def copy_data(seen, iov, size):
    """Copy the first `size` bytes of a write to memory of its own. If there is none, the I/O fails."""
    room = (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    seen.buffer = allocate(ALIGNMENT, room) if room <= seen.room else 0
    if seen.buffer:
        seen.buffer_size = room
        seen.room -= room
        copy_from(iov, seen.buffer, size)
    else:
        seen.no_memory = 1
