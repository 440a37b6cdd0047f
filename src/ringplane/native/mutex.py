"""A mutex between threads of compiled code (pthread_mutex_lock(3)), which may be held while its owner blocks."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from ringplane.compiler.interpreted import intrinsic
from ringplane.native.access import INT64, external

# pthread_mutex_t has 40 bytes on x86-64, 48 on aarch64; all zeros is an unlocked mutex (PTHREAD_MUTEX_INITIALIZER).
MUTEX_SIZE = 48


def _make(name: str) -> Any:
    @intrinsic
    def function(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            callee = external(name, builder, ir.IntType(32), [INT64])
            return builder.sext(builder.call(callee, args), INT64)

        return types.int64(types.int64), codegen

    return function


lock = _make("pthread_mutex_lock")
unlock = _make("pthread_mutex_unlock")
