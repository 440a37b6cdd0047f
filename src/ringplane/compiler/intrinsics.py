"""Intrinsics: functions of compiled code that are an instruction or a call of a C function.

    @intrinsic
    def wrapping_add(llvm, a, b) -> Any:
        return llvm.builder.add(a, b)

The first parameter is an Emitter. All others are int64, and so is the result, if it is not annotated with None. What
takes structs or any number of arguments has the form of Numba's `intrinsic`, and a counterpart for the interpreted
mode.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ringplane.compiler.interpreted import INTERPRETED
from ringplane.compiler.jit import Whole, load

# Those of this process that are called in the interpreted mode.
_alone: list[Intrinsic] = []


class Intrinsic:
    """Numba is imported when something that calls it is compiled."""

    def __init__(self, define: Callable[..., Any], numba_form: bool) -> None:
        functools.update_wrapper(self, define)
        self._define = define if numba_form else _in_numba_form(define)
        if INTERPRETED:
            _alone.append(self)

    @functools.cached_property
    def _numba_type_(self) -> Any:
        """For Numba."""
        from numba.core.types import Function
        from numba.core.typing.templates import make_intrinsic_template

        return Function(make_intrinsic_template(self, self._define, self._define.__name__))

    def __call__(self, *args: int) -> Any:
        """For the interpreted mode."""
        return self.alone(*args)

    @functools.cached_property
    def alone(self) -> Callable[..., int]:
        """A function that Python can call, made of nothing but this intrinsic; it runs without the GIL."""
        names = ", ".join(list(inspect.signature(self._define).parameters)[1:])
        return Whole(eval(f"lambda {names}: made({names})", {"made": self, "__name__": self.__module__}), saved=False)


def intrinsic(define: Callable[..., Any] | None = None, *, python: Callable[..., Any] | None = None) -> Any:
    """See above. With `python`, the counterpart for the interpreted mode, `define` has the form of Numba's."""
    if define is None:
        return functools.partial(intrinsic, python=python)
    return python if INTERPRETED and python else Intrinsic(define, numba_form=python is not None)


def _in_numba_form(define: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(define)
    def typed(typingctx: Any, *args: Any) -> Any:
        from numba.core import types

        from ringplane.compiler.emitter import Emitter

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            result = define(Emitter(builder), *values)
            return result if returns(define) else context.get_dummy_value()

        result = types.int64 if returns(define) else types.void
        return result(*[types.int64] * len(args)), codegen

    return typed


def returns(define: Callable[..., Any]) -> bool:
    """Whether the intrinsic has a result."""
    return define.__annotations__.get("return") != "None"


def load_intrinsics() -> None:
    """Compile all intrinsics now: a confined process cannot load code."""
    for each in _alone:
        load(each.alone)
