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

from ringplane.compiler import interpreted
from ringplane.compiler.intrinsics import intrinsic


def _make_load(bits: int, ordering: str, doc: str) -> Any:
    def load(llvm: Any, address: Any) -> Any:
        value = llvm.builder.load_atomic(llvm.pointer(address, bits), ordering, align=bits // 8)
        return llvm.extended(value)

    load.__doc__ = doc
    return intrinsic(load)


def _make_store(bits: int, ordering: str, doc: str) -> Any:
    def store(llvm: Any, address: Any, value: Any) -> None:
        llvm.builder.store_atomic(llvm.narrow(value, bits), llvm.pointer(address, bits), ordering, align=bits // 8)

    store.__doc__ = doc
    return intrinsic(store)


load8 = _make_load(8, "monotonic", "Relaxed load of 8 bits.")
load16 = _make_load(16, "monotonic", "Relaxed load of 16 bits from an aligned address.")
load32 = _make_load(32, "monotonic", "Relaxed load of 32 bits from an aligned address.")
load64 = _make_load(64, "monotonic", "Relaxed load of 64 bits from an aligned address.")
load16_acquire = _make_load(16, "acquire", "Acquire load of 16 bits from an aligned address.")
load32_acquire = _make_load(32, "acquire", "Acquire load of 32 bits from an aligned address.")
load64_acquire = _make_load(64, "acquire", "Acquire load of 64 bits from an aligned address.")
store8 = _make_store(8, "monotonic", "Relaxed store of 8 bits.")
store16 = _make_store(16, "monotonic", "Relaxed store of 16 bits to an aligned address.")
store32 = _make_store(32, "monotonic", "Relaxed store of 32 bits to an aligned address.")
store64 = _make_store(64, "monotonic", "Relaxed store of 64 bits to an aligned address.")
store16_release = _make_store(16, "release", "Release store of 16 bits to an aligned address.")
store64_release = _make_store(64, "release", "Release store of 64 bits to an aligned address.")
store32_release = _make_store(32, "release", "Release store of 32 bits to an aligned address.")


@intrinsic
def fence(llvm: Any) -> None:
    """A sequentially consistent fence: nothing before it moves behind it, nothing behind it moves before it."""
    llvm.builder.fence("seq_cst")


@intrinsic
def relax(llvm: Any) -> None:
    """A hint to the processor that this loop waits for a store by another thread."""
    if platform.machine() == "x86_64":
        llvm.call("llvm.x86.sse2.pause", [], bits=0)
    else:
        llvm.call("llvm.aarch64.hint", [llvm.number(1, bits=32)], bits=0)  # YIELD


@intrinsic
def prefetch(llvm: Any, address: Any) -> None:
    """Begin to load the cache line and the page table entry of an address, which need not be valid."""
    how = [llvm.number(value, bits=32) for value in (0, 3, 1)]
    llvm.call("llvm.prefetch.p0i8", [llvm.pointer(address, 8), *how], bits=0)


@intrinsic
def wrapping_add(llvm: Any, a: Any, b: Any) -> Any:
    """a + b modulo 2^64. Numba's own + - * promise LLVM not to overflow: an overflow there is undefined behaviour."""
    return llvm.builder.add(a, b)


@intrinsic
def wrapping_mul(llvm: Any, a: Any, b: Any) -> Any:
    """a * b modulo 2^64; see `wrapping_add`."""
    return llvm.builder.mul(a, b)


@intrinsic
def count_leading_zeros(llvm: Any, value: Any) -> Any:
    """Leading zero bits of a 64-bit value; 64 for zero."""
    return llvm.builder.ctlz(value, llvm.number(0, bits=1))


@intrinsic(python=interpreted.view)
def view(typingctx: Any, address: Any, dtype: Any) -> Any:
    """The struct of layout `dtype` (a NumPy structured dtype) at `address`, its fields read and written by name.

    Plain memory access: for memory that one thread owns, or that the kernel has handed over. Memory that others write
    concurrently is read with the loads above.
    """
    from numba.core import errors, types

    record = getattr(dtype, "dtype", None)
    if not isinstance(record, types.Record):
        raise errors.TypingError("view() needs a structured dtype")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(record))

    return record(types.int64, dtype), codegen


@intrinsic(python=interpreted.address_of)
def address_of(typingctx: Any, record: Any) -> Any:
    """The address of a struct obtained from `view`."""
    from numba.core import errors, types

    if not isinstance(record, types.Record):
        raise errors.TypingError("address_of() needs a record")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(args[0], context.get_value_type(types.int64))

    return types.int64(record), codegen


@intrinsic
def atomic_or8(llvm: Any, address: Any, bits: Any) -> None:
    """Atomically set bits of a byte that others change too."""
    llvm.builder.atomic_rmw("or", llvm.pointer(address, 8), llvm.narrow(bits, 8), "seq_cst")


@intrinsic
def atomic_add(llvm: Any, address: Any, value: Any) -> None:
    """Atomically add to 64 bits that others change too."""
    llvm.builder.atomic_rmw("add", llvm.pointer(address, 64), value, "seq_cst")


@intrinsic
def compare_and_swap(llvm: Any, address: Any, expected: Any, value: Any) -> Any:
    """Atomically store 64 bits if `expected` is there; returns what was there before."""
    result = llvm.builder.cmpxchg(llvm.pointer(address, 64), expected, value, "seq_cst", "seq_cst")
    return llvm.builder.extract_value(result, 0)


@intrinsic
def copy(llvm: Any, target: Any, source: Any, size: Any) -> None:
    """memmove(3): `size` bytes from `source` to `target`, which may overlap."""
    llvm.call("memmove", [target, source, size])


@intrinsic
def clear(llvm: Any, address: Any, size: Any) -> None:
    """memset(3): fill `size` bytes with zeros."""
    llvm.call("memset", [address, llvm.number(0, bits=32), size])
