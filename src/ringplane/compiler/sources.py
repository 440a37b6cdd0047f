"""Modules as syntax trees, with their global names evaluated one by one, without importing Numba or the modules.

A compiled function refers to constants, struct layouts, other functions and modules. The checker (checker.py) has to
know what each of these is. So a module is parsed, and what defines a name is executed when the name is first needed.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

# Annotations are not evaluated.
ANNOTATIONS = __future__.annotations.compiler_flag

PACKAGE = Path(__file__).resolve().parent.parent

# What a decorator of a compiled function is imported from.
COMPILER = "ringplane.compiler."
# A unit is compiled apart, and called by address (compiler/units.py).
UNIT = "unit"
# Where a policy has its decorators from. Its functions are units.
POLICIES = "ringplane.policies"


class Opaque:
    """Something of Numba, of which nothing needs to be known but its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Opaque:
        return Opaque(name)

    def __call__(self, *args: Any, **keywords: Any) -> Opaque:
        return self


@dataclass(frozen=True, eq=False)
class Callee:
    """A function that compiled code can call; `required` of its parameters have no default value."""

    name: str
    parameters: tuple[str, ...]
    required: int
    variadic: bool = False


@dataclass(frozen=True, eq=False)
class Intrinsic(Callee):
    """A function that is translated by LLVM's builder. `returns`: whether it has a result."""

    returns: bool = True


@dataclass(frozen=True, eq=False)
class Compiled(Callee):
    """A function in Python that is compiled. `unit`: it can only be called by address."""

    source: Source = field(kw_only=True)
    node: ast.FunctionDef = field(kw_only=True)
    unit: bool = field(kw_only=True)

    @cached_property
    def variables(self) -> frozenset[str]:
        """Its parameters, and what it assigns."""
        nodes = (node for node in ast.walk(self.node) if isinstance(node, ast.Name))
        return frozenset({*self.parameters, *(node.id for node in nodes if isinstance(node.ctx, ast.Store))})


def _parameters(arguments: ast.arguments) -> tuple[tuple[str, ...], int, bool]:
    names = tuple(each.arg for each in (*arguments.posonlyargs, *arguments.args))
    return names, len(names) - len(arguments.defaults), arguments.vararg is not None


def intrinsic(define: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Stands for the decorator of the compiler."""
    if define is None:
        return intrinsic
    code = define.__code__
    names = code.co_varnames[1 : code.co_argcount]
    returns = define.__annotations__.get("return") != "None"
    return Intrinsic(code.co_name, names, len(names), bool(code.co_flags & 0x04), returns)


class Names(dict[str, Any]):
    """The global names of a module, each evaluated when it is first needed; of other names KeyError, as in a dict."""

    def __init__(self, source: Source) -> None:
        super().__init__(__name__=source.module, __builtins__=builtins)
        self._source = source

    def __missing__(self, name: str) -> Any:
        statement = self._source.definitions[name]
        self[name] = value = self._evaluate(name, statement)
        return value

    def _evaluate(self, name: str, statement: ast.stmt) -> Any:
        if isinstance(statement, ast.Import):
            return _import_foreign(next(each.name for each in statement.names if _bound_name(each) == name))
        if isinstance(statement, ast.ImportFrom):
            original = next(each.name for each in statement.names if _bound_name(each) == name)
            return self._source.import_from(statement, original)
        if isinstance(statement, ast.FunctionDef) and (decorator := self._source.compiling_decorator(statement)):
            names, required, variadic = _parameters(statement.args)
            return Compiled(
                name, names, required, variadic, source=self._source, node=statement, unit=decorator == UNIT
            )
        code = compile(ast.Module([statement], []), self._source.path, "exec", ANNOTATIONS, True)
        exec(code, self)
        return dict.__getitem__(self, name)


class Module:
    """What `import` gives for one of our modules: its names are its attributes."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:
        try:
            return self.source.names[name]
        except KeyError:
            raise AttributeError(name) from None


def _bound_name(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def _import_foreign(name: str) -> Any:
    """A module of Python or NumPy. Others are not imported, because that takes time."""
    if name.partition(".")[0] in (*sys.stdlib_module_names, "numpy"):
        return importlib.import_module(name)
    return Opaque(name)


class Source:
    """A module that was parsed. `definitions` has the statement that defines each global name."""

    def __init__(self, sources: Sources, module: str, path: Path, text: str | None = None) -> None:
        """With a `text` the file is not read. Raises OSError or SyntaxError."""
        self.module, self.path = module, path
        self._sources = sources
        self.tree = ast.parse(path.read_bytes() if text is None else text, path)
        self.definitions = dict(_definitions(self.tree.body))
        self.names = Names(self)

    def compiled_functions(self) -> Iterator[Compiled]:
        for name, statement in self.definitions.items():
            if isinstance(statement, ast.FunctionDef) and self.compiling_decorator(statement):
                yield self.names[name]

    def layouts(self) -> Iterator[np.dtype[np.void]]:
        """The layouts of structs among the constants."""
        for name in self.definitions:
            with contextlib.suppress(Exception):
                if name.isupper() and isinstance(found := self.names[name], np.dtype):
                    yield found

    def compiling_decorator(self, function: ast.FunctionDef) -> str:
        """The name of the decorator that compiles this function; empty: there is none."""
        for decorator in function.decorator_list:
            place, name = self.origin(decorator)
            if place.startswith(COMPILER) and name != "intrinsic":
                return name
            if place == POLICIES or name == "result":
                return name if name == "compiled" else UNIT
        return ""

    def origin(self, expression: ast.expr) -> tuple[str, str]:
        """The module that something is defined in, as far as the import says, and its name there."""
        if isinstance(expression, ast.Call):
            return self.origin(expression.func)
        if isinstance(expression, ast.Attribute) and isinstance(expression.value, ast.Name):
            place, name = self.origin(expression.value)
            return f"{place}.{name}" if place else name, expression.attr
        name = expression.id if isinstance(expression, ast.Name) else ""
        statement = self.definitions.get(name)
        if isinstance(statement, ast.Import):
            return "", name
        if isinstance(statement, ast.ImportFrom):
            original = next(each.name for each in statement.names if _bound_name(each) == name)
            return self.absolute(statement), original
        return self.module, name

    def absolute(self, statement: ast.ImportFrom) -> str:
        """The full name of the module that the statement imports from."""
        if not statement.level:
            return statement.module or ""
        package = self.module.split(".")[: -statement.level]
        return ".".join([*package, *([statement.module] if statement.module else [])])

    def import_from(self, statement: ast.ImportFrom, name: str) -> Any:
        place = self.absolute(statement)
        if name == "intrinsic":
            return intrinsic
        if inner := self._sources.find(f"{place}.{name}"):
            return Module(inner)
        if source := self._sources.find(place):
            return source.names[name]
        module = _import_foreign(place)
        return getattr(module, name)

    def missing_imports(self) -> Iterator[tuple[ast.ImportFrom, str, Source]]:
        """What is imported from our modules and is not there."""
        for statement in self.tree.body:
            if isinstance(statement, ast.ImportFrom) and (source := self._sources.find(self.absolute(statement))):
                for alias in statement.names:
                    known = alias.name in source.definitions or self._sources.find(f"{source.module}.{alias.name}")
                    if not known and alias.name != "*":
                        yield statement, alias.name, source


def _definitions(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Each global name and the statement that defines it."""
    for statement in body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield from ((_bound_name(alias), statement) for alias in statement.names)
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name, statement
        elif isinstance(statement, ast.If | ast.Try | ast.With):
            for inner in ("body", "orelse", "finalbody"):
                yield from _definitions(getattr(statement, inner, []))
        else:
            stored = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
            yield from ((node.id, statement) for node in stored if isinstance(node.ctx, ast.Store))


class Sources:
    """All modules that were needed so far: those of some files, and what they import from the same package or ours."""

    def __init__(self) -> None:
        self._found: dict[str, Source | None] = {}
        # Folders that contain a package, and its name; without a name: a folder of modules outside any package.
        self._roots: list[tuple[Path, str]] = []

    def add(self, path: Path, text: str | None = None) -> Source:
        """The module of this file, in the package whose folder it lies in. Raises OSError or SyntaxError.

        With a `text`, which is that of the file, it is not read, and nothing is imported from beside it: what is there
        is not checked.
        """
        path = path.resolve()
        root = next(each for each in path.parents if not (each / "__init__.py").exists())
        parts = path.relative_to(root).with_suffix("").parts
        place = (root, parts[0] if len(parts) > 1 else "")
        if text is None and place not in self._roots:
            self._roots.append(place)
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found = self._found.get(module)
        if found is None or found.path != path:
            found = self._found[module] = Source(self, module, path, text)
        return found

    def package(self) -> Path:
        """The folder of ringplane: one that was added, else this one."""
        added = [root / PACKAGE.name for root, _ in self._roots if (root / PACKAGE.name).is_dir()]
        return added[0] if added else PACKAGE

    def find(self, module: str) -> Source | None:
        """The module of this name in our package, or beside the files; None for all others."""
        if module not in self._found:
            self._found[module] = self._search(module)
        return self._found[module]

    def _search(self, module: str) -> Source | None:
        relative = Path(*module.split("."))
        for root, package in (*self._roots, (PACKAGE.parent, PACKAGE.name)):
            # An installed package has all others beside it, and Numba is among them.
            if package == relative.parts[0]:
                paths = [root / relative.with_suffix(".py"), root / relative / "__init__.py"]
            else:
                paths = [] if package else [root / f"{module}.py"]
            for path in filter(Path.is_file, paths):
                return Source(self, module, path)
        return None
