"""The key of compiled code: a digest of all that the code depends on, so that stale code is never loaded.

Compiled code consists of its module and the modules that this one imports, directly or not: their functions become a
part of it, their constants are numbers in it. So the key contains the text of these modules, whatever their folder and
their modification times are: a fresh checkout, another installation and the layer of a container image find the same
code. It contains the versions of Python, Numba and llvmlite, and the CPU too. Numba is not imported for it, because
that takes a third of a second.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent

# The CPU of this machine, and any CPU of its architecture.
NATIVE, GENERIC = "native", "generic"
# Numba's settings that change the code, except those of the CPU.
SETTINGS = ("NUMBA_OPT", "NUMBA_LOOP_VECTORIZE", "NUMBA_SLP_VECTORIZE", "NUMBA_DEBUGINFO", "NUMBA_BOUNDSCHECK")

# A whole module takes much longer to parse than the import statements at its top level.
IMPORT = re.compile(r"^(?:import ringplane|from ringplane)\b(?:[^(\n]*\([^)]*\)|[^\n]*)", re.MULTILINE)


@cache
def key_of(module: str, cpu: str = NATIVE) -> str:
    """The key of what is compiled from this module's functions for this CPU, as hexadecimal digits."""
    digest = hashlib.blake2b(_compiler(cpu).encode(), digest_size=10)
    for name in sorted(sources(module)):
        text = _text(name)
        digest.update(f"\n{name} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def sources(module: str) -> set[str]:
    """The module and all modules of this package that it imports, directly or not."""
    found: set[str] = set()
    left = [module]
    while left:
        if (name := left.pop()) not in found:
            found.add(name)
            left.extend(imports(name))
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of this package that importing the module imports."""
    statements = IMPORT.findall(_text(module).decode())
    return frozenset(name for text in statements for name in _imported(ast.parse(text).body[0]))


def _imported(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.Import):
        yield from (each.name for each in statement.names)
    elif isinstance(statement, ast.ImportFrom) and statement.module:
        for each in statement.names:
            name = f"{statement.module}.{each.name}"
            yield name if _file(name) else statement.module


@cache
def _text(module: str) -> bytes:
    path = _file(module) or _imported_file(module)
    assert path
    return path.read_bytes()


def has_key(module: str) -> bool:
    """Whether its text is known; not that of a script in a string, for example."""
    return bool(_file(module) or _imported_file(module))


def _imported_file(module: str) -> Path | None:
    """The file of any module that has been imported."""
    name = getattr(sys.modules.get(module), "__file__", None)
    return Path(name) if name else None


def _file(module: str) -> Path | None:
    """The file of a module of this package, without importing it."""
    package, *parts = module.split(".")
    if package != PACKAGE.name:
        return None
    path = PACKAGE.joinpath(*parts)
    return next((file for file in (path / "__init__.py", path.with_name(f"{path.name}.py")) if file.exists()), None)


@cache
def _compiler(cpu: str) -> str:
    """All that decides, beside the sources, about the machine code."""
    python = f"{sys.implementation.cache_tag}{sys.abiflags} {platform.machine()}"
    versions = [f"{name} {version(name)}" for name in ("numba", "llvmlite")]
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return "\n".join([python, *versions, *settings, *(_native() if cpu == NATIVE else _GENERIC)])


# What `variables` makes Numba compile for: LLVM's names of the CPU and of its features.
_GENERIC = ("generic", "")


def _native() -> tuple[str, str]:
    """The CPU that Numba compiles for: of two models that share a home folder, each has its own code."""
    from llvmlite import binding

    name = os.environ.get("NUMBA_CPU_NAME")
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        features = f"{binding.get_host_cpu_features().flatten()} {os.environ.get('NUMBA_ENABLE_AVX', '')}"
    return binding.get_host_cpu_name() if name is None else name, features


def variables(cpu: str) -> dict[str, str]:
    """The environment in which a process compiles for this CPU."""
    if cpu == NATIVE:
        return {}
    return dict(zip(("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"), _GENERIC, strict=True))
