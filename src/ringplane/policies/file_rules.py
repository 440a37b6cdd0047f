"""What a file of policies may contain: declarations, constants and functions, and nothing that does anything else.

Its functions run in the thread that serves the disk, so they may reach no memory but their own and the I/O's, by the
functions of `ringplane.policies`. So nothing else can be imported. What is in the functions is checked by
compiler/policy_flow.py.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from ringplane.compiler.inference import Mistake
from ringplane.compiler.shapes import did_you_mean

API = "ringplane.policies"
# Whole modules whose constants may be used.
CONSTANTS = ("errno", "math")
DECLARING = ("parameter", "counter", "state")
DECORATORS = ("policy", "compiled")
POSSIBLE_DECORATORS = "@policy(CLASS), @policy(CLASS, data=True), @NAME.result or @compiled"
# What may be called where constants are computed.
ARITHMETIC = ("abs", "float", "int", "len", "max", "min", "range", "round", "sum", "tuple")
# These names mean the same in every file: the check and arrays.py look at nothing else.
FIXED = ("Policy", "bool", "one_of", *DECLARING, *DECORATORS, *CONSTANTS, *ARITHMETIC)
EXPRESSIONS = (
    *(ast.Constant, ast.Name, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Tuple, ast.IfExp, ast.operator),
    *(ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context, ast.Call, ast.keyword, ast.Attribute, ast.Starred),
)

# What only a policy with data=True can use.
DATA = ("load8", "store8")

# Of the names of arrays.py.
PREFIX = "ringplane_"

Found = Iterator[tuple[ast.AST, str]]


def mistakes(tree: ast.Module, path: Path, names: frozenset[str]) -> list[Mistake]:
    """In order of their lines; `names` are those of the interface of policies."""
    found = [Mistake(path, place.lineno, text) for place, text in _Rules(names).module(tree)]  # type: ignore[attr-defined]
    return sorted(set(found))


class _Rules:
    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def module(self, tree: ast.Module) -> Found:
        yield from _names_bound(tree)
        yield from _data_used(tree)
        for number, statement in enumerate(tree.body):
            if not (number == 0 and _is_text(statement)):
                yield from self._statement(statement)

    def _statement(self, statement: ast.stmt) -> Found:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                if alias.name not in CONSTANTS or alias.asname:
                    yield statement, _no_import(alias.name)
        elif isinstance(statement, ast.ImportFrom):
            yield from self._import_from(statement)
        elif isinstance(statement, ast.ClassDef):
            yield from self._class(statement)
        elif isinstance(statement, ast.FunctionDef):
            yield from self._function(statement)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            yield from self._constant(statement)
        else:
            yield statement, f"`{_shown(statement)}`: only imports, constants, classes and functions are possible here"

    def _import_from(self, statement: ast.ImportFrom) -> Found:
        if statement.level or statement.module not in (API, "__future__", *CONSTANTS):
            yield statement, _no_import("." * statement.level + (statement.module or ""))
        for alias in statement.names:
            if alias.name == "*":
                yield statement, "import * is not possible; import names"
            elif alias.asname:
                yield statement, f"{alias.name} cannot get another name"
            elif statement.module == API and alias.name not in self._names:
                yield statement, f"{API} has no {alias.name}{did_you_mean(alias.name, self._names)}"

    def _class(self, statement: ast.ClassDef) -> Found:
        if [_name(base) for base in statement.bases] != ["Policy"] or statement.keywords or statement.decorator_list:
            yield statement, f"write class {statement.name}(Policy)"
        for number, inner in enumerate(statement.body):
            if isinstance(inner, ast.Pass) or (number == 0 and _is_text(inner)):
                continue
            if not (isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name)):
                yield inner, f"`{_shown(inner)}`: a class of Policy has only lines like NAME: int = parameter(...)"
            elif not (isinstance(inner.value, ast.Call) and _name(inner.value.func) in DECLARING):
                yield inner, f"{inner.target.id} needs a value: parameter(...), counter(...) or state(...)"
            else:
                yield from self._expression(inner.value)

    def _function(self, function: ast.FunctionDef) -> Found:
        arguments = function.args
        if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.defaults:
            yield function, f"{function.name}() may have only plain parameters"
        kinds = [_decorator(each) for each in function.decorator_list]
        if len(kinds) != 1 or not kinds[0]:
            yield function, f"{function.name}() needs one decorator: {POSSIBLE_DECORATORS}"
        elif kinds[0] != "compiled" and len(arguments.posonlyargs + arguments.args) != 2:
            yield function, f"{function.name}() needs two parameters: io and my"
        for node in ast.walk(ast.Module(function.body, [])):
            yield from _in_function(node)

    def _constant(self, statement: ast.Assign | ast.AnnAssign) -> Found:
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            if not all(isinstance(each, ast.Name | ast.Tuple | ast.expr_context) for each in ast.walk(target)):
                yield statement, f"`{_shown(target)}` cannot be assigned here"
        if statement.value is None:
            yield statement, f"`{_shown(statement)}` has no value"
        else:
            yield from self._expression(statement.value)

    def _expression(self, expression: ast.expr) -> Found:
        for node in ast.walk(expression):
            if not isinstance(node, EXPRESSIONS):
                yield expression, f"`{_shown(node)}` is not possible here; constants are numbers, texts and tuples"
            elif isinstance(node, ast.Call) and _name(node.func) not in (*DECLARING, "one_of", *ARITHMETIC):
                if not (isinstance(node.func, ast.Attribute) and _name(node.func.value) == "math"):
                    yield node, f"{_shown(node.func)}() cannot be called here"
            elif isinstance(node, ast.Attribute) and (_name(node.value) not in CONSTANTS or node.attr.startswith("__")):
                yield node, f"`{_shown(node)}` is not possible here"


def _names_bound(tree: ast.Module) -> Found:
    """Each global name has one meaning: the functions that run are those that are checked."""
    seen: dict[str, int] = {}
    for statement in tree.body:
        imported = isinstance(statement, ast.Import | ast.ImportFrom)
        for name in _bound(statement):
            if name in seen:
                yield statement, f"{name} has a meaning already, of line {seen[name]}; choose another name"
            elif name.startswith(("__", PREFIX)) or (name in FIXED and not imported):
                yield statement, f"{name} is taken; choose another name"
            seen.setdefault(name, statement.lineno)


def _bound(statement: ast.stmt) -> Iterator[str]:
    """The global names that the statement gives a meaning."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in statement.names)
    elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    else:
        stored = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
        yield from (node.id for node in stored if isinstance(node.ctx, ast.Store))


def _data_used(tree: ast.Module) -> Found:
    """Data that a policy uses without having it: it would read zeros, and change nothing."""
    functions = {each.name: each for each in tree.body if isinstance(each, ast.FunctionDef)}
    for function in functions.values():
        declaration = _declaration(function, functions)
        if declaration is not None and declaration.args and not _has_data(declaration):
            for node in _reached(function, functions):
                if isinstance(node, ast.Name) and node.id in DATA:
                    yield node, f"{node.id}() needs data: write @policy({_shown(declaration.args[0])}, data=True)"


def _declaration(function: ast.FunctionDef, functions: Mapping[str, ast.FunctionDef]) -> ast.Call | None:
    """The @policy(...) of the policy that this function belongs to; None: it is only called by policies."""
    owners = [_name(each.value) for each in function.decorator_list if isinstance(each, ast.Attribute)]
    declaring = [functions[name] for name in owners if name in functions] or [function]
    return next((each for each in declaring[0].decorator_list if isinstance(each, ast.Call)), None)


def _has_data(declaration: ast.Call) -> bool:
    return any(isinstance(each.value, ast.Constant) and each.value.value is True for each in declaration.keywords)


def _reached(function: ast.FunctionDef, functions: Mapping[str, ast.FunctionDef]) -> Iterator[ast.AST]:
    """What is in it, and in the functions that it calls."""
    waiting, seen = [function], {function.name}
    while waiting:
        for node in ast.walk(waiting.pop()):
            yield node
            if isinstance(node, ast.Name) and node.id in functions.keys() - seen:
                seen.add(node.id)
                waiting.append(functions[node.id])


def _in_function(node: ast.AST) -> Found:
    """What compiled functions of ringplane can have, and policies cannot."""
    if isinstance(node, ast.Attribute) and node.attr.startswith("__"):
        yield node, f"`{_shown(node)}` is not possible in a policy"
    elif isinstance(node, ast.Subscript) and not isinstance(node.value, ast.Attribute):
        yield node, f"`{_shown(node)}`: only an array of the policy has items, as in my.{_shown(node.value)}[index]"
    elif isinstance(node, ast.Assign):
        several = len(node.targets) > 1
        for target in node.targets:
            if isinstance(target, ast.Tuple | ast.List) or several:
                for each in ast.walk(target):
                    if isinstance(each, ast.Subscript):
                        yield node, f"assign to `{_shown(each)}` in a statement of its own"


def _decorator(expression: ast.expr) -> str:
    """policy, result or compiled; empty: something else."""
    if isinstance(expression, ast.Call) and _name(expression.func) == "policy":
        return "policy" if _are_plain(expression) else ""
    if isinstance(expression, ast.Attribute) and expression.attr == "result" and _name(expression.value):
        return "result"
    return "compiled" if _name(expression) == "compiled" else ""


def _are_plain(call: ast.Call) -> bool:
    """Whether the arguments are those of policy(NAME) or policy(NAME, data=True): they are evaluated."""
    is_class = [bool(_name(each)) for each in call.args] == [True]
    return is_class and all(
        each.arg == "data" and isinstance(each.value, ast.Constant) and isinstance(each.value.value, bool)
        for each in call.keywords
    )


def _no_import(module: str) -> str:
    return f"a policy cannot import {module}; {API}, errno and math have what it can use"


def _name(expression: ast.expr) -> str:
    return expression.id if isinstance(expression, ast.Name) else ""


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _shown(node: ast.AST) -> str:
    text = ast.unparse(node).partition("\n")[0]
    return text if len(text) < 60 else f"{text[:57]}..."
