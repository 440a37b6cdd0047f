"""What compiled code can use of Python, and what it cannot because that needs objects or exceptions."""

from __future__ import annotations

import ast
from types import BuiltinFunctionType, FunctionType

import numpy as np

from ringplane.compiler.sources import Callee

# The functions of Python that compiled code may call, and how many arguments they take. `range` only in a `for`.
MANY = 99
BUILTINS = {"min": (2, MANY), "max": (2, MANY), "abs": (1, 1), "int": (1, 1), "bool": (1, 1), "len": (1, 1)}
RANGE = (1, 3)

# What needs objects of Python, by the kind of the syntax tree.
OBJECTS = {
    ast.JoinedStr: "an f-string",
    ast.List: "a list",
    ast.Dict: "a dict",
    ast.Set: "a set",
    ast.ListComp: "a list comprehension",
    ast.SetComp: "a set comprehension",
    ast.DictComp: "a dict comprehension",
    ast.GeneratorExp: "a generator",
    ast.Lambda: "a lambda",
    ast.Yield: "yield",
    ast.YieldFrom: "yield",
    ast.Await: "await",
    ast.Starred: "*",
    ast.Slice: "a slice",
    ast.Try: "try",
    ast.TryStar: "try",
    ast.With: "with",
    ast.Raise: "raise",
    ast.Assert: "assert",
    ast.Delete: "del",
    ast.Match: "match",
    ast.Global: "global",
    ast.Nonlocal: "nonlocal",
    ast.Import: "import",
    ast.ImportFrom: "import",
    ast.FunctionDef: "a nested function",
    ast.AsyncFunctionDef: "a nested function",
    ast.ClassDef: "a class",
    ast.AsyncFor: "async for",
    ast.AsyncWith: "async with",
}
BIT_OPERATIONS = (ast.BitAnd, ast.BitOr, ast.BitXor, ast.LShift, ast.RShift)
ORDERINGS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def wrong_object(value: object) -> str:
    """Why a global name cannot be used as a number."""
    if isinstance(value, str | bytes):
        return "is a string, which compiled code cannot use"
    if isinstance(value, np.dtype):
        return "is the layout of a struct; view(address, layout) gives the struct"
    if isinstance(value, np.ndarray):
        return "is an array, which would be copied into the code; pass its address"
    if isinstance(value, Callee | FunctionType | BuiltinFunctionType | type):
        return "is a function or class, not a number"
    return f"is of type {type(value).__name__}, which compiled code cannot use"


def wrong_callee(value: object) -> str:
    """Why a global name cannot be called."""
    if isinstance(value, FunctionType):
        return "is not compiled (@compiled is missing)"
    return "is not a function that compiled code can call"
