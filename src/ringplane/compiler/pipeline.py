"""How Numba compiles the data plane: each function is translated into a *part*; LLVM optimises only the *whole*.

By default Numba compiles each function like a program: it optimises it together with all that it calls, makes machine
code and two wrappers, saves them, and does all of this again in each caller. For the 150 functions behind `run` this
took 17 s of CPU time, 10 of them in LLVM. A part is only translated to LLVM's language, once for all arguments of the
same types. A whole is a function that Python calls: only there the parts are linked and optimised: 6 s, 1.5 in LLVM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numba

from ringplane.compiler.numba_version import UnsupportedNumba

try:
    from llvmlite.binding import Linkage
    from numba.core import types
    from numba.core.codegen import JITCodeLibrary
    from numba.core.compiler import Compiler
    from numba.core.datamodel.models import OpaqueModel
    from numba.core.types.misc import unliteral
    from numba.extending import register_model
except ImportError as error:
    raise UnsupportedNumba(error) from None

# Division by zero gives NumPy's result instead of an exception. Rewrites are only for arrays, and take 0.3 s.
OPTIONS = {"error_model": "numpy", "no_cfunc_wrapper": True, "no_rewrites": True}


class _PartLibrary(JITCodeLibrary):  # type: ignore[misc]
    """The code of one function after its translation."""

    # Numba sets a function's environment in its machine code. There is none, and these functions need no environment.
    codegen = SimpleNamespace(set_env=lambda name, environment: None)

    def _optimize_functions(self, module: Any) -> None:
        pass

    def finalize(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0


class _WholeLibrary(JITCodeLibrary):  # type: ignore[misc]
    """The code of a function that Python calls, with all its parts."""

    def __init__(self, codegen: Any, name: str) -> None:
        super().__init__(codegen, name)
        self.enable_object_caching()

    def finalize(self) -> None:
        found: dict[Any, None] = {}
        _find_all(self._linking_libraries, found)
        self._linking_libraries: list[Any] = list(found)
        super().finalize()

    def _optimize_final_module(self) -> None:
        # Nothing else calls these functions, so LLVM may inline those with one caller whatever their size, and drop
        # checks of constant results. That makes the code a third smaller.
        for function in self._final_module.functions:
            if function.linkage == Linkage.linkonce_odr:
                function.linkage = Linkage.internal
        super()._optimize_final_module()


def _find_all(libraries: Iterable[Any], found: dict[Any, None]) -> None:
    """Add these libraries and those of all that they call to `found`, which keeps their order."""
    for library in libraries:
        if library not in found:
            found[library] = None
            if isinstance(library, _PartLibrary):
                _find_all(library._linking_libraries, found)


class _PartCompiler(Compiler):  # type: ignore[misc]
    def __init__(self, typing: Any, target: Any, library: None, *rest: Any) -> None:
        super().__init__(typing, target, _PartLibrary(target.codegen(), "part"), *rest)


class _WholeCompiler(Compiler):  # type: ignore[misc]
    def __init__(self, typing: Any, target: Any, library: None, *rest: Any) -> None:
        super().__init__(typing, target, _WholeLibrary(target.codegen(), "whole"), *rest)


class PartType(types.Dispatcher):
    """The type of a part in compiled code: calls with constants use the same code as other calls.

    Numba would compile it again for each constant, 27 times for `run`. LLVM uses the constants when it inlines.
    """

    def get_call_type(self, context: Any, args: Any, kws: Any) -> Any:
        return super().get_call_type(context, tuple(unliteral(each) for each in args), kws)


register_model(PartType)(OpaqueModel)


def part(function: Callable[..., Any]) -> Any:
    """The dispatcher of a function that only compiled code calls.

    The caller is a whole. Code compiled by Numba's own pipeline can call only parts that call no other parts.
    """
    return numba.njit(pipeline_class=_PartCompiler, no_cpython_wrapper=True, **OPTIONS)(function)


def whole(function: Callable[..., Any], *, cache: bool) -> Any:
    """The dispatcher of a function that Python calls; it runs without the GIL, and may call parts."""
    return numba.njit(pipeline_class=_WholeCompiler, nogil=True, cache=cache, **OPTIONS)(function)
