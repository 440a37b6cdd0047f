"""Self-tuning: which habit of a worker gets most requests done, found by trying them.

Whether it pays to look at the rings before sleeping, or to hold calls back, depends on what nobody tells us: how long
waking up takes on both sides, where the scheduler puts driver and worker, what an interrupt costs the guest. Measured
(docs/performance.md): the same habit makes twice as many requests with one driver and half as many with another. So now
and then each habit gets short spells in turn, and the one with the most requests in its time is kept. A dearer one has
to be better by a margin: what makes no difference shall cost nothing.
"""

from __future__ import annotations

from ringplane.dataplane.state import HABITS, SLEEP, TALLY, TALLY_SIZE
from ringplane.native.access import view
from ringplane.native.jit import compiled

# A spell lasts so long, and longer if fewer requests were answered: they would not tell much.
SPELL_NS, ENOUGH = 1_000_000, 64
# So many spells of each habit make a trial; one that is worse than the best by this factor is dropped before.
ROUNDS, HOPELESS = 4, 0.75
# A dearer habit has to be better by this factor.
WORTH = 1.06

# After a trial the best habit is kept for this long, twice as long each time that the next trial finds the same. While
# it is kept it is looked at once in REST_SPELL_NS; requests that come CHANGE times as fast or slow begin a trial.
REST_MIN_NS, REST_MAX_NS, REST_SPELL_NS = 200_000_000, 6_400_000_000, 20_000_000
CHANGE = 1.5
# How much what the last trial found weighs in the next one, if the load has not changed.
MEMORY = 0.5

# A longer sleep with nothing in flight is a gap: the driver wants nothing, and the time tells nothing of a habit. After
# so many gaps without a whole spell between them there is nothing to be gained by anything but sleeping.
GAP_NS, GAPS = 20_000_000, 8


@compiled
def begin_spell(worker, length):
    worker.spell_start = worker.now
    worker.spell_end = worker.now + length
    worker.spell_answered = worker.answered


@compiled
def note_sleep(worker, slept):
    """The worker has slept for so many nanoseconds with nothing in flight."""
    if slept < GAP_NS:
        return
    worker.gaps += 1
    if worker.gaps == GAPS:
        keep(worker, SLEEP, 0)
    begin_spell(worker, SPELL_NS)


@compiled
def end_spell(worker):
    """A spell's time is over: take down what it says, and decide what comes next."""
    answered, lasted = worker.answered - worker.spell_answered, worker.now - worker.spell_start
    if answered < ENOUGH:
        worker.spell_end = worker.now + SPELL_NS
        return
    worker.gaps = 0
    if worker.resting > 0:
        rest(worker, rate(answered, lasted), lasted)
    else:
        go_on_with_trial(worker, answered, lasted)


@compiled
def rest(worker, present, lasted):
    """Keep the habit until the rest is over, or the load has changed."""
    worker.resting -= lasted
    if present > CHANGE * worker.rate or worker.rate > CHANGE * present:
        worker.rest_ns = 0
        begin_trial(worker, 0)
    elif worker.resting > 0:
        begin_spell(worker, REST_SPELL_NS)
    else:
        begin_trial(worker, MEMORY)


@compiled
def keep(worker, habit, present):
    """Rest with this habit."""
    same = habit == worker.best and worker.rest_ns > 0
    worker.rest_ns = min(REST_MAX_NS, 2 * worker.rest_ns) if same else REST_MIN_NS
    worker.best, worker.rate, worker.resting = habit, present, worker.rest_ns
    worker.habit = habit
    begin_spell(worker, REST_SPELL_NS)


@compiled
def begin_trial(worker, memory):
    """Begin to try each habit; what earlier trials found counts `memory` times."""
    worker.resting = worker.rounds = 0
    worker.trying = worker.habits
    for habit in range(HABITS):
        before = tally(worker, habit)
        before.answered = int(memory * before.answered)
        before.lasted = int(memory * before.lasted)
    worker.habit = next_habit(worker, SLEEP)
    begin_spell(worker, SPELL_NS)


@compiled
def go_on_with_trial(worker, answered, lasted):
    """Every habit in turn, the hopeless ones less often than the others."""
    found = tally(worker, worker.habit)
    found.answered += answered
    found.lasted += lasted
    following = next_habit(worker, worker.habit + 1)
    if following == HABITS:
        worker.rounds += 1
        best = find_best(worker)
        if worker.rounds == ROUNDS:
            keep(worker, best, rate_of(worker, best))
            return
        drop_hopeless(worker, rate_of(worker, best))
        following = next_habit(worker, SLEEP)
    worker.habit = following
    begin_spell(worker, SPELL_NS)


@compiled
def next_habit(worker, habit):
    """The first one from `habit` on that takes part in the trial, or HABITS."""
    while habit < HABITS and not worker.trying >> habit & 1:
        habit += 1
    return habit


@compiled
def find_best(worker):
    best = next_habit(worker, SLEEP)
    habit = next_habit(worker, best + 1)
    while habit < HABITS:
        if rate_of(worker, habit) > WORTH * rate_of(worker, best):
            best = habit
        habit = next_habit(worker, habit + 1)
    return best


@compiled
def drop_hopeless(worker, best):
    habit = next_habit(worker, SLEEP)
    while habit < HABITS:
        if rate_of(worker, habit) < HOPELESS * best:
            worker.trying &= ~(1 << habit)
        habit = next_habit(worker, habit + 1)


@compiled
def tally(worker, habit):
    return view(worker.tallies + habit * TALLY_SIZE, TALLY)


@compiled
def rate_of(worker, habit):
    """As the trial has found so far."""
    found = tally(worker, habit)
    return rate(found.answered, found.lasted)


@compiled
def rate(answered, lasted):
    """Requests a second. Divided by what may be zero, before anything was tried."""
    return answered * 1_000_000_000 // max(lasted, 1)
