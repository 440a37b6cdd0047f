"""A policy that counts and passes, to measure what a policy costs: compare_trees.py."""

from ringplane.policies import PASS, READ, Policy, counter, policy


class Counting(Policy):
    """It counts reads, and lets everything pass."""

    reads: int = counter("reads")


@policy(Counting)
def counting(io, my):
    my.reads += io.operation == READ
    return PASS
