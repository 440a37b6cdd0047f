"""Numbers in network byte order. Addresses are multiples of the size, or of 4 for 64 bits."""

from __future__ import annotations

from typing import Any

from ringplane.compiler.intrinsics import intrinsic
from ringplane.compiler.jit import compiled
from ringplane.native.access import load16, load32


@intrinsic
def swap64(llvm: Any, value: Any) -> Any:
    """The bytes of 64 bits in reverse order."""
    return llvm.builder.bswap(value)


@compiled
def load16_be(address):
    return (swap64(load16(address)) >> 48) & 0xFFFF


@compiled
def load32_be(address):
    return (swap64(load32(address)) >> 32) & 0xFFFF_FFFF


@compiled
def load64_be(address):
    """2^63 and more are negative."""
    return load32_be(address) << 32 | load32_be(address + 4)
