"""Memory of the process's heap, for what is rare and of any size. Whoever allocates it frees it."""

from __future__ import annotations

from typing import Any

from ringplane.compiler.intrinsics import intrinsic


@intrinsic
def allocate(llvm: Any, alignment: Any, size: Any) -> Any:
    """aligned_alloc(3): the address of `size` bytes, a multiple of `alignment`; 0 if there is no memory."""
    return llvm.call("aligned_alloc", [alignment, size])


@intrinsic
def free(llvm: Any, address: Any) -> None:
    """free(3)"""
    llvm.call("free", [address], bits=0)
