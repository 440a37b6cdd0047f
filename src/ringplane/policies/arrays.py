"""Arrays of policies: `my.table[index]` in the file of a policy becomes a call of a function here.

The field of an array has the address of its first number; the number before that one says how many there are. An index
is taken modulo it, so a policy cannot reach anything else.
"""

from __future__ import annotations

import ast
from typing import Any

from ringplane.compiler.jit import compiled
from ringplane.native.access import load64, store64


@compiled
def get_item(array, index):
    return load64(array + 8 * (index % count_items(array)))


@compiled
def set_item(array, index, value):
    store64(array + 8 * (index % count_items(array)), value)


@compiled
def count_items(array):
    return load64(array - 8)


# The names by which a file refers to them, which nobody else uses.
NAMES: dict[str, Any] = {f"ringplane_{each.__name__}": each for each in (get_item, set_item, count_items)}

INDEX = "ringplane_index"


class WithCalls(ast.NodeTransformer):
    """Replaces subscripts in functions."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        return _call(node, get_item, node.value, node.slice)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        target = node.targets[0]
        if not isinstance(target, ast.Subscript):
            return self.generic_visit(node)
        value, index = self.visit(node.value), self.visit(target.slice)
        return _statement(node, _call(node, set_item, target.value, index, value))

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST | list[ast.AST]:
        target = node.target
        if not isinstance(target, ast.Subscript):
            return self.generic_visit(node)
        # Once: it may be a random number.
        index = ast.copy_location(ast.Assign([ast.Name(INDEX, ast.Store())], self.visit(target.slice)), node)
        before = _call(node, get_item, target.value, _the_index())
        changed = ast.copy_location(ast.BinOp(before, node.op, self.visit(node.value)), node)
        return [index, _statement(node, _call(node, set_item, target.value, _the_index(), changed))]

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "len":
            return _call(node, count_items, *node.args)
        return node


def with_calls(tree: ast.Module) -> ast.Module:
    """The file in the form in which it is compiled."""
    changer = WithCalls()
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef):
            changer.generic_visit(statement)
    return ast.fix_missing_locations(tree)


def _call(place: ast.AST, function: Any, *arguments: ast.expr) -> ast.Call:
    name = ast.Name(f"ringplane_{function.__name__}", ast.Load())
    loaded = [_loaded(each) for each in arguments]
    return ast.copy_location(ast.Call(ast.copy_location(name, place), loaded, []), place)


def _loaded(node: ast.expr) -> ast.expr:
    """The expression of an assignment's target, as one that is read."""
    if isinstance(node, ast.Attribute):
        return ast.copy_location(ast.Attribute(node.value, node.attr, ast.Load()), node)
    return node


def _the_index() -> ast.Name:
    return ast.Name(INDEX, ast.Load())


def _statement(place: ast.AST, call: ast.Call) -> ast.Expr:
    return ast.copy_location(ast.Expr(call), place)
