"""What the values of compiled code can be, as far as the checker follows them (inference.py)."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np


class Kind(Enum):
    """A value that is not a struct; the text is how a mistake describes it."""

    NUMBER = "a number"
    FLOAT = "a float"
    ARRAY = "an array"
    NOTHING = "nothing"
    ANY = "anything"


@dataclass(frozen=True, slots=True)
class Struct:
    """A view of memory with named fields."""

    name: str
    dtype: np.dtype[np.void]

    def __str__(self) -> str:
        return self.name

    @property
    def fields(self) -> tuple[str, ...]:
        return self.dtype.names or ()

    def field(self, name: str) -> Shape:
        """What is read from this field."""
        dtype = self.dtype[name]
        if dtype.subdtype is not None:
            return frozenset({Kind.ARRAY})
        if dtype.names:
            return frozenset({Struct(f"{self.name}.{name}", dtype)})
        return frozenset({Kind.FLOAT if dtype.kind == "f" else Kind.NUMBER})

    def is_unsigned_64(self, name: str) -> bool:
        return self.dtype[name] == np.dtype("<u8")


@dataclass(frozen=True, slots=True)
class Several:
    """A tuple."""

    items: tuple[Shape, ...]


# What a value can be: one of these, depending on the path and the caller. Empty: not known yet.
Element = Kind | Struct | Several
Shape = frozenset[Element]

NUMBER: Shape = frozenset({Kind.NUMBER})
FLOAT: Shape = frozenset({Kind.FLOAT})
NOTHING: Shape = frozenset({Kind.NOTHING})
ANY: Shape = frozenset({Kind.ANY})
UNKNOWN: Shape = frozenset()


def join(shapes: Iterable[Shape]) -> Shape:
    """What a value can be that has one of these shapes; tuples of the same length become one."""
    elements = frozenset().union(*shapes)
    tuples: dict[int, list[Several]] = {}
    for each in elements:
        if isinstance(each, Several):
            tuples.setdefault(len(each.items), []).append(each)
    if all(len(same) == 1 for same in tuples.values()):
        return elements
    joined = (Several(tuple(map(join, zip(*(each.items for each in same), strict=True)))) for same in tuples.values())
    return frozenset(each for each in elements if not isinstance(each, Several)) | frozenset(joined)


@dataclass
class Paths:
    """The variables where some paths meet. `unsure`: those that are not assigned on all of them."""

    shapes: dict[str, Shape] = field(default_factory=dict)
    unsure: frozenset[str] = frozenset()

    def copy(self) -> Paths:
        return Paths(dict(self.shapes), self.unsure)


def meet(paths: Iterable[Paths | None]) -> Paths | None:
    """The variables after one of these paths; None: no path leads here."""
    real = [each for each in paths if each is not None]
    if len(real) < 2:
        return real[0] if real else None
    names = set().union(*(each.shapes for each in real))
    shapes = {name: join(each.shapes.get(name, UNKNOWN) for each in real) for name in names}
    missing = {name for name in names for each in real if name not in each.shapes}
    return Paths(shapes, frozenset(missing).union(*(each.unsure for each in real)))


def describe(element: Element) -> str:
    if isinstance(element, Kind):
        return element.value
    if isinstance(element, Several):
        return f"a tuple of {len(element.items)}"
    return f"{'an' if element.name[0] in 'AEIO' else 'a'} {element.name}"


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name."""
    close = difflib.get_close_matches(name, known, 1, 0.7)
    return f" (did you mean {close[0]}?)" if close else ""
