"""Numba's front end without what our code does not need: half of its time.

Compiled code here has no arrays, exceptions, closures, generators or reference counts. So most of Numba's passes find
nothing in it. The others are slow because they begin at the beginning for each function: which of Numba's 400
definitions of `+` is the one for two integers, how large a struct is, whether an extension was registered meanwhile.
"""

from __future__ import annotations

import itertools
from typing import Any

from ringplane.compiler.calls import PREFIX, PlainCalls
from ringplane.compiler.numba_version import UnsupportedNumba

try:
    from numba.core.callconv import CPUCallConv
    from numba.core.cgutils import get_or_insert_function
    from numba.core.compiler import Compiler
    from numba.core.compiler_machinery import PassManager, register_pass
    from numba.core.compiler_machinery import _pass_registry as registry
    from numba.core.cpu import CPUContext
    from numba.core.errors import new_error_context  # type: ignore[attr-defined]
    from numba.core.interpreter import Interpreter
    from numba.core.ir import Assign, Const, FreeVar, Global
    from numba.core.lowering import Lower
    from numba.core.typed_passes import NativeLowering, NoPythonBackend, NopythonTypeInference
    from numba.core.types import Dispatcher, Function
    from numba.core.types.misc import unliteral
    from numba.core.typing import Context
    from numba.core.untyped_passes import FixupArgs, TranslateByteCode
except ImportError as error:
    raise UnsupportedNumba(error) from None


class LeanTyping(Context):  # type: ignore[misc]
    """Numba's typing context, which remembers its results."""

    def __init__(self, original: Any) -> None:
        # Shares all tables with the original.
        self.__dict__.update(original.__dict__)
        self._functions_resolved: dict[Any, Any] = {}
        self._attributes_resolved: dict[Any, Any] = {}
        self._values: dict[int, tuple[Any, Any]] = {}

    def refresh(self) -> None:
        """Not needed for each function: the original was refreshed for the whole."""

    def resolve_function_type(self, func: Any, args: Any, kws: Any) -> Any:
        key = func, args
        if kws or isinstance(func, (Dispatcher, str)):
            return super().resolve_function_type(func, args, kws)
        if key not in self._functions_resolved:
            self._functions_resolved[key] = super().resolve_function_type(func, args, kws)
        return self._functions_resolved[key]

    def resolve_getattr(self, typ: Any, attr: str) -> Any:
        key = typ, attr
        if key not in self._attributes_resolved:
            self._attributes_resolved[key] = super().resolve_getattr(typ, attr)
        return self._attributes_resolved[key]

    def resolve_value_type(self, value: Any) -> Any:
        # With the value, so that its id is not used again.
        if id(value) not in self._values:
            self._values[id(value)] = value, _remembering(super().resolve_value_type(value))
        return self._values[id(value)][1]


def _remembering(kind: Any) -> Any:
    """The type of a value. That of a function of Numba's remembers which of its definitions is for which arguments."""
    if isinstance(kind, Function) and "get_call_type" not in vars(kind):
        find = kind.get_call_type
        found: dict[Any, Any] = {}

        def get_call_type(context: Any, args: Any, kws: Any) -> Any:
            if kws:
                return find(context, args, kws)
            if args not in found:
                found[args] = find(context, args, kws)
            return found[args]

        kind.__dict__["get_call_type"] = get_call_type
    return kind


class LeanTarget(CPUContext):  # type: ignore[misc]
    """Numba's target context, with plain calls; it remembers the sizes of types."""

    def __init__(self, original: Any, typing: LeanTyping) -> None:
        self.__dict__.update(original.__dict__)
        self.typing_context = typing
        self._sizes: dict[str, int] = {}
        self._functions: dict[Any, Any] = {}
        self._loads: dict[Any, Any] = {}
        self._stores: dict[Any, Any] = {}
        # Helper functions of Numba's, which are compiled for this context.
        self.cached_internal_func: dict[Any, Any] = {}

    @property
    def call_conv(self) -> PlainCalls:
        return PlainCalls(self)

    def mangler(self, name: str, types: Any, *, abi_tags: Any = (), uid: Any = None) -> str:
        return PREFIX + str(super().mangler(name, types, abi_tags=abi_tags, uid=uid)).removeprefix("_ZN")

    def declare_function(self, module: Any, fndesc: Any) -> Any:
        """A function of Numba's library (min, max) that was compiled with its own convention, or one of ours."""
        if fndesc.mangled_name.startswith(PREFIX):
            return super().declare_function(module, fndesc)
        signature = CPUCallConv(self).get_function_type(fndesc.restype, fndesc.argtypes)
        return get_or_insert_function(module, signature, fndesc.mangled_name)

    def declare_env_global(self, module: Any, envname: str) -> None:
        """No function has an environment: only exceptions and Python objects need one."""

    def refresh(self) -> None:
        """Only for what intrinsics register when they are typed."""
        for registry in list(self._registries):
            self.install_registry(registry)

    def get_function(self, fn: Any, sig: Any, _firstcall: bool = True) -> Any:
        key = fn, sig
        if key not in self._functions:
            self._functions[key] = super().get_function(fn, sig, _firstcall)
        return self._functions[key]

    def get_getattr(self, typ: Any, attr: str) -> Any:
        key = typ, attr
        if key not in self._loads:
            self._loads[key] = super().get_getattr(typ, attr)
        return self._loads[key]

    def get_setattr(self, attr: str, sig: Any) -> Any:
        key = attr, sig
        if key not in self._stores:
            self._stores[key] = super().get_setattr(attr, sig)
        return self._stores[key]

    def get_constant_generic(self, builder: Any, ty: Any, val: Any) -> Any:
        return super().get_constant_generic(builder, unliteral(ty), val)

    def cast(self, builder: Any, val: Any, fromty: Any, toty: Any) -> Any:
        return super().cast(builder, val, unliteral(fromty), unliteral(toty))

    def get_abi_sizeof(self, ty: Any) -> int:
        name = str(ty)
        if name not in self._sizes:
            self._sizes[name] = super().get_abi_sizeof(ty)
        return self._sizes[name]


class PartTarget(LeanTarget):
    """For functions that are not seen outside of the code that they become part of."""

    _numbers = itertools.count()

    def mangler(self, name: str, types: Any, *, abi_tags: Any = (), uid: Any = None) -> str:
        symbol = f"{name.rpartition('.')[2]}.{next(self._numbers)}"
        return f"{PREFIX}{len(symbol)}{symbol}E"


class _LeanInterpreter(Interpreter):  # type: ignore[misc]
    def post_process(self, peepholes: Any, func_ir: Any) -> Any:
        """Numba's rewrites of `with`, `try`, long lists of arguments and dictionaries are not needed."""
        return func_ir


@register_pass(mutates_CFG=True, analysis_only=False)
class LeanTranslation(TranslateByteCode):  # type: ignore[misc]
    _name = "ringplane_translation"

    def run_pass(self, state: Any) -> bool:
        state.func_ir = _LeanInterpreter(state.func_id).interpret(state.bc)
        _forget_values(state.func_ir)
        return True


def _forget_values(func_ir: Any) -> None:
    """The type of a number shall not contain its value: a variable can have several, and each type takes time."""
    for block in func_ir.blocks.values():
        for assignment in block.find_insts(Assign):
            value = assignment.value
            if isinstance(value, (Const, FreeVar, Global)) and isinstance(value.value, int):
                assignment.value = Const(value.value, value.loc, use_literal_type=False)


class LeanLower(Lower):  # type: ignore[misc]
    def lower_block(self, block: Any) -> None:
        """Like Numba's, which prepares an error message for each statement."""
        self.pre_block(block)
        for inst in block.body:
            self.loc = inst.loc
            try:
                self.lower_inst(inst)
            except Exception:
                with new_error_context('lowering "{inst}" at {loc}', inst=inst, loc=self.loc):
                    raise
        self.post_block(block)


@register_pass(mutates_CFG=True, analysis_only=False)
class LeanLowering(NativeLowering):  # type: ignore[misc]
    _name = "ringplane_lowering"
    lowering_class = LeanLower


# A variable has one type, whatever is assigned to it: LLVM, not Numba, finds out which of its values is used where.
PASSES = (LeanTranslation, FixupArgs, NopythonTypeInference, LeanLowering, NoPythonBackend)


class LeanPasses(PassManager):  # type: ignore[misc]
    def run(self, state: Any) -> None:
        """Numba's own takes times, reports events, and looks for what a pass may have left behind."""
        for each, _ in self.passes:
            registry.get(each).pass_inst.run_pass(state)


class LeanCompiler(Compiler):  # type: ignore[misc]
    def define_pipelines(self) -> list[Any]:
        manager = LeanPasses("lean")
        for each in PASSES:
            manager.add_pass(each, each.__name__)
        manager.finalize()
        return [manager]
