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

from collections.abc import Callable, Iterable
from typing import Any

from ringplane.compiler import interpreted
from ringplane.compiler.interpreted import INTERPRETED
from ringplane.compiler.intrinsics import intrinsic
from ringplane.compiler.jit import Whole

# All units of the modules that are imported, by name.
known: dict[str, Unit] = {}


class Unit(Whole):
    """A function that compiled code calls by its address; Python can call it too, without the GIL."""

    def __init__(self, function: Callable[..., int]) -> None:
        super().__init__(function)
        known[self.name] = self

    def __call__(self, *args: int) -> int:
        return self._function(*args) if INTERPRETED else super().__call__(*args)

    @property
    def job(self) -> str:
        """By which a process that compiles finds it: one line."""
        return self.name

    def address(self) -> int:
        """See Whole. Raises BadCode."""
        return interpreted.address_of_unit(self._function) if INTERPRETED else super().address()


def unit(function: Callable[..., int]) -> Unit:
    """Compile `function` apart when its address is first needed; it runs without the GIL and never raises."""
    return Unit(function)


def addresses(units: Iterable[Unit]) -> dict[str, int]:
    """The values of a struct's fields that have the names of these units; compiles or loads them. Raises BadCode."""
    return {each.name.rpartition(".")[2]: each.address() for each in units}


@intrinsic(python=interpreted.call)
def call(typingctx: Any, address: Any, *args: Any) -> Any:
    """The result of the unit (or C function of int64 arguments) at `address`, called with `args`."""
    from llvmlite import ir
    from numba.core import cgutils, errors, types
    from numba.core.types.containers import StarArgTuple

    if not all(isinstance(each, (types.Integer, types.Boolean)) for each in (address, *args)):
        raise errors.TypingError("call() needs integers")

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        numbers = [
            context.cast(builder, value, each, types.int64)
            for value, each in zip(cgutils.unpack_tuple(builder, values[1]), signature.args[1], strict=True)
        ]
        int64 = ir.IntType(64)
        pointer = ir.FunctionType(int64, [int64] * len(numbers)).as_pointer()
        return builder.call(builder.inttoptr(values[0], pointer), numbers)

    return types.int64(types.int64, StarArgTuple(args)), codegen
