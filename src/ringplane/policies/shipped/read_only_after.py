"""After some failed requests the disk accepts no more writes, as drives do that have no spare blocks left.

It sees the failures of storage, and those that policies behind it in the list cause.
"""

from errno import EIO

from ringplane.policies import DISCARD, PASS, SECURE_ERASE, WRITE, Policy, compiled, counter, fail, parameter, policy


class ReadOnlyAfter(Policy):
    """After some failed requests the disk accepts no more writes."""

    errors: int = parameter(1, "after so many failed requests writes fail; 0: at once", 0)
    errno: int = parameter(EIO, "the error, a number of errno(3); guests see an I/O error", 1, 4095)
    failures: int = counter("requests that failed, without those that the policy rejected")
    rejected: int = counter("writes that the policy rejected")


@policy(ReadOnlyAfter)
def read_only_after(io, my):
    if my.failures < my.errors or not changes_data(io.operation):
        return PASS
    my.rejected += 1
    return fail(my.errno)


@read_only_after.result
def count_failures(io, my):
    if io.result < 0 and not (my.failures >= my.errors and changes_data(io.operation)):
        my.failures += 1
    return PASS


@compiled
def changes_data(operation):
    return operation == WRITE or DISCARD <= operation <= SECURE_ERASE
