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
    from llvmlite import ir
    from llvmlite.binding import Linkage
    from numba.core import types
    from numba.core.codegen import JITCodeLibrary
    from numba.core.compiler import Compiler
    from numba.core.compiler_machinery import register_pass
    from numba.core.datamodel.models import OpaqueModel
    from numba.core.lowering import Lower
    from numba.core.typed_passes import NativeLowering
    from numba.core.types.misc import unliteral
    from numba.extending import register_model
except ImportError as error:
    raise UnsupportedNumba(error) from None

# Division by zero gives NumPy's result instead of an exception. Rewrites are only for arrays, and take 0.3 s.
OPTIONS = {"error_model": "numpy", "no_rewrites": True}


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


class _UnitLower(Lower):  # type: ignore[misc]
    def create_cfunc_wrapper(self) -> None:
        """Like Numba's, but what it calls never raises: without a check that would take the GIL, it can be inlined."""
        module = self.context.create_module("unit")
        values = [self.context.get_value_type(each) for each in (self.fndesc.restype, *self.fndesc.argtypes)]
        wrapper = ir.Function(module, ir.FunctionType(values[0], values[1:]), self.fndesc.llvm_cfunc_wrapper_name)
        builder = ir.IRBuilder(wrapper.append_basic_block("entry"))
        function = self.context.declare_function(module, self.fndesc)
        _, result = self.call_conv.call_function(
            builder, function, self.fndesc.restype, self.fndesc.argtypes, wrapper.args
        )
        builder.ret(result)
        self.library.add_ir_module(module)


@register_pass(mutates_CFG=True, analysis_only=False)
class _UnitLowering(NativeLowering):  # type: ignore[misc]
    _name = "ringplane_unit_lowering"
    lowering_class = _UnitLower


class _UnitLibrary(_WholeLibrary):
    """The code of a unit: only its wrapper can be called."""

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if not function.is_declaration and not function.name.startswith("cfunc."):
                function.linkage = Linkage.internal
        super()._optimize_final_module()


class UnitCompiler(Compiler):  # type: ignore[misc]
    """Compiles a whole that C, and compiled code, can call by address."""

    def __init__(self, typing: Any, target: Any, library: None, *rest: Any) -> None:
        super().__init__(typing, target, _UnitLibrary(target.codegen(), "unit"), *rest)

    def define_pipelines(self) -> list[Any]:
        (passes,) = super().define_pipelines()
        passes.passes = [
            (_UnitLowering, text) if each is NativeLowering else (each, text) for each, text in passes.passes
        ]
        return [passes]


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
    return numba.njit(pipeline_class=_PartCompiler, no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)(function)


def whole(function: Callable[..., Any], *, cache: bool) -> Any:
    """The dispatcher of a function that Python calls; it runs without the GIL, and may call parts."""
    options = {"nogil": True, "no_cfunc_wrapper": True, **OPTIONS}
    return numba.njit(pipeline_class=_WholeCompiler, cache=cache, **options)(function)
