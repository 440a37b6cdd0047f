"""The states that power cuts can leave: which writes are there, wholly or in part, and in which order they came.

There are far too many, so the likely and small ones come first: nothing missing, one write missing, all missing, the
first ones there and the others not, only one there; then random ones and, in turns with them, one torn, one in another
order, and all of the cuts that have few. Each stage goes through all cuts: some that are far from each other first, and
then those between them, so that little time is enough to have looked everywhere.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from ringplane.crash.landing import all_orders, early, entangled, has_few_orders, random_order
from ringplane.crash.power_cuts import PowerCut
from ringplane.crash.tearing import Tearing
from ringplane.crash.timeline import Write

# Which sectors of a write are there: a bit for each, the first sector lowest; ALL and NOTHING for any length.
ALL, NOTHING = -1, 0

# Of so many random writes one is torn.
TORN = 16


@dataclass(frozen=True, slots=True)
class State:
    """What a cut has left: for each pending write the sectors that are there (`kept`).

    `order`: the places of the pending writes in the order in which they reached the disk; empty: as they ended.
    """

    cut: PowerCut
    kept: tuple[int, ...]
    order: tuple[int, ...] = ()

    def missing(self, before: int = 0) -> list[int]:
        """The places of writes that are missing or torn although a later one is there, or a mark before that time.

        The power could have been cut before the others began.
        """
        last = max((place for place, kept in enumerate(self.kept) if kept != NOTHING), default=-1)
        return [
            place
            for place in self.cut.loose
            if self.kept[place] != ALL and (place <= last or self.cut.pending[place].index < before)
        ]

    def earliest(self, before: int = 0) -> int:
        """The first time at which a power cut can have left it, if what had ended by the time `before` is promised."""
        loose = set(self.cut.loose)
        times = [
            write.began if place in loose else write.index + 1
            for place, write in enumerate(self.cut.pending)
            if self.kept[place] != NOTHING
        ]
        return max(self.cut.settled_by, before, *times)


Stage = Callable[[PowerCut], Iterator[State]]


def with_kept(cut: PowerCut, kept: dict[int, int], others: int = ALL, order: tuple[int, ...] = ()) -> State:
    """The state in which these loose writes are as given, and the other loose ones all there or all missing."""
    masks = [ALL] * len(cut.pending)
    for place in cut.loose:
        masks[place] = kept.get(place, others)
    return State(cut, tuple(masks), order)


def nothing_missing(cut: PowerCut) -> Iterator[State]:
    yield with_kept(cut, {})


def one_missing(cut: PowerCut) -> Iterator[State]:
    for place in cut.loose:
        yield with_kept(cut, {place: NOTHING})


def all_missing(cut: PowerCut) -> Iterator[State]:
    yield with_kept(cut, {}, NOTHING)


def first_ones(cut: PowerCut) -> Iterator[State]:
    """The first ones are there, and all later ones are missing."""
    for number in range(1, len(cut.loose)):
        yield with_kept(cut, dict.fromkeys(cut.loose[:number], ALL), NOTHING)


def one_there(cut: PowerCut) -> Iterator[State]:
    for place in cut.loose:
        yield with_kept(cut, {place: ALL}, NOTHING)


def reordered(cut: PowerCut) -> Iterator[State]:
    """A write that overlaps others in flight reached the disk before them; all are there."""
    for place in entangled(cut):
        yield with_kept(cut, {}, order=early(cut, place))


@dataclass(frozen=True)
class Enumeration:
    """The states of some cuts, in stages. As long as these are not more than `most`, all states of cuts are tried."""

    cuts: Sequence[PowerCut]
    tearing: Tearing
    seed: int = 0
    most: int = 4096

    def likely(self) -> Iterator[State]:
        """The small ones that are most likely. Some come repeatedly, here and below."""
        for stage in (nothing_missing, one_missing, all_missing, first_ones, one_there):
            yield from self._everywhere(stage)

    def others(self) -> Iterator[State]:
        """Torn and reordered writes, and all states of the cuts that have few."""
        for stage in (self.one_torn, reordered, self.all_of_few):
            yield from self._everywhere(stage)

    def rounds(self) -> Iterator[list[State]]:
        """Random states: one of each cut that has many, per round. Ends only if there is no such cut."""
        draw = random.Random(self.seed)
        while self._large:
            yield [self.random_state(cut, draw) for cut in self._large]

    @cached_property
    def possible(self) -> int:
        """How many states the cuts have. Different ones may have the same content."""
        return sum(self.possible_at(cut) for cut in self.cuts)

    @cached_property
    def complete(self) -> bool:
        """Whether `likely` and `others` are all states."""
        return not self._large and all(has_few_orders(cut) for cut in self.cuts)

    @cached_property
    def _few(self) -> set[int]:
        """The numbers of the cuts of which all states are tried: those that have the fewest."""
        counts = sorted((self.possible_at(cut), cut.number) for cut in self.cuts)
        sums = itertools.accumulate(count for count, _ in counts)
        return {number for (_, number), so_far in zip(counts, sums, strict=True) if so_far <= self.most}

    @cached_property
    def _large(self) -> list[PowerCut]:
        return [cut for cut in self.cuts if cut.number not in self._few]

    def _everywhere(self, stage: Stage) -> Iterator[State]:
        for part in spread(len(self.cuts)):
            for number in part:
                yield from stage(self.cuts[number])

    def one_torn(self, cut: PowerCut) -> Iterator[State]:
        """A write is torn once: as the last one, and among others that are there."""
        for number, place in enumerate(cut.loose):
            write = cut.pending[place]
            for edge in self.tearing.edges(write):
                start = (1 << edge) - 1
                rest = ((1 << write.count) - 1) ^ start
                yield with_kept(cut, {**dict.fromkeys(cut.loose[:number], ALL), place: start}, NOTHING)
                yield with_kept(cut, {place: start})
                yield with_kept(cut, {place: rest})

    def all_of_few(self, cut: PowerCut) -> Iterator[State]:
        """All states, if there are few."""
        if cut.number not in self._few:
            return
        loose, orders = set(cut.loose), all_orders(cut)
        choices = [self._choices(write) if place in loose else [ALL] for place, write in enumerate(cut.pending)]
        for kept in itertools.product(*choices):
            for order in orders:
                yield State(cut, kept, order)

    def random_state(self, cut: PowerCut, draw: random.Random) -> State:
        """A random state of a cut: few writes are missing about as often as half of them, or nearly all."""
        few = 2 / max(1, len(cut.loose))
        missing = draw.choice([0.5, 0.5, draw.random(), few, 1 - few])
        kept = {place: self._random_kept(cut.pending[place], missing, draw) for place in cut.loose}
        order = random_order(cut, draw) if entangled(cut) and draw.random() < 0.5 else ()
        return with_kept(cut, kept, order=order)

    def _random_kept(self, write: Write, missing: float, draw: random.Random) -> int:
        if draw.randrange(TORN) == 0 and self.tearing.count(write) > 1:
            return self.tearing.some_units(write, draw)
        return NOTHING if draw.random() < missing else ALL

    def _choices(self, write: Write) -> list[int]:
        return [ALL, NOTHING, *map(sum, proper_subsets(self.tearing.units(write)))]

    def possible_at(self, cut: PowerCut) -> int:
        """How many states a cut has; of orders only the number of those that are tried if all are."""
        return len(all_orders(cut)) << sum(self.tearing.count(cut.pending[place]) for place in cut.loose)


def proper_subsets(units: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All subsets except the empty one and the whole."""
    return itertools.chain.from_iterable(itertools.combinations(units, size) for size in range(1, len(units)))


def spread(number: int) -> Iterator[range]:
    """All of range(number), in parts that ascend: the last one, the first one, and then those between others."""
    step = 1 << max(0, number - 2).bit_length()
    yield range(number - 1, number) if number else range(0)
    yield range(0, number - 1, step)
    while step > 1:
        yield range(step // 2, number - 1, step)
        step //= 2
