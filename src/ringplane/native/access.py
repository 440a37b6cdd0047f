"""Loads, stores and fences on plain addresses, and views of structs with named fields, for compiled code.

Every integer is an int64. Loads zero-extend, stores truncate. All loads and stores here are atomic: the compiler may
neither repeat nor split them, so a value that a guest can change at any time is read exactly once.

Orderings are those of the C11 memory model:
- relaxed: only atomicity;
- acquire: what follows this load in the program happens after it (pairs with the writer's release store);
- release: what precedes this store in the program happens before it (pairs with the reader's acquire load);
- `fence`: sequentially consistent, where each side stores its own value, then loads the other's (store, fence, load).
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.errors import TypingError

from ringplane.compiler import interpreted
from ringplane.compiler.interpreted import intrinsic

INT64 = ir.IntType(64)


def _pointer(builder: Any, address: Any, bits: int) -> Any:
    return builder.inttoptr(address, ir.IntType(bits).as_pointer())


def _make_load(bits: int, ordering: str, doc: str) -> Any:
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.load_atomic(_pointer(builder, args[0], bits), ordering, align=bits // 8)
            return value if bits == 64 else builder.zext(value, INT64)

        return types.int64(types.int64), codegen

    load.__doc__ = doc
    return intrinsic(load)


def _make_store(bits: int, ordering: str, doc: str) -> Any:
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = args[1] if bits == 64 else builder.trunc(args[1], ir.IntType(bits))
            builder.store_atomic(value, _pointer(builder, args[0], bits), ordering, align=bits // 8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    store.__doc__ = doc
    return intrinsic(store)


load8 = _make_load(8, "monotonic", "Relaxed load of 8 bits.")
load16 = _make_load(16, "monotonic", "Relaxed load of 16 bits from an aligned address.")
load32 = _make_load(32, "monotonic", "Relaxed load of 32 bits from an aligned address.")
load64 = _make_load(64, "monotonic", "Relaxed load of 64 bits from an aligned address.")
load16_acquire = _make_load(16, "acquire", "Acquire load of 16 bits from an aligned address.")
load32_acquire = _make_load(32, "acquire", "Acquire load of 32 bits from an aligned address.")
store8 = _make_store(8, "monotonic", "Relaxed store of 8 bits.")
store16 = _make_store(16, "monotonic", "Relaxed store of 16 bits to an aligned address.")
store32 = _make_store(32, "monotonic", "Relaxed store of 32 bits to an aligned address.")
store64 = _make_store(64, "monotonic", "Relaxed store of 64 bits to an aligned address.")
store16_release = _make_store(16, "release", "Release store of 16 bits to an aligned address.")
store64_release = _make_store(64, "release", "Release store of 64 bits to an aligned address.")
store32_release = _make_store(32, "release", "Release store of 32 bits to an aligned address.")


@intrinsic
def fence(typingctx: Any) -> Any:
    """A sequentially consistent fence: nothing before it moves behind it, nothing behind it moves before it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def relax(typingctx: Any) -> Any:
    """A hint to the processor that this loop waits for a store by another thread."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if platform.machine() == "x86_64":
            builder.call(external("llvm.x86.sse2.pause", builder, ir.VoidType(), []), [])
        else:
            hint = external("llvm.aarch64.hint", builder, ir.VoidType(), [ir.IntType(32)])
            builder.call(hint, [ir.Constant(ir.IntType(32), 1)])  # YIELD
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Begin to load the cache line and the page table entry of an address, which need not be valid."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = ir.IntType(32)
        pointer = _pointer(builder, args[0], 8)
        function = external("llvm.prefetch.p0i8", builder, ir.VoidType(), [pointer.type, bits, bits, bits])
        builder.call(function, [pointer, *(ir.Constant(bits, value) for value in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def wrapping_add(typingctx: Any, a: Any, b: Any) -> Any:
    """a + b modulo 2^64. Numba's own + - * promise LLVM not to overflow: an overflow there is undefined behaviour."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.add(*args)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def wrapping_mul(typingctx: Any, a: Any, b: Any) -> Any:
    """a * b modulo 2^64; see `wrapping_add`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.mul(*args)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def count_leading_zeros(typingctx: Any, value: Any) -> Any:
    """Leading zero bits of a 64-bit value; 64 for zero."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.int64), codegen


@intrinsic(python=interpreted.view)
def view(typingctx: Any, address: Any, dtype: Any) -> Any:
    """The struct of layout `dtype` (a NumPy structured dtype) at `address`, its fields read and written by name.

    Plain memory access: for memory that one thread owns, or that the kernel has handed over. Memory that others write
    concurrently is read with the loads above.
    """
    record = getattr(dtype, "dtype", None)
    if not isinstance(record, types.Record):
        raise TypingError("view() needs a structured dtype")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(record))

    return record(types.int64, dtype), codegen


@intrinsic(python=interpreted.address_of)
def address_of(typingctx: Any, record: Any) -> Any:
    """The address of a struct obtained from `view`."""
    if not isinstance(record, types.Record):
        raise TypingError("address_of() needs a record")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(args[0], INT64)

    return types.int64(record), codegen


@intrinsic
def atomic_or8(typingctx: Any, address: Any, bits: Any) -> Any:
    """Atomically set bits of a byte that others change too."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.trunc(args[1], ir.IntType(8))
        builder.atomic_rmw("or", _pointer(builder, args[0], 8), bits, "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def external(name: str, builder: Any, result: Any, parameters: list[Any], var_arg: bool = False) -> Any:
    """A C library function, referenced by symbol, so that compiled code can be cached."""
    from numba.core import cgutils

    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, parameters, var_arg), name)


@intrinsic
def copy(typingctx: Any, target: Any, source: Any, size: Any) -> Any:
    """memmove(3): `size` bytes from `source` to `target`, which may overlap."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        memmove = external("memmove", builder, INT64, [INT64, INT64, INT64])
        builder.call(memmove, args)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
