"""In which orders the writes of a cut can have reached the disk.

A write reaches it at some moment while it is in flight. Entry i ends at the moment i + 1, and one that began at time t
began at the moment t + 1/2. Only the order of writes that overlap matters.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import cache

from ringplane.crash.power_cuts import PowerCut
from ringplane.crash.timeline import Write

# More entangled writes have too many orders to try all.
FEW_ENTANGLED = 4

USUAL: tuple[int, ...] = ()


def earliest(write: Write) -> float:
    return write.began + 0.5


def latest(write: Write) -> float:
    return write.index + 1.0


@cache
def entangled(cut: PowerCut) -> tuple[int, ...]:
    """The places of pending writes that overlap others that were in flight at the same time."""
    found: set[int] = set()
    for second, write in enumerate(cut.pending):
        for first in range(second - 1, -1, -1):
            other = cut.pending[first]
            if other.index < write.began:
                break
            if write.overlaps(other):
                found |= {first, second}
    return tuple(sorted(found))


def early(cut: PowerCut, place: int) -> tuple[int, ...]:
    """The order in which this write was there as soon as it began, and the others when they ended."""
    return _order(cut, {place: earliest(cut.pending[place])})


def random_order(cut: PowerCut, draw: random.Random) -> tuple[int, ...]:
    """Each entangled write is there at a random moment."""
    chosen = ((place, cut.pending[place]) for place in entangled(cut))
    return _order(cut, {place: draw.uniform(earliest(write), latest(write)) for place, write in chosen})


def has_few_orders(cut: PowerCut) -> bool:
    """Whether `all_orders` are all."""
    return len(entangled(cut)) <= FEW_ENTANGLED


@cache
def all_orders(cut: PowerCut) -> tuple[tuple[int, ...], ...]:
    """All orders of the entangled writes, the usual one first; only that one if there are too many."""
    usual = entangled(cut)
    if not usual or not has_few_orders(cut):
        return (USUAL,)
    found = (_moments(cut, permuted) for permuted in itertools.permutations(usual) if permuted != usual)
    return (USUAL, *dict.fromkeys(_order(cut, moments) for moments in found if moments))


def _moments(cut: PowerCut, places: Sequence[int]) -> dict[int, float]:
    """Moments of these writes that are in this order; empty if it is impossible."""
    moments: dict[int, float] = {}
    step, last = 0.25 / len(places), 0.0
    for place in places:
        last = max(last + step, earliest(cut.pending[place]))
        if last > latest(cut.pending[place]):
            return {}
        moments[place] = last
    return moments


def _order(cut: PowerCut, moments: dict[int, float]) -> tuple[int, ...]:
    """The order of all pending writes; those without a moment were there when they ended."""
    places = range(len(cut.pending))
    return tuple(sorted(places, key=lambda place: (moments.get(place, latest(cut.pending[place])), place)))
