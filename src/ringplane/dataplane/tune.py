"""Self-tuning: a worker tries its polling policies and keeps the one that completes the most requests.

Whether it pays to poll the rings before sleeping, or to coalesce notifications, depends on facts that nobody reports:
how long waking up takes on both sides, where the scheduler puts driver and worker, what an interrupt costs the guest.
Measured (docs/benchmarks/findings.md): the same policy completes twice as many requests with one driver and half as
many with another. So now and then each policy gets short sampling periods in turn, and the one with the highest rate is
kept. A policy that costs more has to be better by a margin: what makes no difference must not cost anything.
"""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.dataplane.state import POLICIES, SLEEP, TALLY, TALLY_SIZE, WORKER
from ringplane.native.access import view

# The length of a sampling period. It is extended while fewer than ENOUGH requests were completed: too few to compare.
SAMPLE_NS, ENOUGH = 1_000_000, 64
# A trial has ROUNDS sampling periods of each policy. A policy worse than the best by factor HOPELESS is dropped early.
ROUNDS, HOPELESS = 4, 0.75
# A policy that costs more has to be better by this factor.
MARGIN = 1.06

# After a trial the best policy is kept for STEADY_MIN_NS, and twice as long each time that the next trial has the same
# result. Meanwhile the rate is sampled once per STEADY_SAMPLE_NS: if it changes by factor CHANGE, a trial begins.
STEADY_MIN_NS, STEADY_MAX_NS, STEADY_SAMPLE_NS = 200_000_000, 6_400_000_000, 20_000_000
CHANGE = 1.5
# The rate of a load that was not sampled yet.
UNKNOWN = -1
# The weight of the last trial's results in the next trial, if the load has not changed.
OLD_WEIGHT = 0.5

# A longer sleep with nothing in flight is a gap: the driver submits nothing, so the time says nothing about a policy.
# After GAPS gaps without a complete sampling period in between, no policy but SLEEP can gain anything.
GAP_NS, GAPS = 20_000_000, 8


@compiled
def begin_sample(worker, length):
    worker.sample_start = worker.now
    worker.sample_end = worker.now + length
    worker.sample_completed = worker.completed


@compiled
def count_gap(worker, slept):
    """Called after a sleep of `slept` nanoseconds with nothing in flight."""
    if slept < GAP_NS:
        return
    worker.gaps += 1
    if worker.gaps == GAPS:
        keep(worker, SLEEP, 0)
    begin_sample(worker, SAMPLE_NS)


@unit
def end_sample(address):
    """A sampling period of the WORKER struct at `address` is over: record its result and decide what comes next.

    A unit, because it is rare.
    """
    worker = view(address, WORKER)
    completed, lasted = worker.completed - worker.sample_completed, worker.now - worker.sample_start
    if completed < ENOUGH:
        worker.sample_end = worker.now + SAMPLE_NS
        return 0
    worker.gaps = 0
    if worker.until_trial > 0:
        stay_steady(worker, rate(completed, lasted), lasted)
    else:
        continue_trial(worker, completed, lasted)
    return 0


@compiled
def stay_steady(worker, present, lasted):
    """Keep the policy until the next trial is due or the load has changed.

    The load is compared with that of the first sample after the trial, not with that of the trial. A disk at its limit
    does more in a trial: a bad policy leaves room in its bucket, which the next one uses.
    """
    worker.until_trial -= lasted
    if worker.rate == UNKNOWN:
        worker.rate = present
    if present > CHANGE * worker.rate or worker.rate > CHANGE * present:
        worker.steady_ns = 0
        begin_trial(worker, 0)
    elif worker.until_trial > 0:
        begin_sample(worker, STEADY_SAMPLE_NS)
    else:
        begin_trial(worker, OLD_WEIGHT)


@compiled
def keep(worker, policy, present):
    """Use this policy from now on, and schedule the next trial."""
    same = policy == worker.best and worker.steady_ns > 0
    worker.steady_ns = min(STEADY_MAX_NS, 2 * worker.steady_ns) if same else STEADY_MIN_NS
    worker.best, worker.rate, worker.until_trial = policy, present, worker.steady_ns
    worker.policy = policy
    begin_sample(worker, STEADY_SAMPLE_NS)


@compiled
def begin_trial(worker, weight):
    """Begin to try each policy; results of earlier trials count with factor `weight`."""
    worker.until_trial = worker.rounds = 0
    worker.candidates = worker.policies
    for policy in range(POLICIES):
        before = tally(worker, policy)
        before.completed = int(weight * before.completed)
        before.lasted = int(weight * before.lasted)
    worker.policy = next_policy(worker, SLEEP)
    begin_sample(worker, SAMPLE_NS)


@compiled
def continue_trial(worker, completed, lasted):
    """Record the sample and continue with the next candidate; the last round ends the trial."""
    found = tally(worker, worker.policy)
    found.completed += completed
    found.lasted += lasted
    following = next_policy(worker, worker.policy + 1)
    if following == POLICIES:
        worker.rounds += 1
        best = find_best(worker)
        if worker.rounds == ROUNDS:
            keep(worker, best, UNKNOWN)
            return
        drop_hopeless(worker, rate_of(worker, best))
        following = next_policy(worker, SLEEP)
    worker.policy = following
    begin_sample(worker, SAMPLE_NS)


@compiled
def next_policy(worker, policy):
    """The first candidate of the trial from `policy` on, or POLICIES."""
    while policy < POLICIES and not worker.candidates >> policy & 1:
        policy += 1
    return policy


@compiled
def find_best(worker):
    best = next_policy(worker, SLEEP)
    policy = next_policy(worker, best + 1)
    while policy < POLICIES:
        if rate_of(worker, policy) > MARGIN * rate_of(worker, best):
            best = policy
        policy = next_policy(worker, policy + 1)
    return best


@compiled
def drop_hopeless(worker, best):
    policy = next_policy(worker, SLEEP)
    while policy < POLICIES:
        if rate_of(worker, policy) < HOPELESS * best:
            worker.candidates &= ~(1 << policy)
        policy = next_policy(worker, policy + 1)


@compiled
def tally(worker, policy):
    return view(worker.tallies + policy * TALLY_SIZE, TALLY)


@compiled
def rate_of(worker, policy):
    """The rate that the trial has measured so far."""
    found = tally(worker, policy)
    return rate(found.completed, found.lasted)


@compiled
def rate(completed, lasted):
    """Requests per second. `lasted` is 0 before the policy was tried."""
    return completed * 1_000_000_000 // max(lasted, 1)
