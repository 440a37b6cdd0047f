"""The functions of policies: what they may do besides what is right in all compiled functions.

They run in the thread that serves the disk. They may use their own numbers and what the I/O is, and nothing else: a
struct has no address for them, and the functions of `ringplane.policies` are called with the I/O that they were given.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from typing import Any

from ringplane.compiler.expressions import text_of
from ringplane.compiler.flow import Flow
from ringplane.compiler.shapes import ANY, Element, Kind, Several, Shape, Struct
from ringplane.compiler.sources import POLICIES, Callee, Compiled

# The names of the structs, and what is in the metadata of the layout of a policy: the fields that it may change.
IO, CHANGING = "I/O", "changing"
# Modules of numbers.
CONSTANTS = ("errno", "math")


class PolicyFlow(Flow):
    """Follows the paths of one function of a policy, or of one that it calls."""

    def run(self) -> None:
        super().run()
        if self.function.unit:
            for each in self.returned:
                if each is Kind.FLOAT or isinstance(each, Struct | Several):
                    self._report(self.function.node, f"{self.function.name}() returns {_described(each)}; {ANSWERS}")

    def _do_return(self, statement: ast.Return) -> None:
        super()._do_return(statement)
        if self.function.unit and statement.value is not None:
            for each in _branches(statement.value):
                if self._is_number(each):
                    self._report(statement, f"`{text_of(each)}` is not an answer; {ANSWERS}")

    def _is_number(self, node: ast.expr) -> bool:
        """A number as an answer would be that of another one: 5 is a torn write."""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            return True
        if isinstance(node, ast.Constant):
            return node.value is not None
        return self._is_global(node) and self.function.source.origin(node)[0] in CONSTANTS

    def _returns_nothing(self) -> str:
        return f"{self.function.name}() returns nothing; {ANSWERS}"

    def _store(self, target: ast.expr, shape: Shape, value: ast.expr) -> None:
        super()._store(target, shape, value)
        place = target.value if isinstance(target, ast.Subscript) else target
        if isinstance(place, ast.Attribute):
            for each in self._value(place.value):
                self._check_change(target, place.attr, each)

    def _check_change(self, target: ast.expr, name: str, owner: Element) -> None:
        if not isinstance(owner, Struct) or name not in owner.fields:
            return
        if owner.name == IO:
            self._report(target, f"{text_of(target)} cannot be changed; what a policy returns changes the I/O")
        elif name not in self._changing(owner):
            self._report(target, f"{name} is a parameter, which only users change; use a state() of the policy")
        elif owner.field(name) == frozenset({Kind.ARRAY}) and not isinstance(target, ast.Subscript):
            self._report(target, f"{name} is an array; assign to an item: {text_of(target)}[index]")

    def _changing(self, owner: Struct) -> Collection[str]:
        metadata: Any = owner.dtype.metadata or {}
        changing: Collection[str] = metadata.get(CHANGING, ())
        return changing

    def _attribute(self, node: ast.Attribute) -> Shape:
        """An array is only used with an index."""
        shape = super()._attribute(node)
        if Kind.ARRAY in shape and isinstance(node.ctx, ast.Load) and node not in self._indexed:
            self._report(node, f"`{text_of(node)}` is an array; use an item: {text_of(node)}[index]")
            return ANY
        return shape

    def _cannot_evaluate(self, node: ast.expr) -> None:
        """It is not known what a call of it does."""
        self._report(node, f"`{text_of(node)}` cannot be evaluated")

    def _call_builtin(self, node: ast.Call, name: ast.Name) -> Shape:
        shape = super()._call_builtin(node, name)
        if name.id == "len":
            for argument in node.args:
                self._check_array(argument)
        return shape

    def _check_array(self, node: ast.expr) -> None:
        """The number before the items of an array is its length (policies/arrays.py), of nothing else."""
        if not isinstance(node, ast.Attribute) or self._value(node) != frozenset({Kind.ARRAY}):
            self._report(node, f"`{text_of(node)}` has no len(); only an array of the policy has one")

    @property
    def _indexed(self) -> set[ast.AST]:
        """The arrays of the function of which an item, or the length, is used."""
        found: set[ast.AST] = set()
        for node in ast.walk(self.function.node):
            if isinstance(node, ast.Subscript):
                found.add(node.value)
            elif isinstance(node, ast.Call) and text_of(node.func) == "len":
                found.update(node.args)
        return found

    def _call_function(self, node: ast.Call, function: Callee) -> Shape:
        shape = super()._call_function(node, function)
        if isinstance(function, Compiled) and function.source.module.startswith(POLICIES):
            self._check_arguments(node, function)
        return shape

    def _check_arguments(self, node: ast.Call, function: Compiled) -> None:
        """What ringplane's own functions get, which trust it."""
        if function.source is self.function.source:
            return
        for name, argument in zip(function.parameters, node.args, strict=False):
            for each in self._value(argument):
                is_io = isinstance(each, Struct) and each.name == IO
                if name == "io" and not is_io:
                    self._report(node, f"{function.name}() needs the I/O, `io`, not `{text_of(argument)}`")
                elif name != "io" and isinstance(each, Struct | Several):
                    self._report(node, f"{function.name}() needs a number, not `{text_of(argument)}`")


ANSWERS = "an answer is PASS, fail(errno), delay(us), HANG, DROP, tear(size), redirect(offset) or after(us, answer)"


def _branches(node: ast.expr) -> Iterator[ast.expr]:
    """What a conditional expression can be."""
    if isinstance(node, ast.IfExp):
        yield from _branches(node.body)
        yield from _branches(node.orelse)
    else:
        yield node


def _described(element: Element) -> str:
    return "a float" if element is Kind.FLOAT else "something else"
