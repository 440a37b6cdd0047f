"""What intrinsics (intrinsics.py) are made of: LLVM's instruction builder, for values that are all int64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

INT64 = ir.IntType(64)


def integer(bits: int) -> Any:
    return ir.IntType(bits)


class Emitter:
    """Adds instructions to a function. A value is an int64, if nothing else is said."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def number(self, value: int, bits: int = 64) -> Any:
        return ir.Constant(integer(bits), value)

    def narrow(self, value: Any, bits: int) -> Any:
        """The low bits."""
        return value if bits == 64 else self.builder.trunc(value, integer(bits))

    def extended(self, value: Any) -> Any:
        """An int64 from fewer bits, with zeros in front."""
        return value if value.type.width == 64 else self.builder.zext(value, INT64)

    def pointer(self, address: Any, bits: int) -> Any:
        """A pointer to an integer."""
        return self.builder.inttoptr(address, integer(bits).as_pointer())

    def call(self, name: str, args: Sequence[Any], bits: int = 64, *, variadic: bool = False) -> Any:
        """Call a C function, or an intrinsic of LLVM, by its symbol; 0 bits: it returns nothing.

        Code with an address in it could not be cached.
        """
        result = integer(bits) if bits else ir.VoidType()
        fixed = args[:1] if variadic else args
        kind = ir.FunctionType(result, [each.type for each in fixed], var_arg=variadic)
        function = self.builder.module.globals.get(name)
        if function is None:
            function = ir.Function(self.builder.module, kind, name)
        return self._signed(self.builder.call(function, args), bits)

    def call_address(self, address: Any, args: Sequence[Any], bits: int = 64) -> Any:
        """Call the function at an address; 0 bits: it returns nothing."""
        result = integer(bits) if bits else ir.VoidType()
        kind = ir.FunctionType(result, [each.type for each in args])
        return self._signed(self.builder.call(self.builder.inttoptr(address, kind.as_pointer()), args), bits)

    def _signed(self, value: Any, bits: int) -> Any:
        return self.builder.sext(value, INT64) if 0 < bits < 64 else value

    def local(self, count: int = 1) -> Any:
        """The address of `count` variables of the function, whose content is undefined."""
        with self.builder.goto_entry_block():
            variable = self.builder.alloca(ir.ArrayType(INT64, count))
        return self.builder.ptrtoint(variable, INT64)

    def static(self, name: str) -> Any:
        """The address of a static variable of this code, which is 0 at first."""
        variable = self.builder.module.globals.get(name)
        if variable is None:
            variable = ir.GlobalVariable(self.builder.module, INT64, name)
            variable.linkage = "internal"
            variable.initializer = self.number(0)
        return self.builder.ptrtoint(variable, INT64)

    def load(self, address: Any, bits: int = 64) -> Any:
        value = self.builder.load(self.pointer(address, bits))
        return self._signed(value, bits)

    def unless_rare(self, rare: Any, value: Any, other: Callable[[], Any]) -> Any:
        """`value`, or what `other` emits if the condition `rare` holds."""
        before = self.builder.block
        with self.builder.if_then(rare, likely=False):
            result = other()
            inside = self.builder.block
        chosen = self.builder.phi(INT64)
        chosen.add_incoming(value, before)
        chosen.add_incoming(result, inside)
        return chosen
