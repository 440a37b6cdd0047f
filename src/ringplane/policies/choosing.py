"""Which of the requests a policy is for."""

from __future__ import annotations

from ringplane.compiler.jit import compiled


@compiled
def is_turn(matched, done, skip, every, times):
    """Whether it is the turn of a request that is number `matched` of those that fit, counted from 1.

    After `skip` of them it is each `every`th, until `done` of them are `times`; 0: no limit.
    """
    number = matched - skip
    return number > 0 and number % max(every, 1) == 0 and (times == 0 or done < times)
