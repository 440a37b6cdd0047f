"""How Numba compiles the data plane: each function is translated into a *part*; LLVM optimises only the *whole*.

By default Numba compiles each function like a program: it optimises it together with all that it calls, makes machine
code and two wrappers, saves them, and does all of this again in each caller. For the 150 functions behind `run` this
took 17 s of CPU time, 10 of them in LLVM. A part is only translated to LLVM's language, once for all arguments of the
same types. A whole is a function that is called from outside (jit.py), as units are (units.py): only there the texts
of the parts are put together, parsed and optimised. It becomes an object file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numba

from ringplane.compiler.arithmetic import with_defined_results
from ringplane.compiler.lean import LeanCompiler, LeanLower, LeanLowering, LeanTarget, LeanTyping, PartTarget
from ringplane.compiler.loader import SYMBOL
from ringplane.compiler.numba_version import UnsupportedNumba

try:
    from llvmlite import ir
    from llvmlite.binding import Linkage, parse_assembly
    from numba.core import types
    from numba.core.codegen import CodeLibrary, JITCodeLibrary
    from numba.core.compiler import Flags, compile_extra
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.compiler_machinery import register_pass
    from numba.core.datamodel.models import OpaqueModel
    from numba.core.errors import TypingError
    from numba.core.registry import cpu_target as numba_cpu
    from numba.core.types.misc import unliteral
    from numba.extending import register_model
except ImportError as error:
    raise UnsupportedNumba(error) from None

# Division by zero gives NumPy's result instead of an exception. Rewrites are only for arrays, and take 0.3 s.
OPTIONS = {"error_model": "numpy", "no_rewrites": True}


@functools.cache
def _shared_module(codegen: Any) -> Any:
    """All functions are translated here, so that one refers to another by name. It keeps their declarations."""
    return codegen._create_empty_module("ringplane")


class _PartLibrary(JITCodeLibrary):  # type: ignore[misc]
    """The code of one function after its translation."""

    # Numba sets a function's environment in its machine code. There is none, and these functions need no environment.
    codegen = SimpleNamespace(set_env=lambda name, environment: None)

    def __init__(self, codegen: Any) -> None:
        CodeLibrary.__init__(self, codegen, "part")
        self._linking_libraries: list[Any] = []
        self.texts: dict[str, str] = {}

    def create_ir_module(self, name: str) -> Any:
        return _shared_module(self._codegen)

    def add_ir_module(self, ir_module: Any) -> None:
        _take_functions(ir_module, self.texts)

    def finalize(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0


def _take_functions(module: Any, texts: dict[str, str]) -> None:
    """Move the function that was just translated out of the module; its declaration stays."""
    for function in module.functions:
        if function.blocks:
            texts[function.name] = str(function)
            function.blocks.clear()


class _WholeLibrary(JITCodeLibrary):  # type: ignore[misc]
    """The code of a whole, with all its parts."""

    # Whether its arithmetic has a defined result for all numbers.
    defined = False

    def __init__(self, codegen: Any, name: str) -> None:
        super().__init__(codegen, name)
        self.texts: dict[str, str] = {}

    def create_ir_module(self, name: str) -> Any:
        return _shared_module(self._codegen)

    def add_ir_module(self, ir_module: Any) -> None:
        if ir_module is _shared_module(self._codegen):
            _take_functions(ir_module, self.texts)
        else:
            super().add_ir_module(ir_module)

    def _optimize_functions(self, module: Any) -> None:
        """All is optimised at once, at the end."""

    def finalize(self) -> None:
        found: dict[Any, None] = {}
        _find_all(self._linking_libraries, found)
        parts = [library for library in found if isinstance(library, _PartLibrary)]
        self._linking_libraries: list[Any] = [library for library in found if not isinstance(library, _PartLibrary)]
        texts = functools.reduce(dict.__or__, (part.texts for part in parts), self.texts)
        self._final_module.link_in(parse_assembly(_join(_shared_module(self._codegen), texts)))
        super().finalize()

    def _optimize_final_module(self) -> None:
        if self.defined:
            self._final_module: Any = parse_assembly(with_defined_results(str(self._final_module)))
        # Nothing else calls these functions, so LLVM may inline those with one caller whatever their size, and drop
        # checks of constant results. That makes the code a third smaller.
        for function in self._final_module.functions:
            if function.name.startswith("cfunc."):
                function.name = SYMBOL
            elif not function.is_declaration:
                function.linkage = Linkage.internal
        # Once: Numba optimises before, for its reference counts.
        made = self._codegen._module_pass_manager()
        manager, *builder = made if isinstance(made, tuple) else (made,)
        manager.run(self._final_module, *builder)

    def _finalize_final_module(self) -> None:
        """Numba would load the code here."""
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True

    def object_code(self) -> bytes:
        self._ensure_finalized()
        code: bytes = self._codegen._tm.emit_object(self._final_module)
        return code


def _join(module: Any, texts: dict[str, str]) -> str:
    """LLVM's text of a module with these functions, and the declarations and metadata of `module`."""
    return "\n".join(
        [
            f'target triple = "{module.triple}"',
            f'target datalayout = "{module.data_layout}"',
            *(str(value) for name, value in module.globals.items() if name not in texts),
            *texts.values(),
            *module._get_metadata_lines(),
        ]
    )


def _find_all(libraries: Iterable[Any], found: dict[Any, None]) -> None:
    """Add these libraries and those of all that they call to `found`, which keeps their order."""
    for library in libraries:
        if library not in found:
            found[library] = None
            if isinstance(library, _PartLibrary):
                _find_all(library._linking_libraries, found)


@functools.cache
def _lean_contexts(typing: Any, target: Any) -> tuple[Any, Any, Any]:
    """The contexts for typing, for parts, and for wholes. They keep what they found out, for the next function."""
    lean = LeanTyping(typing)
    return lean, PartTarget(target, lean), LeanTarget(target, lean)


class _PartCompiler(LeanCompiler):
    def __init__(self, typing: Any, target: Any, library: None, *rest: Any) -> None:
        lean, part_target, _ = _lean_contexts(typing, target)
        super().__init__(lean, part_target, _PartLibrary(target.codegen()), *rest)


class _WholeLower(LeanLower):
    def create_cfunc_wrapper(self) -> None:
        """Like Numba's, but what it calls never raises: without a check that would take the GIL, it can be inlined."""
        module = self.library.create_ir_module("whole")
        int64 = self.context.get_value_type(types.int64)
        kind = ir.FunctionType(int64, [int64] * len(self.fndesc.argtypes))
        wrapper = ir.Function(module, kind, self.fndesc.llvm_cfunc_wrapper_name)
        builder = ir.IRBuilder(wrapper.append_basic_block("entry"))
        function = self.context.declare_function(module, self.fndesc)
        _, result = self.call_conv.call_function(
            builder, function, self.fndesc.restype, self.fndesc.argtypes, wrapper.args
        )
        builder.ret(self._as_int64(builder, result))
        self.library.add_ir_module(module)

    def _as_int64(self, builder: Any, result: Any) -> Any:
        kind = self.fndesc.restype
        if kind == types.none:
            return ir.Constant(self.context.get_value_type(types.int64), 0)
        if not isinstance(kind, types.Integer | types.Boolean):
            raise TypingError(f"only compiled code can call a function that returns {kind}", self.func_ir.loc)
        return self.context.cast(builder, result, kind, types.int64)


@register_pass(mutates_CFG=True, analysis_only=False)
class _WholeLowering(LeanLowering):
    _name = "ringplane_whole_lowering"
    lowering_class = _WholeLower


class _WholeCompiler(LeanCompiler):
    def __init__(self, typing: Any, target: Any, library: None, *rest: Any) -> None:
        target.refresh()
        lean, _, whole_target = _lean_contexts(typing, target)
        super().__init__(lean, whole_target, _WholeLibrary(target.codegen(), "whole"), *rest)

    def define_pipelines(self) -> list[Any]:
        (passes,) = super().define_pipelines()
        passes.passes = [
            (_WholeLowering, text) if each is LeanLowering else (each, text) for each, text in passes.passes
        ]
        return [passes]


def load_definitions() -> None:
    """Load Numba's definitions, which takes 0.2 s; otherwise the first compilation does it."""
    numba_cpu.typing_context.refresh()
    numba_cpu.target_context.refresh()


class PartType(types.Dispatcher):
    """The type of a part in compiled code: calls with constants use the same code as other calls.

    Numba would compile it again for each constant, 27 times for `run`. LLVM uses the constants when it inlines.
    """

    def get_call_type(self, context: Any, args: Any, kws: Any) -> Any:
        if not isinstance(context, LeanTyping):
            raise TypingError("only functions that are decorated with @compiled or @unit can call this one")
        args = tuple(unliteral(each) for each in args)
        if kws:
            return super().get_call_type(context, args, kws)
        dispatcher: Any = self.dispatcher
        if args not in dispatcher.overloads:
            dispatcher.compile(args)
        return dispatcher.overloads[args].signature


register_model(PartType)(OpaqueModel)


def part(function: Callable[..., Any]) -> Any:
    """The dispatcher of a function that only compiled code calls: a whole, a unit or another part."""
    return numba.njit(pipeline_class=_PartCompiler, no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)(function)


@global_compiler_lock
def compile_whole(function: Callable[..., Any], defined: bool = False) -> _WholeLibrary:
    """The code of a function of int64 that is called from outside, with that of its parts.

    `defined`: its arithmetic has a defined result for all numbers (arithmetic.py).
    """
    flags = Flags()
    numba_cpu.options.parse_as_flags(flags, OPTIONS)
    flags.no_cpython_wrapper = flags.no_compile = True
    flags.enable_pyobject = False
    typing, target = numba_cpu.typing_context, numba_cpu.target_context
    args = (types.int64,) * function.__code__.co_argcount
    made = compile_extra(typing, target, function, args, None, flags, {}, pipeline_class=_WholeCompiler)
    library: _WholeLibrary = made.library
    library.defined = defined
    library.finalize()
    return library
