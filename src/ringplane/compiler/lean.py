"""Numba's front end without what our code does not need: half of its time.

Compiled code here has no arrays, exceptions, closures, generators or reference counts. So most of Numba's passes find
nothing in it. The others are slow because they begin at the beginning for each function: which of Numba's 400
definitions of `+` is the one for two integers, how large a struct is, whether an extension was registered meanwhile.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from ringplane.compiler.calls import PREFIX, PlainCalls
from ringplane.compiler.numba_version import UnsupportedNumba

try:
    from numba.core.callconv import CPUCallConv
    from numba.core.cgutils import get_or_insert_function
    from numba.core.compiler import Compiler
    from numba.core.compiler_machinery import PassManager
    from numba.core.cpu import CPUContext
    from numba.core.typed_passes import NativeLowering, NoPythonBackend, NopythonTypeInference, PreLowerStripPhis
    from numba.core.types import Dispatcher
    from numba.core.typing import Context
    from numba.core.untyped_passes import FixupArgs, IRProcessing, ReconstructSSA, TranslateByteCode
except ImportError as error:
    raise UnsupportedNumba(error) from None

PASSES = (
    TranslateByteCode,
    FixupArgs,
    IRProcessing,
    ReconstructSSA,
    NopythonTypeInference,
    PreLowerStripPhis,
    NativeLowering,
    NoPythonBackend,
)


class LeanTyping(Context):  # type: ignore[misc]
    """Numba's typing context, which remembers its results."""

    def __init__(self, original: Any) -> None:
        # Shares all tables with the original.
        self.__dict__.update(original.__dict__)
        self._functions_resolved: dict[Any, Any] = {}
        self._attributes_resolved: dict[Any, Any] = {}
        self._layouts: dict[int, tuple[Any, Any]] = {}

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
        if not isinstance(value, np.dtype):
            return super().resolve_value_type(value)
        # With the value, so that its id is not used again.
        if id(value) not in self._layouts:
            self._layouts[id(value)] = value, super().resolve_value_type(value)
        return self._layouts[id(value)][1]


class LeanTarget(CPUContext):  # type: ignore[misc]
    """Numba's target context, with plain calls; it remembers the sizes of types."""

    def __init__(self, original: Any, typing: LeanTyping) -> None:
        self.__dict__.update(original.__dict__)
        self.typing_context = typing
        self._sizes: dict[str, int] = {}
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

    def refresh(self) -> None:
        """Only for what intrinsics register when they are typed."""
        for registry in list(self._registries):
            self.install_registry(registry)

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

    def declare_env_global(self, module: Any, envname: str) -> None:
        """No function has an environment: only exceptions and Python objects need one."""


class LeanCompiler(Compiler):  # type: ignore[misc]
    def define_pipelines(self) -> list[Any]:
        manager = PassManager("lean")
        for each in PASSES:
            manager.add_pass(each, each.__name__)
        manager.finalize()
        return [manager]
