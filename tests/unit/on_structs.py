"""Compiled functions of structs, called from Python, which can pass only numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ringplane.compiler.jit import Whole
from ringplane.native.access import view


def on_structs(function: Callable[..., Any]) -> Callable[..., int]:
    """The function for callers that have its structs as NumPy records."""

    def call(*args: Any) -> int:
        layouts = tuple(each.dtype if isinstance(each, np.void) else None for each in args)
        return _whole(function, layouts)(*(_number(each) for each in args))

    return call


def _number(value: Any) -> int:
    """The address of a record."""
    return int(value.__array_interface__["data"][0] if isinstance(value, np.void) else value)


@functools.cache
def _whole(function: Callable[..., Any], layouts: tuple[np.dtype[np.void] | None, ...]) -> Whole:
    """A function of addresses that views them with these layouts."""
    space: dict[str, Any] = {"function": function, "view": view, "__name__": __name__}
    names, values = [], []
    for number, layout in enumerate(layouts):
        names.append(f"argument_{number}")
        values.append(names[-1] if layout is None else f"view({names[-1]}, layout_{number})")
        space[f"layout_{number}"] = layout
    return Whole(eval(f"lambda {', '.join(names)}: function({', '.join(values)})", space), saved=False)
