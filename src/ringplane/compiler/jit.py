"""The `compiled` decorator, and wholes: code that is saved until its sources change, and that runs without the GIL.

Numba is imported only when something is compiled. To load what was saved takes neither its time nor its memory.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from ringplane.compiler import cache, loader, store
from ringplane.compiler.bad_code import bad_code
from ringplane.compiler.interpreted import INTERPRETED
from ringplane.compiler.key import GENERIC, NATIVE, has_key, key_of

Function = TypeVar("Function", bound=Callable[..., Any])

# Workers start at the same time.
_making = threading.Lock()


class Whole:
    """A function compiled with all that it calls. C, Python and, by address, compiled code call it.

    All arguments and the result are int64; a function without a result returns 0.
    """

    def __init__(self, function: Callable[..., Any], *, saved: bool = True, defined: bool = False) -> None:
        """`defined`: its arithmetic has a defined result for all numbers (compiler/arithmetic.py)."""
        functools.update_wrapper(self, function)
        self.name = f"{function.__module__}.{function.__qualname__}"
        self._function = function
        self._saved, self._defined = saved, defined
        self._address = 0

    def __call__(self, *args: int) -> int:
        """The call releases the GIL."""
        return self._callable(*args)

    @functools.cached_property
    def _callable(self) -> Callable[..., int]:
        parameters = [ctypes.c_int64] * self._function.__code__.co_argcount
        return ctypes.CFUNCTYPE(ctypes.c_int64, *parameters)(self.address())

    def address(self) -> int:
        """Compile the function, or load it from the cache; the address stays valid until the process ends.

        Raises BadCode.
        """
        with _making:
            if not self._address:
                self._address = loader.load(self._read() or self._compile())
            return self._address

    @property
    def is_loaded(self) -> bool:
        """Whether `address` needs no file."""
        return self._address != 0

    def is_cached(self) -> bool:
        return any(cache.exists(self.file_name(cpu)) for cpu in (NATIVE, GENERIC))

    def file_name(self, cpu: str) -> str:
        """The name of the file of its code for this CPU."""
        return cache.file_name(self.name, key_of(self._function.__module__, cpu), "code")

    def _read(self) -> bytes | None:
        """The saved code. Code for this CPU is preferred to code for any CPU."""
        if not self._can_be_saved():
            return None
        return store.read(self.file_name(NATIVE)) or store.read(self.file_name(GENERIC))

    def _compile(self) -> bytes:
        library = self._library()
        code: bytes = library.object_code()
        if library.has_dynamic_globals:
            warnings.warn(f"{self.name} is not saved: it contains addresses of this process", stacklevel=2)
        elif self._can_be_saved():
            store.write(self.file_name(NATIVE), code)
        return code

    def _library(self) -> Any:
        with bad_code():
            return _compiler().compile_whole(self._function, self._defined)

    def object_code(self) -> bytes:
        """Its machine code as an object file, which this process does not load. Raises BadCode."""
        code: bytes = self._library().object_code()
        return code

    def _can_be_saved(self) -> bool:
        """The code of a closure depends on more than its text, and some functions have no text."""
        return self._saved and not self._function.__closure__ and has_key(self._function.__module__)


class _Compiled:
    """A compiled function: a part of each compiled function that calls it, and a whole if Python calls it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.whole = Whole(function)

    @functools.cached_property
    def _part(self) -> Any:
        """Made when something that calls the function is compiled."""
        # Not `_compiler()`, whose trial of an untested Numba comes here.
        from ringplane.compiler.pipeline import part

        return part(self.__wrapped__)  # type: ignore[attr-defined]

    @functools.cached_property
    def _numba_type_(self) -> Any:
        """For Numba; it refers to the part weakly."""
        from ringplane.compiler.pipeline import PartType

        return PartType(self._part)

    def __call__(self, *args: int) -> int:
        return self.whole(*args)


def compiled(function: Function) -> Function:
    """Compile `function` on its first call, or load it from the cache; it runs without the GIL and never raises.

    Division by zero gives NumPy's result instead of an exception, so no path out of compiled code needs the GIL.
    """
    return function if INTERPRETED else _Compiled(function)  # type: ignore[return-value]


def load(function: Callable[..., Any]) -> None:
    """Compile a function that Python calls, or load it from the cache. Raises BadCode."""
    if isinstance(function, _Compiled):
        function = function.whole
    if isinstance(function, Whole):
        function.address()


@functools.cache
def _compiler() -> Any:
    """The module that compiles. Raises UnsupportedNumba."""
    from ringplane.compiler import numba_version, pipeline

    numba_version.check(lambda: works(pipeline))
    return pipeline


@compiled
def _increment(number):
    return number + 1


def _increment_twice(number):
    return _increment(_increment(number))


def works(pipeline: Any) -> bool:
    """Whether a function that Python calls, with parts behind it, is compiled correctly."""
    address = loader.load(pipeline.compile_whole(_increment_twice).object_code())
    return bool(ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address)(40) == 42)
