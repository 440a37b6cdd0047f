"""The `compiled` decorator: compiles with Numba, runs without the GIL, and saves the code until its sources change."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numba

from ringplane.compiler import numba_version
from ringplane.compiler.bad_code import bad_code
from ringplane.compiler.interpreted import INTERPRETED
from ringplane.compiler.pipeline import PartType, part, whole

Function = TypeVar("Function", bound=Callable[..., Any])


# Workers start at the same time.
making = threading.Lock()


class _Compiled:
    """A compiled function: a part of each compiled function that calls it, and a whole if Python calls it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._whole: Callable[..., Any] | None = None

    @functools.cached_property
    def _part(self) -> Any:
        """Made when something that calls the function is compiled."""
        return part(self.__wrapped__)  # type: ignore[attr-defined]

    @functools.cached_property
    def _numba_type_(self) -> PartType:
        """For Numba; it refers to the part weakly."""
        return PartType(self._part)

    def __call__(self, *args: Any) -> Any:
        return self.whole()(*args)

    def whole(self) -> Any:
        """Made when it is first needed: Python calls few functions, and its code is looked for on disk."""
        return self._whole or self._make_whole()

    def _make_whole(self) -> Any:
        with making:
            if self._whole is None:
                self._whole = whole(self.__wrapped__)  # type: ignore[attr-defined]
            return self._whole


def compiled(function: Function) -> Function:
    """Compile `function` on its first call, or load it from the cache; it runs without the GIL and never raises.

    Division by zero gives NumPy's result instead of an exception, so no path out of compiled code needs the GIL.
    """
    return function if INTERPRETED else _Compiled(function)  # type: ignore[return-value]


def load(function: Callable[..., Any], *args: Any) -> None:
    """Compile, or load from the cache, the code for a call of `function` with arguments of these types.

    Raises BadCode.
    """
    if INTERPRETED:
        return
    dispatcher: Any = function.whole() if isinstance(function, _Compiled) else function
    with bad_code():
        dispatcher.compile(tuple(map(numba.typeof, args)))


@compiled
def _increment(number):
    return number + 1


@compiled
def _increment_twice(number):
    return _increment(_increment(number))


def _works() -> bool:
    """Whether a function that Python calls, with parts behind it, is compiled correctly."""
    tried: Any = _increment_twice
    return bool(whole(tried.__wrapped__, saved=False)(40) == 42)


if not INTERPRETED:
    numba_version.check(_works)
