"""One compiled function: its statements and expressions are followed along all paths, and what is wrong is reported.

`Program` is what a function is judged by: what its parameters can be, and what the functions return that it calls.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import Any, Protocol

import numpy as np

from ringplane.compiler.shapes import (
    ANY,
    FLOAT,
    NOTHING,
    NUMBER,
    UNKNOWN,
    Element,
    Kind,
    Several,
    Shape,
    Struct,
    describe,
    did_you_mean,
    join,
)
from ringplane.compiler.sources import Callee, Compiled, Intrinsic, Module, Opaque

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

ACCESS = "ringplane.native.access"


class Program(Protocol):
    """What is known of all compiled functions."""

    def parameter(self, function: Compiled, name: str) -> Shape: ...

    def returned(self, caller: Compiled, function: Compiled) -> Shape: ...

    def call(self, caller: Compiled, node: ast.Call, function: Compiled, arguments: list[Shape]) -> None:
        """The function is called with these arguments."""

    def assigned(self, name: str, shape: Shape) -> None:
        """This is assigned to a variable of this name."""

    def is_field(self, function: Compiled, name: str) -> bool:
        """Whether any struct that the function may know has such a field."""

    def unit_arguments(self, name: str) -> set[int]:
        """How many arguments the units of this name take."""

    def wrong_struct(self, function: Compiled, name: str, wrong: Element, field: str) -> bool:
        """The parameter `name` is `wrong`, without this field; whether the call that passes it was reported.

        Without a field, a number is needed.
        """

    def report(self, function: Compiled, line: int, text: str) -> None: ...


@dataclass
class Paths:
    """The variables where some paths meet. `unsure`: those that are not assigned on all of them."""

    shapes: dict[str, Shape] = field(default_factory=dict)
    unsure: frozenset[str] = frozenset()

    def copy(self) -> Paths:
        return Paths(dict(self.shapes), self.unsure)


def meet(paths: Iterable[Paths | None]) -> Paths | None:
    """The variables after one of these paths; None: no path leads here."""
    real = [each for each in paths if each is not None]
    if len(real) < 2:
        return real[0] if real else None
    names = set().union(*(each.shapes for each in real))
    shapes = {name: join(each.shapes.get(name, UNKNOWN) for each in real) for name in names}
    missing = {name for name in names for each in real if name not in each.shapes}
    return Paths(shapes, frozenset(missing).union(*(each.unsure for each in real)))


class Flow:
    """Follows the paths of one function. `returned`: what it can return."""

    def __init__(self, program: Program, function: Compiled) -> None:
        self.program, self.function = program, function
        self.names = function.source.names
        self.returned: Shape = UNKNOWN
        self._value_line = 0
        self._ends: list[tuple[int, str]] = []
        self._breaks: list[list[Paths | None]] = []
        self._continues: list[list[Paths | None]] = []
        self._locals = function.variables
        self._now = Paths()

    def run(self) -> None:
        for name in self.function.parameters:
            self._now.shapes[name] = self.program.parameter(self.function, name)
        body = self.function.node.body
        if self._block(body, self._now) is not None:
            self._ends.append((body[-1].lineno, "ends after this"))
        if self._value_line:
            for line, what in self._ends:
                self._say(
                    line, f"{self.function.name}() {what} without a value, but returns one in line {self._value_line}"
                )
        elif self._ends:
            self.returned = NOTHING
            if self.function.unit:
                self._say(self._ends[0][0], f"{self.function.name}() is a unit, so it must return a number")

    def _say(self, place: int | ast.AST, text: str) -> None:
        line = place if isinstance(place, int) else place.lineno  # type: ignore[attr-defined]
        self.program.report(self.function, line, text)

    # Statements.

    def _block(self, body: list[ast.stmt], paths: Paths | None) -> Paths | None:
        for statement in body:
            if paths is None:
                return None
            paths = self._statement(statement, paths)
        return paths

    def _statement(self, statement: ast.stmt, paths: Paths) -> Paths | None:
        self._now = paths
        method: Callable[[Any], Paths | None] | None = getattr(self, f"_do_{type(statement).__name__.lower()}", None)
        if method is not None:
            return method(statement)
        what = OBJECTS.get(type(statement), type(statement).__name__)
        self._say(statement, f"{what} is not possible in compiled code, which has no Python objects and no exceptions")
        return paths

    def _do_pass(self, statement: ast.Pass) -> Paths:
        return self._now

    def _do_expr(self, statement: ast.Expr) -> Paths:
        if isinstance(statement.value, ast.Call):
            self._call(statement.value)
        elif not _is_docstring(statement, self.function.node):
            self._value(statement.value)
            self._say(statement, f"`{_text(statement.value)}` has no effect")
        return self._now

    def _do_assign(self, statement: ast.Assign) -> Paths:
        shape = self._value(statement.value)
        for target in statement.targets:
            self._assign(target, shape, statement.value)
        return self._now

    def _do_annassign(self, statement: ast.AnnAssign) -> Paths:
        if statement.value is not None:
            self._assign(statement.target, self._value(statement.value), statement.value)
        return self._now

    def _do_augassign(self, statement: ast.AugAssign) -> Paths:
        read = _loaded(statement.target)
        shape = self._operate(statement, statement.op, read, statement.value)
        self._assign(statement.target, shape, statement.value)
        return self._now

    def _assign(self, target: ast.expr, shape: Shape, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self._assign_name(target.id, shape)
        elif isinstance(target, ast.Tuple):
            self._unpack(target, shape, value)
        elif isinstance(target, ast.Attribute):
            self._field(target)
            self._store(target, shape, value)
        elif isinstance(target, ast.Subscript):
            self._subscript(target)
            self._store(target, shape, value)
        else:
            self._value(target)

    def _assign_name(self, name: str, shape: Shape) -> None:
        self._now.shapes[name] = shape
        self._now.unsure -= {name}
        self.program.assigned(name, shape)

    def _store(self, target: ast.expr, shape: Shape, value: ast.expr) -> None:
        self._number(value, shape)
        if Kind.FLOAT in shape:
            self._say(target, f"a float is stored in `{_text(target)}`, which is an integer; convert it with int()")

    def _unpack(self, target: ast.Tuple, shape: Shape, value: ast.expr) -> None:
        count = len(target.elts)
        for each in shape:
            if isinstance(each, Several) and len(each.items) != count:
                self._say(target, f"{describe(each)} is assigned to {count} variables")
            elif isinstance(each, Kind | Struct) and each is not Kind.ANY:
                self._say(target, f"`{_text(value)}` is {describe(each)}, not a tuple")
        tuples = [each.items for each in shape if isinstance(each, Several) and len(each.items) == count]
        parts = value.elts if isinstance(value, ast.Tuple) and len(value.elts) == count else [value] * count
        for index, (part, source) in enumerate(zip(target.elts, parts, strict=True)):
            self._assign(part, join(items[index] for items in tuples) if tuples else _any_or_unknown(shape), source)

    def _do_return(self, statement: ast.Return) -> None:
        if statement.value is None or (isinstance(statement.value, ast.Constant) and statement.value.value is None):
            self._ends.append((statement.lineno, "returns here"))
        else:
            self.returned = join([self.returned, self._value(statement.value)])
            self._value_line = self._value_line or statement.lineno

    def _do_if(self, statement: ast.If) -> Paths | None:
        self._condition(statement.test)
        before = self._now
        return meet([self._block(statement.body, before.copy()), self._block(statement.orelse, before.copy())])

    def _do_while(self, statement: ast.While) -> Paths | None:
        forever = isinstance(statement.test, ast.Constant) and bool(statement.test.value)
        return self._loop(statement, lambda: self._condition(statement.test), forever)

    def _do_for(self, statement: ast.For) -> Paths | None:
        self._range(statement.iter)
        return self._loop(statement, lambda: self._assign(statement.target, NUMBER, statement.iter), False)

    def _loop(self, statement: ast.While | ast.For, begin: Callable[[], object], forever: bool) -> Paths | None:
        """Follow the body until it adds nothing to what the variables can be."""
        top: Paths | None = self._now
        while True:
            assert top is not None
            self._breaks.append([])
            self._continues.append([])
            self._now = top.copy()
            begin()
            end = self._block(statement.body, self._now)
            breaks, again = self._breaks.pop(), meet([top, end, *self._continues.pop()])
            if again == top:
                break
            top = again
        self._now = top.copy()
        if isinstance(statement, ast.While):
            begin()
        after = None if forever else self._block(statement.orelse, self._now)
        return meet([after, *breaks])

    def _do_break(self, statement: ast.Break) -> None:
        self._breaks[-1].append(self._now)

    def _do_continue(self, statement: ast.Continue) -> None:
        self._continues[-1].append(self._now)

    def _range(self, node: ast.expr) -> None:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
            self._arity(node, "range", *RANGE)
            for argument in node.args:
                self._integer(argument)
        else:
            self._say(node, f"a `for` is only possible with range(), not with `{_text(node)}`")

    # Expressions.

    def _value(self, node: ast.expr) -> Shape:
        """What the expression can be, which must be something."""
        shape = self._evaluate(node)
        if Kind.NOTHING in shape:
            self._say(node, f"`{_text(node)}` returns nothing, but its value is used")
            return ANY
        return shape

    def _evaluate(self, node: ast.expr) -> Shape:
        method: Callable[[Any], Shape] | None = getattr(self, f"_{type(node).__name__.lower()}", None)
        if method is not None:
            return method(node)
        what = OBJECTS.get(type(node), type(node).__name__)
        self._say(node, f"{what} is not possible in compiled code, which has no Python objects")
        return ANY

    def _number(self, node: ast.expr, shape: Shape) -> Shape:
        """The expression with this shape is used as a number."""
        for each in shape:
            if isinstance(each, Struct):
                if not self._wrong_parameter(node, each):
                    self._say(
                        node, f"`{_text(node)}` is {describe(each)}, not a number (address_of() gives its address)"
                    )
            elif isinstance(each, Several) or each is Kind.ARRAY:
                self._say(node, f"`{_text(node)}` is {describe(each)}, not a number")
        return FLOAT if Kind.FLOAT in shape else NUMBER

    def _operand(self, node: ast.expr) -> Shape:
        return self._number(node, self._value(node))

    def _integer(self, node: ast.expr) -> None:
        if Kind.FLOAT in self._operand(node):
            self._say(node, f"`{_text(node)}` is a float; an integer is needed")

    def _condition(self, node: ast.expr) -> None:
        self._operand(node)

    def _constant(self, node: ast.Constant) -> Shape:
        return self._literal(node, node.value, repr(node.value))

    def _literal(self, node: ast.AST, value: object, text: str) -> Shape:
        """A constant, in the code or with a name."""
        if isinstance(value, bool | int | np.integer):
            if not -(1 << 63) <= int(value) < 1 << 63:
                self._say(node, f"{text} does not fit into an int64")
            return NUMBER
        if isinstance(value, float):
            return FLOAT
        if isinstance(value, tuple):
            return frozenset({Several(tuple(self._literal(node, each, text) for each in value))})
        if not isinstance(value, Opaque):
            self._say(node, f"{text} {_wrong_object(value)}")
        return ANY

    def _name(self, node: ast.Name) -> Shape:
        if node.id not in self._locals:
            return self._literal(node, self._global(node), node.id)
        if node.id not in self._now.shapes:
            self._say(node, f"{node.id} is used before it is assigned")
            return ANY
        if node.id in self._now.unsure:
            self._say(node, f"{node.id} is not assigned on every path that leads here")
        return self._now.shapes[node.id]

    def _global(self, node: ast.Name) -> Any:
        """What a global name stands for; Opaque after a mistake."""
        try:
            return self.names[node.id]
        except KeyError:
            known = [*self._locals, *self.function.source.definitions, *BUILTINS, "range"]
            self._say(node, f"unknown name {node.id}{did_you_mean(node.id, known)}")
        except Exception:
            # A constant that is computed with something that is not there, such as Numba.
            pass
        return Opaque(node.id)

    def _attribute(self, node: ast.Attribute) -> Shape:
        if self._is_global(node.value) and isinstance(found := self._object(node), Module | Opaque):
            return ANY
        if self._is_global(node.value):
            return self._literal(node, found, _text(node))
        return self._field(node)

    def _is_global(self, node: ast.expr) -> bool:
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id not in self._locals

    def _object(self, node: ast.expr) -> Any:
        """What a global name, or an attribute of a module, stands for."""
        if isinstance(node, ast.Name):
            return self._global(node)
        assert isinstance(node, ast.Attribute)
        owner = self._object(node.value)
        try:
            return getattr(owner, node.attr)
        except AttributeError:
            known = owner.source.definitions if isinstance(owner, Module) else dir(owner)
            self._say(node, f"{_text(node.value)} has no {node.attr}{did_you_mean(node.attr, known)}")
        except Exception:
            pass
        return Opaque(node.attr)

    def _field(self, node: ast.Attribute) -> Shape:
        shape = self._value(node.value)
        lacking = [each for each in shape if not self._has(each, node.attr)]
        for each in lacking:
            if not self._wrong_parameter(node.value, each, node.attr):
                self._say(node, self._no_field(node, each))
        if lacking:
            return ANY
        for each in shape:
            if isinstance(each, Struct) and each.is_unsigned_64(node.attr):
                self._say(
                    node, f"{each}.{node.attr} is unsigned, so an expression with an int64 becomes a float; use <i8"
                )
        return join(each.field(node.attr) if isinstance(each, Struct) else ANY for each in shape)

    def _wrong_parameter(self, node: ast.expr, wrong: Element, attribute: str = "") -> bool:
        """Whether the mistake is that of a caller, and was reported there."""
        if not isinstance(node, ast.Name) or node.id not in self.function.parameters:
            return False
        passed = wrong in self.program.parameter(self.function, node.id)
        return passed and self.program.wrong_struct(self.function, node.id, wrong, attribute)

    def _has(self, element: Element, name: str) -> bool:
        if isinstance(element, Struct):
            return name in element.fields
        return element is Kind.ANY and self.program.is_field(self.function, name)

    def _no_field(self, node: ast.Attribute, element: Element) -> str:
        if isinstance(element, Struct):
            return f"{element} has no field {node.attr}{did_you_mean(node.attr, element.fields)}"
        if element is Kind.ANY:
            return f"no struct has a field {node.attr}"
        return f"`{_text(node.value)}` is {describe(element)}, not a struct, so it has no field {node.attr}"

    def _subscript(self, node: ast.Subscript) -> Shape:
        shape = self._value(node.value)
        self._integer(node.slice)
        for each in shape:
            if isinstance(each, Struct) or each in (Kind.NUMBER, Kind.FLOAT):
                self._say(node, f"`{_text(node.value)}` is {describe(each)}, not an array")
        items = [each.items for each in shape if isinstance(each, Several)]
        return join(join(each) for each in items) if items else NUMBER

    def _tuple(self, node: ast.Tuple) -> Shape:
        return frozenset({Several(tuple(self._value(each) for each in node.elts))})

    def _namedexpr(self, node: ast.NamedExpr) -> Shape:
        shape = self._value(node.value)
        self._assign_name(node.target.id, shape)
        return shape

    def _ifexp(self, node: ast.IfExp) -> Shape:
        self._condition(node.test)
        return join([self._value(node.body), self._value(node.orelse)])

    def _boolop(self, node: ast.BoolOp) -> Shape:
        return join(self._operand(each) for each in node.values)

    def _compare(self, node: ast.Compare) -> Shape:
        if not all(isinstance(each, ORDERINGS) for each in node.ops):
            self._say(node, f"`{_text(node)}`: numbers are compared with == != < <= > >=")
            return NUMBER
        for each in (node.left, *node.comparators):
            self._operand(each)
        return NUMBER

    def _unaryop(self, node: ast.UnaryOp) -> Shape:
        shape = self._operand(node.operand)
        return NUMBER if isinstance(node.op, ast.Not) else shape

    def _binop(self, node: ast.BinOp) -> Shape:
        return self._operate(node, node.op, node.left, node.right)

    def _operate(self, node: ast.AST, operator: ast.operator, left: ast.expr, right: ast.expr) -> Shape:
        if isinstance(operator, BIT_OPERATIONS):
            self._integer(left)
            self._integer(right)
            return NUMBER
        shape = join([self._operand(left), self._operand(right)])
        if isinstance(operator, ast.Div):
            self._say(node, "/ gives a float; use //")
        return FLOAT if Kind.FLOAT in shape else NUMBER

    # Calls.

    def _call(self, node: ast.Call) -> Shape:
        if not self._is_global(node.func):
            for argument in node.args:
                self._value(argument)
            self._say(node, f"`{_text(node.func)}` is not a function that compiled code can call")
            return ANY
        if isinstance(node.func, ast.Name) and node.func.id not in self.function.source.definitions:
            return self._call_builtin(node, node.func)
        found = self._object(node.func)
        if isinstance(found, Intrinsic) and found.name in ("view", "address_of"):
            return self._view(node) if found.name == "view" else self._address_of(node)
        if isinstance(found, Callee):
            return self._call_function(node, found)
        for argument in node.args:
            self._value(argument)
        if not isinstance(found, Opaque):
            self._say(node, f"{_text(node.func)}() {_wrong_callee(found)}")
        return ANY

    def _call_builtin(self, node: ast.Call, name: ast.Name) -> Shape:
        if name.id in BUILTINS:
            self._arity(node, name.id, *BUILTINS[name.id])
        elif hasattr(builtins, name.id):
            self._say(node, f"{name.id}() is not possible in compiled code, which has no Python objects")
        else:
            self._global(name)
        shapes = [self._value(argument) for argument in node.args]
        if name.id in ("min", "max", "abs"):
            for argument, shape in zip(node.args, shapes, strict=True):
                self._number(argument, shape)
            return FLOAT if any(Kind.FLOAT in shape for shape in shapes) else NUMBER
        return NUMBER if name.id in BUILTINS else ANY

    def _call_function(self, node: ast.Call, function: Callee) -> Shape:
        arguments = [self._value(argument) for argument in node.args]
        most = MANY if function.variadic else len(function.parameters)
        fits = self._arity(node, _text(node.func), function.required, most)
        if isinstance(function, Intrinsic):
            for argument, shape in zip(node.args, arguments, strict=True):
                if Kind.FLOAT in self._number(argument, shape):
                    self._say(argument, f"`{_text(argument)}` is a float; {_text(node.func)}() needs an integer")
            if function.variadic and node.args:
                self._by_address(node, node.args[0])
            return NUMBER if function.returns else NOTHING
        assert isinstance(function, Compiled)
        if function.unit:
            self._say(node, f"{function.name}() is a unit: store its address(), and call that with call()")
            return NUMBER
        self.program.call(self.function, node, function, arguments if fits else [ANY] * len(function.parameters))
        return self.program.returned(self.function, function)

    def _by_address(self, node: ast.Call, address: ast.expr) -> None:
        """A call by address with too few arguments is not detected by anything else. Fields have the names of units."""
        if isinstance(address, ast.Attribute) and (counts := self.program.unit_arguments(address.attr)):
            count = len(node.args) - 1
            if count not in counts:
                wanted = " or ".join(map(str, sorted(counts)))
                self._say(node, f"the unit {address.attr} takes {_arguments(wanted)}, but gets {count}")

    def _arity(self, node: ast.Call, name: str, fewest: int, most: int) -> bool:
        """Whether the number of arguments is right."""
        count = len(node.args) + len(node.keywords)
        if node.keywords:
            self._say(node, f"{name}() gets {node.keywords[0].arg}= by name; pass it by position")
        elif not fewest <= count <= most:
            wanted = f"{fewest}" if fewest == most else f"{fewest} to {most}" if most < MANY else f"{fewest} or more"
            self._say(node, f"{name}() takes {_arguments(wanted)}, but gets {count}")
        return fewest <= count <= most and not node.keywords

    def _view(self, node: ast.Call) -> Shape:
        if not self._arity(node, "view", 2, 2):
            return ANY
        address, layout = node.args
        self._integer(address)
        if self._is_global(layout):
            found = self._object(layout)
            if isinstance(found, np.dtype) and found.names:
                return frozenset({Struct(_text(layout).rpartition(".")[2], found)})
            if isinstance(found, Opaque):
                return ANY
        self._say(node, f"`{_text(layout)}` is not the layout of a struct")
        return ANY

    def _address_of(self, node: ast.Call) -> Shape:
        if self._arity(node, "address_of", 1, 1):
            for each in self._value(node.args[0]):
                if isinstance(each, Kind | Several) and each is not Kind.ANY:
                    self._say(node, f"`{_text(node.args[0])}` is {describe(each)}, not a struct")
        return NUMBER


def _is_docstring(statement: ast.Expr, function: ast.FunctionDef) -> bool:
    return statement is function.body[0] and isinstance(statement.value, ast.Constant)


def _loaded(target: ast.Name | ast.Attribute | ast.Subscript) -> ast.expr:
    """The target of an assignment, as an expression that reads it."""
    if isinstance(target, ast.Name):
        return ast.copy_location(ast.Name(target.id, ast.Load()), target)
    return target


def _arguments(count: str) -> str:
    return f"{count} argument{'s' * (count != '1')}"


def _any_or_unknown(shape: Shape) -> Shape:
    return ANY if shape else UNKNOWN


def _text(node: ast.AST) -> str:
    return ast.unparse(node)


def _wrong_object(value: object) -> str:
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


def _wrong_callee(value: object) -> str:
    if isinstance(value, FunctionType):
        return "is not compiled (@compiled is missing)"
    return "is not a function that compiled code can call"
