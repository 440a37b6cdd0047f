"""Makes a failing state smaller: fewer writes are missing, and it still fails."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from ringplane.crash.crash_states import ALL, NOTHING, State

# Whether each of these states fails.
Fails = Callable[[Sequence[State]], Sequence[bool]]
# Whether the time is over.
Enough = Callable[[], bool]


def size_of(state: State, before: int = 0) -> tuple[int, bool, int]:
    """Smaller ones are easier to understand: missing writes, another order, and what is there.

    `before`: the check was promised what had ended by this time.
    """
    there = sum(state.kept[place] != NOTHING for place in state.cut.loose)
    return len(state.missing(before)), bool(state.order), there


def smallest(state: State, fails: Fails, at_once: int, before: int = 0, enough: Enough = lambda: False) -> State:
    """The smallest state that this one leads to, or a larger one if it is `enough`; so many are tried at a time."""
    while True:
        found = _first_failing(_smaller(state, before), fails, at_once, enough)
        if found is None:
            return state
        state = found


def _smaller(state: State, before: int) -> Iterator[State]:
    size = size_of(state, before)
    return (each for each in simpler(state, before) if size_of(each, before) < size)


def _first_failing(candidates: Iterator[State], fails: Fails, at_once: int, enough: Enough) -> State | None:
    """None if there is none, or not enough time to find it. There are too many candidates to have them all."""
    while not enough() and (some := list(itertools.islice(candidates, at_once))):
        for each, failed in zip(some, fails(some), strict=True):
            if failed:
                return each
    return None


def simpler(state: State, before: int = 0) -> Iterator[State]:
    """Similar states, those that are much simpler first."""
    if state.order:
        yield dataclasses.replace(state, order=())
    there = [place for place in state.cut.loose if state.kept[place] != NOTHING]
    for some in halves(there):
        # Without the last ones the power could have been cut earlier.
        if some and some[-1] == there[-1]:
            yield changed(state, some, NOTHING)
    for some in halves(state.missing(before)):
        yield changed(state, some, ALL)


def changed(state: State, places: Sequence[int], kept: int) -> State:
    """The state with this of these writes."""
    masks = list(state.kept)
    for place in places:
        masks[place] = kept
    return dataclasses.replace(state, kept=tuple(masks))


def halves(places: Sequence[int]) -> Iterator[Sequence[int]]:
    """All of them, each half, each quarter, and so on, to each by itself."""
    size = len(places)
    while size:
        yield from (places[start : start + size] for start in range(0, len(places), size))
        size = (size + 1) // 2 if size > 1 else 0
