"""Tries the states of a recording until all are tried, or enough, or the time is over; keeps the smallest failure."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ringplane.crash.check_process import Experiment, Verdict
from ringplane.crash.check_processes import CheckProcesses
from ringplane.crash.crash_states import Enumeration, State
from ringplane.crash.disk_state import Fingerprints
from ringplane.crash.smallest_state import size_of, smallest

# If so many rounds of random states bring nothing new, it is of no use to draw more.
IN_VAIN = 16


@dataclass(frozen=True, slots=True)
class Budget:
    """When to stop, after so many states or seconds."""

    states: int
    seconds: float


@dataclass
class Tally:
    """What has been tried so far."""

    tried: int = 0
    same: int = 0
    failed: int = 0
    seconds: float = 0.0
    # Whether all states have been tried.
    exhausted: bool = False
    # Whether it ended before that because random states brought nothing new.
    in_vain: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """A state on which the check failed, and how; if it succeeds on it at last, its result is a matter of luck."""

    state: State
    verdict: Verdict


@dataclass
class Laboratory:
    """Tries states with some processes; `announce` is called after each."""

    experiment: Experiment
    enumeration: Enumeration
    processes: CheckProcesses
    at_once: int
    announce: Callable[[Tally], None] = lambda tally: None
    tally: Tally = field(default_factory=Tally)
    # The smallest one so far.
    failure: Failure | None = None

    def __post_init__(self) -> None:
        self._fingerprints = Fingerprints(self.experiment.contents, self.experiment.timeline)
        self._seen: dict[int, bool] = {}

    def run(self, budget: Budget) -> None:
        """Try states. Raises CouldNotRun, Interrupted."""
        begin = time.monotonic()
        for state, verdict in self.processes.verdicts(self._new_ones(budget, begin + budget.seconds)):
            self.tally.tried += 1
            self.tally.failed += verdict.failed
            self.tally.seconds = time.monotonic() - begin
            self._take(state, verdict)
            self.announce(self.tally)

    def minimise(self) -> None:
        """Make the failing state smaller, and try it once more. Raises CouldNotRun, Interrupted."""
        if self.failure is None:
            return
        first = self.failure.state
        state = smallest(first, self._fail, self.at_once, self.experiment.marked(first))
        for _, verdict in self.processes.verdicts([state]):
            self.failure = Failure(state, verdict)

    def _take(self, state: State, verdict: Verdict) -> None:
        """Remember the failure if it is the smallest one."""
        if not verdict.failed:
            return
        self._seen[self._key(state)] = True
        if self.failure is None or self._size(state) < self._size(self.failure.state):
            self.failure = Failure(state, verdict)

    def _size(self, state: State) -> tuple[int, bool, int]:
        return size_of(state, self.experiment.marked(state))

    def _fail(self, states: Sequence[State]) -> Sequence[bool]:
        """Whether each of these fails; those that are the same as earlier ones are not tried again."""
        unknown = [state for state in states if self._is_new(state)]
        for state, verdict in self.processes.verdicts(unknown):
            self._take(state, verdict)
        return [self._seen[self._key(state)] for state in states]

    def _new_ones(self, budget: Budget, end: float) -> Iterator[State]:
        count = 0
        for state in self._all_of_them():
            if time.monotonic() > end or count == budget.states:
                return
            if self._is_new(state):
                count += 1
                yield state
            else:
                self.tally.same += 1
        self.tally.exhausted = self.enumeration.complete
        self.tally.in_vain = not self.tally.exhausted

    def _all_of_them(self) -> Iterator[State]:
        yield from self.enumeration.likely()
        others = self.enumeration.others()
        in_vain = 0
        for states in self.enumeration.rounds():
            before = len(self._seen)
            yield from states
            yield from itertools.islice(others, len(states))
            in_vain = in_vain + 1 if len(self._seen) == before else 0
            if in_vain == IN_VAIN:
                break
        yield from others

    def _is_new(self, state: State) -> bool:
        key = self._key(state)
        if key in self._seen:
            return False
        self._seen[key] = False
        return True

    def _key(self, state: State) -> int:
        """The same for states of which one check is enough."""
        return self.experiment.marked(state) << 64 | self._fingerprints.of(state)
