"""Units: functions that are compiled apart, only when they are needed, and that compiled code calls by address.

A part (jit.py) is compiled again in each whole that calls it. A unit is compiled once, with all the parts that it
calls, and saved in the cache on its own. Its address is stored in a struct, and compiled code calls this address:

    @unit
    def read(source, offset, length): ...

    state["read"] = read.address()                           # Python, when something is opened
    call(state.read, state.source, offset, length)           # compiled code

All arguments and the result are int64. A call by address costs about a nanosecond more than an inlined one, and
LLVM cannot optimise across it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.ccallback import CFunc
from numba.core.errors import TypingError
from numba.core.types.containers import StarArgTuple

from ringplane.compiler import cache, interpreted
from ringplane.compiler.bad_code import bad_code
from ringplane.compiler.interpreted import INTERPRETED
from ringplane.compiler.intrinsics import intrinsic
from ringplane.compiler.jit import making
from ringplane.compiler.key import GENERIC, NATIVE
from ringplane.compiler.pipeline import OPTIONS, UnitCompiler
from ringplane.compiler.store import store_of

INT64 = ir.IntType(64)


# All units of the modules that are imported, by name.
known: dict[str, Unit] = {}


class Unit:
    """A function that compiled code calls by its address; Python can call it too, without the GIL."""

    def __init__(self, function: Callable[..., int]) -> None:
        functools.update_wrapper(self, function)
        self.name = f"{function.__module__}.{function.__qualname__}"
        self._signature = types.int64(*[types.int64] * function.__code__.co_argcount)
        self._store = store_of(function)
        self._compiled: Any = None
        known[self.name] = self

    def __call__(self, *args: int) -> int:
        return interpreted.call(self.address(), *args)

    def address(self) -> int:
        """Compile the unit, or load it from the cache; the address stays valid until the process ends.

        Raises BadCode.
        """
        if INTERPRETED:
            return interpreted.address_of_unit(self.__wrapped__)  # type: ignore[attr-defined]
        return int((self._compiled or self._compile()).address)

    def is_cached(self) -> bool:
        return any(cache.exists(self.file_name(cpu)) for cpu in (NATIVE, GENERIC))

    def file_name(self, cpu: str) -> str:
        """The name of the file of its code for this CPU."""
        return str(self._store.file_name(self._signature, cpu))

    def _compile(self) -> Any:
        with making:
            if self._compiled is None:
                function: Any = self.__wrapped__  # type: ignore[attr-defined]
                compiled: Any = CFunc(function, (self._signature.args, types.int64), {}, OPTIONS, UnitCompiler)
                compiled._cache = self._store
                with bad_code():
                    compiled.compile()
                self._compiled = compiled
            return self._compiled


def unit(function: Callable[..., int]) -> Unit:
    """Compile `function` apart when its address is first needed; it runs without the GIL and never raises."""
    return Unit(function)


@intrinsic(python=interpreted.call)
def call(typingctx: Any, address: Any, *args: Any) -> Any:
    """The result of the unit (or C function of int64 arguments) at `address`, called with `args`."""
    if not all(isinstance(each, (types.Integer, types.Boolean)) for each in (address, *args)):
        raise TypingError("call() needs integers")

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        numbers = [
            context.cast(builder, value, each, types.int64)
            for value, each in zip(cgutils.unpack_tuple(builder, values[1]), signature.args[1], strict=True)
        ]
        pointer = ir.FunctionType(INT64, [INT64] * len(numbers)).as_pointer()
        return builder.call(builder.inttoptr(values[0], pointer), numbers)

    return types.int64(types.int64, StarArgTuple(args)), codegen
