"""The expressions of a compiled function: what each can be, and what is wrong with it."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ringplane.compiler.dialect import (
    BIT_OPERATIONS,
    BUILTINS,
    MANY,
    OBJECTS,
    ORDERINGS,
    wrong_callee,
    wrong_object,
)
from ringplane.compiler.shapes import (
    ANY,
    FLOAT,
    NOTHING,
    NUMBER,
    Element,
    Kind,
    Paths,
    Several,
    Shape,
    Struct,
    describe,
    did_you_mean,
    join,
)
from ringplane.compiler.sources import Callee, Compiled, Intrinsic, Module, Opaque


class Program(Protocol):
    """What is known of all compiled functions."""

    def parameter(self, function: Compiled, name: str) -> Shape: ...
    def is_recursive(self, caller: Compiled, function: Compiled) -> bool: ...

    def returned(self, caller: Compiled, function: Compiled) -> Shape: ...

    def call(self, caller: Compiled, node: ast.Call, function: Compiled, arguments: list[Shape]) -> None:
        """The function is called with these arguments."""

    def assigned(self, name: str, shape: Shape) -> None:
        """This is assigned to a variable of this name."""

    def is_field(self, name: str) -> bool:
        """Whether any struct has such a field."""

    def unit_arguments(self, name: str) -> set[int]:
        """How many arguments the units of this name take."""

    def wrong_struct(self, function: Compiled, name: str, wrong: Element, field: str) -> bool:
        """The parameter `name` is `wrong`, without this field; whether the call that passes it was reported.

        Without a field, a number is needed.
        """

    def report(self, function: Compiled, line: int, text: str) -> None: ...


class Expressions:
    """Evaluates the expressions of one function, with the variables as they are on the path that leads to them.

    `Program` is what they are judged by: what the parameters can be, and what the functions return that are called.
    """

    def __init__(self, program: Program, function: Compiled) -> None:
        self.program, self.function = program, function
        self._names = function.source.names
        self._locals = function.variables
        self._now = Paths()

    def _report(self, place: int | ast.AST, text: str) -> None:
        line = place if isinstance(place, int) else place.lineno  # type: ignore[attr-defined]
        self.program.report(self.function, line, text)

    def _value(self, node: ast.expr) -> Shape:
        """What the expression can be, which must be something."""
        shape = self._evaluate(node)
        if Kind.NOTHING in shape:
            self._report(node, f"`{text_of(node)}` returns nothing, but its value is used")
            return ANY
        return shape

    def _evaluate(self, node: ast.expr) -> Shape:
        method: Callable[[Any], Shape] | None = getattr(self, f"_{type(node).__name__.lower()}", None)
        if method is not None:
            return method(node)
        what = OBJECTS.get(type(node), type(node).__name__)
        self._report(node, f"{what} is not possible in compiled code, which has no Python objects")
        return ANY

    def _number(self, node: ast.expr, shape: Shape) -> Shape:
        """The expression with this shape is used as a number."""
        for each in shape:
            if isinstance(each, Struct):
                if not self._wrong_parameter(node, each):
                    self._report(
                        node, f"`{text_of(node)}` is {describe(each)}, not a number (address_of() gives its address)"
                    )
            elif isinstance(each, Several) or each is Kind.ARRAY:
                self._report(node, f"`{text_of(node)}` is {describe(each)}, not a number")
        return FLOAT if Kind.FLOAT in shape else NUMBER

    def _operand(self, node: ast.expr) -> Shape:
        return self._number(node, self._value(node))

    def _integer(self, node: ast.expr) -> None:
        if Kind.FLOAT in self._operand(node):
            self._report(node, f"`{text_of(node)}` is a float; an integer is needed")

    def _constant(self, node: ast.Constant) -> Shape:
        return self._literal(node, node.value, repr(node.value))

    def _literal(self, node: ast.AST, value: object, text: str) -> Shape:
        """A constant, in the code or with a name."""
        if isinstance(value, bool | int | np.integer):
            if not -(1 << 63) <= int(value) < 1 << 63:
                self._report(node, f"{text} does not fit into an int64")
            return NUMBER
        if isinstance(value, float):
            return FLOAT
        if isinstance(value, tuple):
            return frozenset({Several(tuple(self._literal(node, each, text) for each in value))})
        if not isinstance(value, Opaque):
            self._report(node, f"{text} {wrong_object(value)}")
        return ANY

    def _name(self, node: ast.Name) -> Shape:
        if node.id not in self._locals:
            return self._literal(node, self._global(node), node.id)
        if node.id not in self._now.shapes:
            self._report(node, f"{node.id} is used before it is assigned")
            return ANY
        if node.id in self._now.unsure:
            self._report(node, f"{node.id} is not assigned on every path that leads here")
        return self._now.shapes[node.id]

    def _global(self, node: ast.Name) -> Any:
        """What a global name stands for; Opaque after a mistake."""
        try:
            return self._names[node.id]
        except KeyError:
            known = [*self._locals, *self.function.source.definitions, *BUILTINS, "range"]
            self._report(node, f"unknown name {node.id}{did_you_mean(node.id, known)}")
        except Exception:
            self._cannot_evaluate(node)
        return Opaque(node.id)

    def _cannot_evaluate(self, node: ast.expr) -> None:
        """A constant that is computed with something that is not there, such as Numba."""

    def _attribute(self, node: ast.Attribute) -> Shape:
        if not self._is_global(node.value):
            return self._field(node)
        found = self._object(node)
        return ANY if isinstance(found, Module) else self._literal(node, found, text_of(node))

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
            self._report(node, f"{text_of(node.value)} has no {node.attr}{did_you_mean(node.attr, known)}")
        except Exception:
            self._cannot_evaluate(node)
        return Opaque(node.attr)

    def _field(self, node: ast.Attribute) -> Shape:
        shape = self._value(node.value)
        lacking = [each for each in shape if not self._has(each, node.attr)]
        for each in lacking:
            if not self._wrong_parameter(node.value, each, node.attr):
                self._report(node, self._no_field(node, each))
        if lacking:
            return ANY
        for each in shape:
            if isinstance(each, Struct) and each.is_unsigned_64(node.attr):
                self._report(
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
        return element is Kind.ANY and self.program.is_field(name)

    def _no_field(self, node: ast.Attribute, element: Element) -> str:
        if isinstance(element, Struct):
            return f"{element} has no field {node.attr}{did_you_mean(node.attr, element.fields)}"
        if element is Kind.ANY:
            return f"no struct has a field {node.attr}"
        return f"`{text_of(node.value)}` is {describe(element)}, not a struct, so it has no field {node.attr}"

    def _subscript(self, node: ast.Subscript) -> Shape:
        shape = self._value(node.value)
        self._integer(node.slice)
        for each in shape:
            if isinstance(each, Struct) or each in (Kind.NUMBER, Kind.FLOAT):
                self._report(node, f"`{text_of(node.value)}` is {describe(each)}, not an array")
        items = [each.items for each in shape if isinstance(each, Several)]
        return join(join(each) for each in items) if items else NUMBER

    def _tuple(self, node: ast.Tuple) -> Shape:
        return frozenset({Several(tuple(self._value(each) for each in node.elts))})

    def _namedexpr(self, node: ast.NamedExpr) -> Shape:
        shape = self._value(node.value)
        self._assign_name(node.target.id, shape)
        return shape

    def _assign_name(self, name: str, shape: Shape) -> None:
        self._now.shapes[name] = shape
        self._now.unsure -= {name}
        self.program.assigned(name, shape)

    def _ifexp(self, node: ast.IfExp) -> Shape:
        self._operand(node.test)
        return join([self._value(node.body), self._value(node.orelse)])

    def _boolop(self, node: ast.BoolOp) -> Shape:
        return join(self._operand(each) for each in node.values)

    def _compare(self, node: ast.Compare) -> Shape:
        if not all(isinstance(each, ORDERINGS) for each in node.ops):
            self._report(node, f"`{text_of(node)}`: numbers are compared with == != < <= > >=")
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
            self._report(node, "/ gives a float; use //")
        return FLOAT if Kind.FLOAT in shape else NUMBER

    # Calls.

    def _call(self, node: ast.Call) -> Shape:
        if not self._is_global(node.func):
            for argument in node.args:
                self._value(argument)
            self._report(node, f"`{text_of(node.func)}` is not a function that compiled code can call")
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
            self._report(node, f"{text_of(node.func)}() {wrong_callee(found)}")
        return ANY

    def _call_builtin(self, node: ast.Call, name: ast.Name) -> Shape:
        if name.id in BUILTINS:
            self._arity(node, name.id, *BUILTINS[name.id])
        elif hasattr(builtins, name.id):
            self._report(node, f"{name.id}() is not possible in compiled code, which has no Python objects")
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
        fits = self._arity(node, text_of(node.func), function.required, most)
        if isinstance(function, Intrinsic):
            for argument, shape in zip(node.args, arguments, strict=True):
                if Kind.FLOAT in self._number(argument, shape):
                    self._report(argument, f"`{text_of(argument)}` is a float; {text_of(node.func)}() needs an integer")
            if function.variadic and node.args:
                self._by_address(node, node.args[0])
            return NUMBER if function.returns else NOTHING
        assert isinstance(function, Compiled)
        if function.unit:
            self._report(node, f"{function.name}() is a unit: store its address(), and call that with call()")
            return NUMBER
        if self.program.is_recursive(self.function, function):
            who = "itself" if function == self.function else f"{self.function.name}() again"
            self._report(node, f"{function.name}() calls {who}, which compiled code cannot do; write a loop")
        self.program.call(self.function, node, function, arguments if fits else [ANY] * len(function.parameters))
        return self.program.returned(self.function, function)

    def _by_address(self, node: ast.Call, address: ast.expr) -> None:
        """A call by address with too few arguments is not detected by anything else. Fields have the names of units."""
        if isinstance(address, ast.Attribute) and (counts := self.program.unit_arguments(address.attr)):
            count = len(node.args) - 1
            if count not in counts:
                wanted = " or ".join(map(str, sorted(counts)))
                self._report(node, f"the unit {address.attr} takes {_arguments(wanted)}, but gets {count}")

    def _arity(self, node: ast.Call, name: str, fewest: int, most: int) -> bool:
        """Whether the number of arguments is right."""
        count = len(node.args) + len(node.keywords)
        if node.keywords:
            self._report(node, f"{name}() gets {node.keywords[0].arg}= by name; pass it by position")
        elif not fewest <= count <= most:
            wanted = f"{fewest}" if fewest == most else f"{fewest} to {most}" if most < MANY else f"{fewest} or more"
            self._report(node, f"{name}() takes {_arguments(wanted)}, but gets {count}")
        return fewest <= count <= most and not node.keywords

    def _view(self, node: ast.Call) -> Shape:
        if not self._arity(node, "view", 2, 2):
            return ANY
        address, layout = node.args
        self._integer(address)
        if self._is_global(layout):
            found = self._object(layout)
            if isinstance(found, np.dtype) and found.names:
                return frozenset({Struct(text_of(layout).rpartition(".")[2], found)})
            if isinstance(found, Opaque):
                return ANY
        self._report(node, f"`{text_of(layout)}` is not the layout of a struct")
        return ANY

    def _address_of(self, node: ast.Call) -> Shape:
        if self._arity(node, "address_of", 1, 1):
            for each in self._value(node.args[0]):
                if isinstance(each, Kind | Several) and each is not Kind.ANY:
                    self._report(node, f"`{text_of(node.args[0])}` is {describe(each)}, not a struct")
        return NUMBER


def text_of(node: ast.AST) -> str:
    """The source of an expression, for a message."""
    return ast.unparse(node)


def _arguments(count: str) -> str:
    return f"{count} argument{'s' * (count != '1')}"
