"""One compiled function: its statements are followed along all paths, and what is wrong is reported."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from ringplane.compiler.dialect import OBJECTS, RANGE
from ringplane.compiler.expressions import Expressions, Program, text_of
from ringplane.compiler.shapes import (
    ANY,
    NOTHING,
    NUMBER,
    UNKNOWN,
    Kind,
    Paths,
    Several,
    Shape,
    Struct,
    describe,
    join,
    meet,
)
from ringplane.compiler.sources import Compiled


class Flow(Expressions):
    """Follows the paths of one function. `returned`: what it can return.

    `run` collects the ends of paths that return no value in `_ends`; a function must not have both. Each loop that the
    current statement is in has a list in `_breaks` and in `_continues`.
    """

    def __init__(self, program: Program, function: Compiled) -> None:
        super().__init__(program, function)
        self.returned: Shape = UNKNOWN
        self._value_line = 0
        self._ends: list[tuple[int, str]] = []
        self._breaks: list[list[Paths | None]] = []
        self._continues: list[list[Paths | None]] = []

    def run(self) -> None:
        for name in self.function.parameters:
            self._now.shapes[name] = self.program.parameter(self.function, name)
        body = self.function.node.body
        if self._block(body, self._now) is not None:
            self._ends.append((body[-1].lineno, "ends after this"))
        if self._value_line:
            for line, what in self._ends:
                self._report(
                    line, f"{self.function.name}() {what} without a value, but returns one in line {self._value_line}"
                )
        elif self._ends:
            self.returned = NOTHING
            if self.function.unit:
                self._report(self._ends[0][0], self._returns_nothing())

    def _returns_nothing(self) -> str:
        return f"{self.function.name}() is a unit, so it must return a number"

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
        self._report(
            statement, f"{what} is not possible in compiled code, which has no Python objects and no exceptions"
        )
        return paths

    def _do_pass(self, statement: ast.Pass) -> Paths:
        return self._now

    def _do_expr(self, statement: ast.Expr) -> Paths:
        if isinstance(statement.value, ast.Call):
            self._call(statement.value)
        elif not _is_docstring(statement, self.function.node):
            self._value(statement.value)
            self._report(statement, f"`{text_of(statement.value)}` has no effect")
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

    def _store(self, target: ast.expr, shape: Shape, value: ast.expr) -> None:
        self._number(value, shape)
        if Kind.FLOAT in shape:
            self._report(
                target, f"a float is stored in `{text_of(target)}`, which is an integer; convert it with int()"
            )

    def _unpack(self, target: ast.Tuple, shape: Shape, value: ast.expr) -> None:
        count = len(target.elts)
        for each in shape:
            if isinstance(each, Several) and len(each.items) != count:
                self._report(target, f"{describe(each)} is assigned to {count} variables")
            elif isinstance(each, Kind | Struct) and each is not Kind.ANY:
                self._report(target, f"`{text_of(value)}` is {describe(each)}, not a tuple")
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
        self._operand(statement.test)
        before = self._now
        return meet([self._block(statement.body, before.copy()), self._block(statement.orelse, before.copy())])

    def _do_while(self, statement: ast.While) -> Paths | None:
        forever = isinstance(statement.test, ast.Constant) and bool(statement.test.value)
        return self._loop(statement, lambda: self._operand(statement.test), forever)

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
            self._report(node, f"a `for` is only possible with range(), not with `{text_of(node)}`")


def _is_docstring(statement: ast.Expr, function: ast.FunctionDef) -> bool:
    return statement is function.body[0] and isinstance(statement.value, ast.Constant)


def _loaded(target: ast.Name | ast.Attribute | ast.Subscript) -> ast.expr:
    """The target of an assignment, as an expression that reads it."""
    if isinstance(target, ast.Name):
        return ast.copy_location(ast.Name(target.id, ast.Load()), target)
    return target


def _any_or_unknown(shape: Shape) -> Shape:
    return ANY if shape else UNKNOWN
