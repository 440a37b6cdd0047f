"""A mutex between threads of compiled code (pthread_mutex_lock(3)), which may be held while its owner blocks."""

from __future__ import annotations

from typing import Any

from ringplane.compiler.intrinsics import intrinsic

# pthread_mutex_t has 40 bytes on x86-64, 48 on aarch64; all zeros is an unlocked mutex (PTHREAD_MUTEX_INITIALIZER).
MUTEX_SIZE = 48


def _make(name: str) -> Any:
    @intrinsic
    def function(llvm: Any, address: Any) -> Any:
        return llvm.call(name, [address], bits=32)

    return function


lock = _make("pthread_mutex_lock")
unlock = _make("pthread_mutex_unlock")
