"""Structs that compiled code and Python share: NumPy records whose fields are int64, and their initial values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

INITIAL = "initial"


def struct(*fields: str) -> np.dtype[np.void]:
    """A layout of int64 fields. `"first = -1"` is a field with an initial value; that of all others is 0."""
    initial: dict[str, int] = {}
    names = []
    for field in fields:
        name, _, value = field.partition(" = ")
        names.append(name)
        if value:
            initial[name] = int(value)
    return np.dtype([(name, "<i8") for name in names], metadata={INITIAL: initial})


def new(layout: np.dtype[np.void], count: int = 1) -> npt.NDArray[np.void]:
    """An array of `count` structs with the initial values of their fields."""
    made: npt.NDArray[np.void] = np.zeros(count, layout)
    metadata: Any = layout.metadata or {INITIAL: {}}
    for name, value in metadata[INITIAL].items():
        made[name] = value
    return made
