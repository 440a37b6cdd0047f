"""How one compiled function calls another: arguments and result are passed as C passes them, and nothing is raised.

Numba's own calling convention returns a status, which every caller checks, and stores the result through a pointer.
That is two thirds of the code that LLVM would have to remove again.
"""

from __future__ import annotations

from typing import Any

from ringplane.compiler.numba_version import UnsupportedNumba

try:
    from llvmlite import ir
    from numba.core.callconv import BaseCallConv, CPUCallConv, Status
    from numba.core.errors import UnsupportedError
except ImportError as error:
    raise UnsupportedNumba(error) from None

# The names of functions that use this convention begin with it.
PREFIX = "_ZN2rp"

YES, NO = (ir.Constant(ir.IntType(1), value) for value in (1, 0))
DONE = Status(
    code=ir.Constant(ir.IntType(32), 0),
    is_ok=YES,
    is_none=NO,
    is_error=NO,
    is_stop_iteration=NO,
    is_python_exc=NO,
    is_user_exc=NO,
    excinfoptr=None,
)


class PlainCalls(BaseCallConv):  # type: ignore[misc]
    def _make_call_helper(self, builder: Any) -> None:
        return None

    def get_function_type(self, restype: Any, argtypes: Any) -> Any:
        result = self.context.data_model_manager[restype].get_return_type()
        return ir.FunctionType(result, list(self._get_arg_packer(argtypes).argument_types))

    def decorate_function(self, fn: Any, args: Any, fe_argtypes: Any, noalias: bool = False) -> None:
        self._get_arg_packer(fe_argtypes).assign_names(fn.args, args)

    def get_arguments(self, func: Any) -> Any:
        return func.args

    def call_function(
        self, builder: Any, callee: Any, resty: Any, argtys: Any, args: Any, attrs: Any = None
    ) -> tuple[Any, Any]:
        if not callee.name.startswith(PREFIX):
            return CPUCallConv(self.context).call_function(builder, callee, resty, argtys, args, attrs)  # type: ignore[no-any-return]
        values = self._get_arg_packer(argtys).as_arguments(builder, args)
        result = builder.call(callee, list(values), attrs=attrs or ())
        return DONE, self.context.get_returned_value(builder, resty, result)

    def return_value(self, builder: Any, retval: Any) -> None:
        builder.ret(retval)

    def return_optional_value(self, builder: Any, retty: Any, valty: Any, value: Any) -> None:
        raise UnsupportedError("one path of this function returns a value and another one returns nothing")

    def return_user_exc(self, builder: Any, *args: Any, **options: Any) -> None:
        """What would be an exception of Numba's own library code ends the function."""
        self._end(builder)

    def set_static_user_exc(self, builder: Any, *args: Any, **options: Any) -> None:
        """See `return_user_exc`."""

    def return_status_propagate(self, builder: Any, status: Any) -> None:
        self._end(builder)

    def raise_error(self, builder: Any, pyapi: Any, status: Any) -> None:
        """For Numba's wrapper: nothing is raised."""

    def _end(self, builder: Any) -> None:
        result = builder.function.function_type.return_type
        builder.ret(ir.Constant(result, None))
