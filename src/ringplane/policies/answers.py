"""What a policy answers, as one int64: what happens to the I/O (3 bits), a number for it (40 bits), a time (20 bits).

The time is that of `after`, in microseconds: a mantissa of 15 bits and an exponent of 5, so it is exact to 0.006 %.
"""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.native.access import count_leading_zeros

# What happens. `number`: of DELAYED microseconds, of FAILED an errno, of TORN bytes, of REDIRECTED sectors.
PASSED, DELAYED, FAILED, HUNG, DROPPED, TORN, REDIRECTED = range(7)

KIND_BITS, NUMBER_BITS, MANTISSA_BITS = 3, 40, 15
KIND_MASK, NUMBER_MASK, MANTISSA_MASK = (1 << KIND_BITS) - 1, (1 << NUMBER_BITS) - 1, (1 << MANTISSA_BITS) - 1
TIME_SHIFT = KIND_BITS + NUMBER_BITS

# An hour, in microseconds: no I/O is delayed for longer.
LONGEST_US = 3_600_000_000
MAX_ERRNO = 4095
EIO = 5
SECTOR = 512

# The answers without a number.
PASS, HANG, DROP = PASSED, HUNG, DROPPED


@compiled
def answer_with(kind, number):
    return kind | min(max(number, 0), NUMBER_MASK) << KIND_BITS


@compiled
def fail(errno):
    """The I/O ends with this error, and does not reach storage."""
    number = int(errno)
    return answer_with(FAILED, number if 0 < number <= MAX_ERRNO else EIO)


@compiled
def delay(us):
    """The I/O continues after so many microseconds."""
    time = min(max(int(us), 0), LONGEST_US)
    return answer_with(DELAYED, time) if time else PASS


@compiled
def tear(size):
    """Only the first `size` bytes of a write reach storage, whole logical blocks; it ends as if all had."""
    return answer_with(TORN, int(size))


@compiled
def redirect(offset):
    """A read or write goes to another place of the disk."""
    return answer_with(REDIRECTED, int(offset) // SECTOR)


@compiled
def after(us, answer):
    """This answer, so many microseconds later."""
    if kind_of(answer) == PASSED or kind_of(answer) == DELAYED:
        return delay(int(us) + delay_of(answer))
    time = min(max(int(us), 0) + delay_of(answer), LONGEST_US)
    exponent = max(64 - count_leading_zeros(time) - MANTISSA_BITS, 0)
    coded = exponent << MANTISSA_BITS | time >> exponent
    return answer & ((1 << TIME_SHIFT) - 1) | coded << TIME_SHIFT


@compiled
def valid(answer):
    """This answer; fail(EIO) if a policy returns something else."""
    if answer < 0 or kind_of(answer) > REDIRECTED:
        return fail(EIO)
    # An errno that is not one becomes EIO.
    return answer & ~(NUMBER_MASK << KIND_BITS) | fail(number_of(answer)) if kind_of(answer) == FAILED else answer


@compiled
def kind_of(answer):
    return answer & KIND_MASK


@compiled
def number_of(answer):
    return answer >> KIND_BITS & NUMBER_MASK


@compiled
def delay_of(answer):
    """The time of an answer, in microseconds."""
    if kind_of(answer) == DELAYED:
        return number_of(answer)
    coded = answer >> TIME_SHIFT
    return (coded & MANTISSA_MASK) << (coded >> MANTISSA_BITS)
