"""Tries the states of a recording until all are tried, or enough, or the time is over; keeps the smallest failure."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ringplane.crash.check_process import Experiment, Verdict
from ringplane.crash.check_processes import CheckProcesses
from ringplane.crash.crash_states import Enumeration, State
from ringplane.crash.disk_state import Fingerprints
from ringplane.crash.smallest_state import size_of, smallest
from ringplane.system.signals import NONE, Signals

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
    # What was tried to make the failing state smaller.
    smaller_tried: int = 0
    smaller_seconds: float = 0.0
    # Loop devices that checks have left.
    detached: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """A state on which the check failed, and how.

    `repeated`: whether it failed again; if not, its result is a matter of luck. None: it was not repeated.
    """

    state: State
    verdict: Verdict
    repeated: bool | None = None


@dataclass
class Laboratory:
    """Tries states with some processes; `announce` is called after each. Methods raise CouldNotRun, Interrupted."""

    experiment: Experiment
    enumeration: Enumeration
    processes: CheckProcesses
    at_once: int
    signals: Signals = NONE
    announce: Callable[[], None] = lambda: None
    tally: Tally = field(default_factory=Tally)
    # The smallest one so far.
    failure: Failure | None = None

    def __post_init__(self) -> None:
        self._fingerprints = Fingerprints(self.experiment.contents)
        # By key: whether it has failed; and the keys of the states that are being tried.
        self._seen: dict[int, bool] = {}
        self._keys: dict[State, int] = {}

    def run(self, budget: Budget) -> None:
        """Try states."""
        begin = time.monotonic()
        for state, verdict in self.processes.verdicts(self._new_ones(budget, begin + budget.seconds)):
            self.tally.tried += 1
            self.tally.failed += verdict.failed
            self.tally.seconds = time.monotonic() - begin
            self._take(state, verdict)

    def minimise(self, seconds: float) -> None:
        """Make the failing state smaller, for so long at most, and repeat its check."""
        if self.failure is None:
            return
        begin = time.monotonic()

        def enough() -> bool:
            self.tally.smaller_seconds = time.monotonic() - begin
            return self.tally.smaller_seconds > seconds

        before = None
        while self.failure.state != before:
            before = self.failure.state
            found = smallest(before, self._fail, self.at_once, self.experiment.marked(before), enough)
            if self._size(found) < self._size(self.failure.state):
                # It was not tried itself: another one that is the same byte for byte has failed.
                self.failure = replace(self.failure, state=found)
        for _, verdict in self.processes.verdicts([self.failure.state]):
            self.failure = replace(self.failure, repeated=verdict.failed)

    def _take(self, state: State, verdict: Verdict) -> None:
        """Remember the failure if it is the smallest one."""
        self.tally.detached += verdict.detached
        self.announce()
        self._seen[self._keys.pop(state)] = verdict.failed
        if not verdict.failed:
            return
        if self.failure is None or self._size(state) < self._size(self.failure.state):
            self.failure = Failure(state, verdict)

    def _size(self, state: State) -> tuple[int, bool, int]:
        return size_of(state, self.experiment.marked(state))

    def _fail(self, states: Sequence[State]) -> Sequence[bool]:
        """Whether each of these fails; those that are the same as earlier ones are not tried again."""
        keys = [self._key(state) for state in states]
        unknown = [state for state, key in zip(states, keys, strict=True) if self._begin(state, key)]
        for state, verdict in self.processes.verdicts(unknown):
            self._take(state, verdict)
            self.tally.smaller_tried += 1
        return [self._seen[key] for key in keys]

    def _new_ones(self, budget: Budget, end: float) -> Iterator[State]:
        count = 0
        for state in self._all_of_them():
            self.signals.check()
            if time.monotonic() > end:
                return
            key = self._key(state)
            if key in self._seen:
                self.tally.same += 1
                continue
            if count == budget.states:
                return
            count += 1
            self._begin(state, key)
            yield state
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

    def _begin(self, state: State, key: int) -> bool:
        """Whether it is new: it is being tried from now on."""
        if key in self._seen:
            return False
        self._seen[key] = False
        self._keys[state] = key
        return True

    def _key(self, state: State) -> int:
        """The same for states of which one check is enough."""
        return self.experiment.marked(state) << 64 | self._fingerprints.of(state)
